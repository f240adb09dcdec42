// The backward of dz and dx as a policy of the kernels, equations (5), (9) and (12) of
// docs/math.md; then the launcher of the whole backward. With a norm dy is computed first.
#include "backward.h"

#include "adapter_kernels.cuh"
#include "norm_gradients.h"
#include "weight_gradients.h"

namespace adapterkern {
namespace {

// du = scaling * dy, equation (5), rounded to the products' dtype as eager rounds it. A single
// factor for all features is applied to the sums instead, so that tiles of dy are copied unchanged.
struct Scale {
  Scaling scaling;

  __device__ __forceinline__ bool is_active() const { return scaling.channel; }
  template <int n>
  __device__ __forceinline__ void load(float (&factors)[n], int64_t feature) const {
    scaling.load(factors, feature);
  }
};

// Whether da is needed, or the activation alone for dW_up, so that dy need not be read.
__device__ __forceinline__ bool needs_dz(const BackwardParams& params) {
  return params.dx.data != nullptr || params.dz.data != nullptr;
}

// Computes dx from v = dz W_down, equation (12), for tensors of any dtype at any address.
__device__ ADAPTERKERN_RARE void store_any_dx(const BackwardParams& params, const float* from,
                                              int64_t token, int64_t feature) {
  float v[kVector];
  load_whole(v, from);
  if (params.add_input) {
    add_vector(v, {params.dy, params.num_tokens, params.hidden_size}, token, feature);
  }
  store_vector({params.dx, params.num_tokens, params.hidden_size}, token, feature, v);
}

template <typename ScalarT>
struct Backward : PolicyBase<BackwardParams> {
  using Scalar = ScalarT;
  static constexpr bool kTransposed = true, kReadsZ = true, kHasFeatures = false;
  static constexpr bool kHasNorm = false;
  static constexpr int kMostAdded = 1;
  struct OfUnits {
    float factor;  // of all features; 1 if each has its own
  };
  struct Kept {
    float dz[kVector], a[kVector];
  };

  using PolicyBase::PolicyBase;

  __device__ __forceinline__ Matrix rows(int64_t last) const { return of_tokens(params.dy, last); }
  __device__ __forceinline__ Matrix into(int64_t last) const {
    return {params.up_weight, last, params.bottleneck_size};
  }
  __device__ __forceinline__ Matrix out() const {
    return {params.down_weight, params.bottleneck_size, params.hidden_size};
  }
  __device__ __forceinline__ int64_t features_in() const {
    return needs_dz(params) ? params.hidden_size : 0;
  }
  __device__ __forceinline__ int64_t features_out() const {
    return params.dx.data != nullptr ? params.hidden_size : 0;
  }
  __device__ __forceinline__ Scale transform() const { return {scaling_of(params)}; }
  __device__ __forceinline__ Matrix z() const { return of_units_of(params.z); }

  __device__ __forceinline__ OfUnits of_units(int64_t) const {
    return {params.channel_scaling ? 1.0f : scaling_of(params).of_all()};
  }

  // dz = da act'(z), equation (9); and a = act(z), which was not saved, for the weight gradients.
  __device__ __forceinline__ void finish(float (&da)[kVector], const OfUnits& of_units,
                                         const float (&z)[kVector], Kept& kept,
                                         int64_t unit) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) da[i] *= of_units.factor;
    copy(kept.a, z);
    apply_gradient(da, kept.a, params.activation);
    round_to<Scalar>(da);
    clear_padded_units(da, unit, params.bottleneck_size);
    copy(kept.dz, da);
  }

  __device__ __forceinline__ void keep(const Kept& kept, int64_t token, int64_t unit) const {
    store_units<Scalar>(of_units_of(params.dz), token, unit, kept.dz);
    store_units<Scalar>(of_units_of(params.a), token, unit, kept.a);
  }

  __device__ __forceinline__ Added added() const {
    const Matrix dy = of_tokens(params.dy, params.hidden_size);
    return {params.add_input != 0, {dy, dy}};
  }
  __device__ __forceinline__ Matrix output() const {
    return of_tokens(params.dx, params.hidden_size);
  }
  __device__ __forceinline__ bool is_direct() const {
    return writes_direct<Scalar>(params.dx, added());
  }

  struct Features {};  // dx needs no values for each feature
  __device__ __forceinline__ Features features(const void*, const void*, int) const { return {}; }
  __device__ __forceinline__ void scale(float (&)[kVector], Features) const {}
  __device__ __forceinline__ void store_any(const float* from, int64_t token,
                                            int64_t feature) const {
    store_any_dx(params, from, token, feature);
  }
};

}  // namespace

cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  if (!has_formula(params.activation)) return cudaErrorInvalidValue;
  if (params.norm != kNone) {
    const cudaError_t error = launch_norm_gradients(params, stream);
    if (error != cudaSuccess) return error;
  }
  if (params.dx.data != nullptr || params.dz.data != nullptr || params.a.data != nullptr) {
    const cudaError_t error = launch_adapter<Backward>(params, stream);
    if (error != cudaSuccess) return error;
  }
  return params.token_splits == 0 ? cudaSuccess : launch_weight_gradients(params, stream);
}

}  // namespace adapterkern
