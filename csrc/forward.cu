// The forward as a policy of the kernels, equations (1) to (4) of docs/math.md:
// y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up);
// and another one with a norm of y, equations (16) to (18).
#include "forward.h"

#include "adapter_kernels.cuh"
#include "forward_policy.cuh"

namespace adapterkern {
namespace {

// Computes y from u = a W_up^T, equation (4), in float32 until the single store, for tensors of any
// dtype at any address.
__device__ ADAPTERKERN_RARE void store_any_output(const ForwardParams& params, const float* from,
                                                  int64_t token, int64_t feature) {
  const auto of = [&](const View& view) -> Matrix {
    return {view, params.num_tokens, params.hidden_size};
  };
  float u[kVector];
  load_whole(u, from);
  add_vector(u, as_matrix(params.up_bias, params.hidden_size), 0, feature);
  scaling_of(params).multiply(u, feature);
  if (params.add_input) add_vector(u, of(params.x), token, feature);
  add_vector(u, of(params.residual), token, feature);
  add_vector(u, of(params.skip), token, feature);
  store_vector(of(params.y), token, feature, u);
}

template <typename ScalarT>
struct Forward : ForwardFormulas<ScalarT, ForwardParams> {
  using Base = ForwardFormulas<ScalarT, ForwardParams>;
  using Base::params;
  using typename Base::Features;
  using typename Base::Kept;
  using typename Base::OfUnits;
  using Scalar = ScalarT;

  float factor_of_all;  // unless each feature has a factor of its own

  __device__ __forceinline__ explicit Forward(const ForwardParams& params)
      : Base(params), factor_of_all(scaling_of(params).of_all()) {}

  __device__ __forceinline__ Matrix rows(int64_t last) const {
    return this->of_tokens(params.x, last);
  }
  __device__ __forceinline__ Matrix into(int64_t last) const {
    return {params.down_weight, params.bottleneck_size, last};
  }
  __device__ __forceinline__ Matrix out() const {
    return {params.up_weight, params.hidden_size, params.bottleneck_size};
  }
  __device__ __forceinline__ int64_t features_in() const { return params.hidden_size; }
  __device__ __forceinline__ int64_t features_out() const { return params.hidden_size; }

  __device__ __forceinline__ OfUnits of_units(int64_t unit) const {
    OfUnits found;
    load_vector(found.bias, as_matrix(params.down_bias, params.bottleneck_size), 0, unit);
    return found;
  }

  __device__ __forceinline__ void finish(float (&z)[kVector], const OfUnits& of_units,
                                         const float (&)[kVector], Kept& kept, int64_t unit) const {
    this->finish_units(z, of_units, kept, unit, params.bottleneck_size);
  }

  __device__ __forceinline__ void keep(const Kept& kept, int64_t token, int64_t unit) const {
    store_units<Scalar>(this->of_units_of(params.z), token, unit, kept.z);
  }

  // x or the residual, and skip.
  __device__ __forceinline__ Added added() const {
    const View first = choose(params.add_input, params.x, params.residual);
    const bool has_first = first.data != nullptr, has_skip = params.skip.data != nullptr;
    return {has_first + has_skip,
            {this->of_tokens(choose(has_first, first, params.skip), params.hidden_size),
             this->of_tokens(params.skip, params.hidden_size)}};
  }
  __device__ __forceinline__ Matrix bias() const {
    return as_matrix(params.up_bias, params.hidden_size);
  }
  __device__ __forceinline__ Matrix factor() const {
    return params.channel_scaling ? as_matrix(params.scaling, params.hidden_size) : Matrix{};
  }
  __device__ __forceinline__ Matrix output() const {
    return this->of_tokens(params.y, params.hidden_size);
  }
  __device__ __forceinline__ bool is_direct() const {
    return this->template writes_direct<Scalar>(params.y, added());
  }

  // Of the vector at `column` of a tile's bias and factor, which have the types of the tensors, or
  // in a cluster float32.
  __device__ __forceinline__ Features features(const void* bias, const void* factor,
                                               int column) const {
    Features found = {};
    if (params.up_bias.data != nullptr) {
      this->load_feature(found.bias, params.up_bias, bias, column);
    }
    if (params.channel_scaling) {
      this->load_feature(found.factor, params.scaling, factor, column);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) found.factor[i] = factor_of_all;
    }
    return found;
  }
  __device__ __forceinline__ Features features(const float* bias, const float* factor,
                                               int column) const {
    Features found;
    load_whole(found.bias, bias + column);
    load_whole(found.factor, factor + column);
    return found;
  }
  __device__ __forceinline__ void store_any(const float* from, int64_t token,
                                            int64_t feature) const {
    store_any_output(params, from, token, feature);
  }
};

// Where a norm follows, y has the dtype of the products and all rows that are added to it are
// direct.
template <typename ScalarT>
struct NormForward : Forward<ScalarT> {
  static constexpr bool kHasNorm = true;
  using Forward<ScalarT>::Forward;
  using Forward<ScalarT>::params;

  __device__ __forceinline__ Matrix normed() const {
    return this->of_tokens(params.normed, params.hidden_size);
  }
  __device__ __forceinline__ bool has_mean() const { return params.norm == kLayer; }
  __device__ __forceinline__ float eps() const { return float_of_bits(params.eps); }
  __device__ __forceinline__ float weight_offset() const {
    return float_of_bits(params.weight_offset);
  }
};

}  // namespace

cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream) {
  if (params.norm != kNone) return launch_adapter<NormForward>(params, stream);
  return launch_adapter<Forward>(params, stream);
}

}  // namespace adapterkern
