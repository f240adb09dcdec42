// Backward kernels of dz and dx, equations (5), (9) and (12) of docs/math.md, in the forms of
// the forward; then the launcher of the whole backward.
#include "backward.h"

#include "activations.cuh"
#include "cluster.cuh"
#include "launch.cuh"
#include "row_block.cuh"
#include "static_switch.h"
#include "weight_gradients.h"

namespace adapterkern {
namespace {

// du = scaling * dy, equation (5), rounded to the products' dtype as eager rounds it. A single
// factor for all features is applied to the sums instead, so that tiles of dy are copied unchanged.
struct Scale {
  Scaling scaling;

  __device__ __forceinline__ bool is_active() const { return scaling.channel; }
  template <int n>
  __device__ __forceinline__ void operator()(float (&v)[n], int64_t feature) const {
    scaling.multiply(v, feature);
  }
};

// Whether da is needed, or the activation alone for dW_up, so that dy need not be read.
__device__ __forceinline__ bool needs_dz(const BackwardParams& params) {
  return params.dx.data != nullptr || params.dz.data != nullptr;
}

// Returns the sums of da = du W_up over the features first ... last.
template <typename Shape>
__device__ __forceinline__ float* read_output_gradient(unsigned char* shared,
                                                       const BackwardParams& params,
                                                       int64_t first_token, int64_t first,
                                                       int64_t last) {
  return multiply_into_bottleneck<Shape, true>(shared, {params.dy, params.num_tokens, last},
                                               {params.up_weight, last, params.bottleneck_size},
                                               first_token, first, last, Scale{scaling_of(params)});
}

// dz = da act'(z), equation (9).
template <typename Scalar>
__device__ __forceinline__ void finish(const BackwardParams& params, float (&da)[kVector],
                                       const float (&z)[kVector], int64_t unit) {
  const Scaling scaling = scaling_of(params);
  if (!scaling.channel) scaling.multiply(da, 0);
  apply_derivative(da, z, params.activation);
  round_to<Scalar>(da);
  clear_padded_units(da, unit, params.bottleneck_size);
}

__device__ __forceinline__ Matrix of_units(const BackwardParams& params, const View& view) {
  return {view, params.num_tokens, params.bottleneck_size};
}

// Stores a = act(z), which was not saved, for the weight gradients.
__device__ __forceinline__ void store_activation(const BackwardParams& params,
                                                 const float (&z)[kVector], int64_t token,
                                                 int64_t unit) {
  if (params.a.data == nullptr) return;
  float a[kVector];
  copy(a, z);
  apply_activation(a, params.activation);
  store_vector(of_units(params, params.a), token, unit, a);
}

// Loads z, finishes the vector, and stores dz and a for the weight gradients.
template <typename Scalar>
__device__ __forceinline__ void finish_unit(const BackwardParams& params, float (&da)[kVector],
                                            int64_t token, int64_t unit, bool keeps) {
  float z[kVector];
  load_vector(z, of_units(params, params.z), token, unit);
  finish<Scalar>(params, da, z, unit);
  if (!keeps) return;
  store_vector(of_units(params, params.dz), token, unit, da);
  store_activation(params, z, token, unit);
}

struct Nothing {};  // dx needs no values per feature

// Computes dx from v = dz W_down, equation (12).
template <typename Scalar>
struct InputGradient {
  const BackwardParams& params;
  bool direct;  // dx is direct, and so is dy where it is added from global memory

  __device__ __forceinline__ explicit InputGradient(const BackwardParams& params) : params(params) {
    direct = params.hidden_size % kVector == 0 && of(params.dx).template is_direct_as<Scalar>() &&
             (!params.add_input || of(params.dy).template is_direct_as<Scalar>());
  }

  __device__ __forceinline__ Matrix of(const View& view) const {
    return {view, params.num_tokens, params.hidden_size};
  }

  // `dy` points at the same elements in shared memory; if null, they come from global memory.
  template <bool kDirect>
  __device__ __forceinline__ void store(float (&v)[kVector], int64_t token, int64_t feature,
                                        const Scalar* dy) const {
    if (token >= params.num_tokens || feature >= params.hidden_size) return;
    if (params.add_input && dy != nullptr) {
      add_whole(v, dy);
    } else if (params.add_input) {
      if constexpr (kDirect) {
        add_direct<Scalar>(v, of(params.dy), token, feature);
      } else {
        add_vector(v, of(params.dy), token, feature);
      }
    }
    if constexpr (kDirect) {
      store_direct<Scalar>(of(params.dx), token, feature, v);
    } else {
      store_vector(of(params.dx), token, feature, v);
    }
  }
};

// Writes dx over the features first ... last from the tile of dz; dy comes from L2.
template <typename Shape>
__device__ __forceinline__ void write_input_gradient(unsigned char* shared,
                                                     const BackwardParams& params,
                                                     int64_t first_token, int64_t first,
                                                     int64_t last) {
  using Scalar = typename Shape::Scalar;
  const InputGradient<Scalar> gradient(params);
  multiply_out_of_bottleneck<Shape, true>(
      shared, {params.down_weight, params.bottleneck_size, params.hidden_size}, first, last,
      gradient.direct, [](int64_t) { return Nothing(); },
      [&](auto is_direct, float (&v)[kVector], int row, int64_t feature, Nothing) {
        gradient.template store<decltype(is_direct)::value>(v, first_token + row, feature, nullptr);
      });
}

// The row-block form; grid: token blocks. Global memory per token: read dy (H) and z (R), write dx
// (H), dz and a (R each). L2 serves the second read of dy, and both weights.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_bwd_dx_kernel(const __grid_constant__ BackwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
  const float* sums = read_output_gradient<Shape>(shared, params, first_token, 0,
                                                  needs_dz(params) ? params.hidden_size : 0);
  for_each_vector<Shape::kBlockT, Shape::kBlockR, Shape::kThreads>(
      threadIdx.x, [&](int row, int unit) {
        float da[kVector];
        load_whole(da, sums + row * Shape::kStrideSum + unit);
        finish_unit<typename Shape::Scalar>(params, da, first_token + row, unit, true);
        store_bottleneck<Shape>(shared, row, unit, da);
      });
  if (params.dx.data != nullptr) {
    write_input_gradient<Shape>(shared, params, first_token, 0, params.hidden_size);
  }
}

// Split form, first half: the sum of da over one slice of H. Grid: token blocks, slices.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_bwd_split_dz_kernel(const __grid_constant__ BackwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
  const int64_t first = blockIdx.y * params.features_per_split;
  const int64_t last = min(first + params.features_per_split, params.hidden_size);
  const float* sums = read_output_gradient<Shape>(shared, params, first_token, first, last);
  store_partial<Shape>(params.partial, blockIdx.y, params.num_tokens, params.bottleneck_size,
                       first_token, sums);
}

// Split form, second half: dz and a, which the first feature block stores, and dx. Grid: token
// blocks, feature blocks (one if dx is not needed).
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_bwd_split_dx_kernel(const __grid_constant__ BackwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * Shape::kBlockH;
  for_each_vector<Shape::kBlockT, Shape::kBlockR, Shape::kThreads>(
      threadIdx.x, [&](int row, int unit) {
        float da[kVector];
        sum_partials(da, params.partial, params.num_splits, params.num_tokens,
                     params.bottleneck_size, first_token + row, unit);
        finish_unit<typename Shape::Scalar>(params, da, first_token + row, unit, blockIdx.y == 0);
        store_bottleneck<Shape>(shared, row, unit, da);
      });
  if (params.dx.data != nullptr) {
    write_input_gradient<Shape>(shared, params, first_token, first,
                                min(first + Shape::kBlockH, params.hidden_size));
  }
}

// The cluster form; grid: the blocks of one cluster after another. Global memory per token is that
// of the row-block form; nothing is read twice unless a scaling keeps dy itself out of the tile.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    bottleneck_bwd_cluster_dx_kernel(const __grid_constant__ BackwardParams params) {
  using Scalar = typename Shape::Scalar;
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (kHasClusters) {
    const int64_t hidden_size = params.hidden_size, bottleneck_size = params.bottleneck_size;
    const Scale scale{scaling_of(params)};
    const InputGradient<Scalar> gradient(params);
    const bool dy_in_tile = params.dy.dtype == kDTypeOf<Scalar> && !scale.is_active();
    const View down_weight = params.dx.data != nullptr ? params.down_weight : View{};
    run_cluster<Shape, true>(
        shared,
        {{params.dy, params.num_tokens, hidden_size},
         {params.up_weight, hidden_size, bottleneck_size},
         {down_weight, bottleneck_size, hidden_size},
         params.features_per_split},
        scale,
        [&](float (&z)[kVector], int64_t token, int unit) {
          load_vector(z, of_units(params, params.z), token, unit);
        },
        [&](float (&da)[kVector], const float (&z)[kVector], float (&dz)[kVector], int unit) {
          finish<Scalar>(params, da, z, unit);
          copy(dz, da);
        },
        [&](const float (&dz)[kVector], int64_t token, int unit) {
          store_vector(of_units(params, params.dz), token, unit, dz);
          if (params.a.data == nullptr) return;
          float z[kVector];  // its place holds dz by now
          load_vector(z, of_units(params, params.z), token, unit);
          store_activation(params, z, token, unit);
        },
        gradient.direct, [](int64_t) { return Nothing(); },
        [&](auto is_direct, float (&v)[kVector], int64_t token, int64_t feature, Nothing,
            const Scalar* dy) {
          gradient.template store<decltype(is_direct)::value>(v, token, feature,
                                                              dy_in_tile ? dy : nullptr);
        });
  } else {
    trap();
  }
}

template <typename Shape>
cudaError_t launch_dx(const BackwardParams& params, cudaStream_t stream) {
  if (params.num_clusters > 0) {
    return switch_cluster_shape<Shape>(params.cluster_tokens, [&](auto shape) {
      using Cluster = typename decltype(shape)::type;
      return launch_cluster<Cluster>(bottleneck_bwd_cluster_dx_kernel<Cluster>, params, stream);
    });
  }
  const auto token_blocks = static_cast<unsigned>(ceil_div(params.num_tokens, Shape::kBlockT));
  if (params.num_splits == 0) {
    return launch(bottleneck_bwd_dx_kernel<Shape>, dim3(token_blocks), Shape::kThreads,
                  Shape::kSharedBytes, params, stream);
  }
  const dim3 dz_grid(token_blocks, static_cast<unsigned>(params.num_splits));
  const cudaError_t error = launch(bottleneck_bwd_split_dz_kernel<Shape>, dz_grid, Shape::kThreads,
                                   Shape::kSharedBytes, params, stream);
  if (error != cudaSuccess) return error;
  const int64_t feature_blocks =
      params.dx.data == nullptr ? 1 : ceil_div(params.hidden_size, Shape::kBlockH);
  return launch(bottleneck_bwd_split_dx_kernel<Shape>,
                dim3(token_blocks, static_cast<unsigned>(feature_blocks)), Shape::kThreads,
                Shape::kSharedBytes, params, stream);
}

}  // namespace

cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  if (!has_formula(params.activation)) return cudaErrorInvalidValue;
  if (params.dx.data != nullptr || params.dz.data != nullptr || params.a.data != nullptr) {
    const cudaError_t error = switch_dtype(params.compute_dtype, [&](auto type) {
      return switch_block_r(params.bottleneck_size, [&](auto block_r) {
        using Scalar = typename decltype(type)::type;
        return launch_dx<RowBlockShape<Scalar, decltype(block_r)::value>>(params, stream);
      });
    });
    if (error != cudaSuccess) return error;
  }
  return params.token_splits == 0 ? cudaSuccess : launch_weight_gradients(params, stream);
}

}  // namespace adapterkern
