// Forward kernels, equations (1) to (4) of docs/math.md.
//
// Three forms of y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up):
// - row block: a block owns kBlockT tokens and all of R; a = act(z) never leaves the chip.
// - split, for few tokens: two kernels, partial sums of z over slices of H, then y over blocks of
//   features.
// - cluster, from compute capability 9.0 on: each block takes a slice of H, and the blocks exchange
//   their sums of z on the chip; both weights and x are read once.
#include "forward.h"

#include "activations.cuh"
#include "cluster.cuh"
#include "launch.cuh"
#include "row_block.cuh"
#include "static_switch.h"

namespace adapterkern {
namespace {

// Finishes z: `kept` receives the rounded z for backward, and `z` becomes a = act(z). Both are
// rounded where eager rounds, because backward recomputes a from the stored z.
template <typename Scalar>
__device__ __forceinline__ void finish(const ForwardParams& params, float (&z)[kVector],
                                       const float (&bias)[kVector], float (&kept)[kVector],
                                       int64_t unit) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) z[i] += bias[i];
  round_to<Scalar>(z);
  copy(kept, z);
  apply_activation(z, params.activation);
  clear_padded_units(z, unit, params.bottleneck_size);
}

__device__ __forceinline__ void load_bias(const ForwardParams& params, float (&bias)[kVector],
                                          int64_t unit) {
  load_vector(bias, as_matrix(params.down_bias, params.bottleneck_size), 0, unit);
}

__device__ __forceinline__ void store_z(const ForwardParams& params, const float (&z)[kVector],
                                        int64_t token, int64_t unit) {
  store_vector({params.z, params.num_tokens, params.bottleneck_size}, token, unit, z);
}

template <typename Scalar>
__device__ __forceinline__ void finish_unit(const ForwardParams& params, float (&z)[kVector],
                                            int64_t token, int64_t unit, bool keep_z) {
  float bias[kVector], kept[kVector];
  load_bias(params, bias, unit);
  finish<Scalar>(params, z, bias, kept, unit);
  if (keep_z) store_z(params, kept, token, unit);
}

// Computes y from u = a W_up^T, equation (4), in float32 until the single store.
template <typename Scalar>
struct Output {
  struct Features {
    float bias[kVector], factor[kVector];
  };
  const ForwardParams& params;
  Scaling scaling;
  bool direct;  // y is direct, and so is all that is added to it from global memory

  __device__ __forceinline__ explicit Output(const ForwardParams& params)
      : params(params), scaling(scaling_of(params)) {
    direct = params.hidden_size % kVector == 0 && of(params.y).template is_direct_as<Scalar>() &&
             (!params.add_input || is_direct_or_none(params.x)) &&
             is_direct_or_none(params.residual) && is_direct_or_none(params.skip);
  }

  __device__ __forceinline__ Matrix of(const View& view) const {
    return {view, params.num_tokens, params.hidden_size};
  }

  __device__ __forceinline__ bool is_direct_or_none(const View& view) const {
    return view.data == nullptr || of(view).template is_direct_as<Scalar>();
  }

  __device__ __forceinline__ Features features(int64_t feature) const {
    Features found;
    load_vector(found.bias, as_matrix(params.up_bias, params.hidden_size), 0, feature);
    scaling.load(found.factor, feature);
    return found;
  }

  // `x` points at the same elements in shared memory; if null, they come from global memory.
  template <bool kDirect>
  __device__ __forceinline__ void store(float (&u)[kVector], int64_t token, int64_t feature,
                                        const Features& of_feature, const Scalar* x) const {
    if (token >= params.num_tokens || feature >= params.hidden_size) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) u[i] = (u[i] + of_feature.bias[i]) * of_feature.factor[i];
    const auto add = [&](const View& view) {
      if (view.data == nullptr) return;
      if constexpr (kDirect) {
        add_direct<Scalar>(u, of(view), token, feature);
      } else {
        add_vector(u, of(view), token, feature);
      }
    };
    if (params.add_input && x != nullptr) {
      add_whole(u, x);
    } else if (params.add_input) {
      add(params.x);
    }
    add(params.residual);
    add(params.skip);
    if constexpr (kDirect) {
      store_direct<Scalar>(of(params.y), token, feature, u);
    } else {
      store_vector(of(params.y), token, feature, u);
    }
  }
};

// Writes y over the features first ... last from the bottleneck tile. The down-projection has just
// read x, so it comes from L2.
template <typename Shape>
__device__ __forceinline__ void write_output(unsigned char* shared, const ForwardParams& params,
                                             int64_t first_token, int64_t first, int64_t last) {
  using Scalar = typename Shape::Scalar;
  const Output<Scalar> output(params);
  multiply_out_of_bottleneck<Shape, false>(
      shared, {params.up_weight, params.hidden_size, params.bottleneck_size}, first, last,
      output.direct, [&](int64_t feature) { return output.features(feature); },
      [&](auto is_direct, float (&u)[kVector], int row, int64_t feature, const auto& of_feature) {
        output.template store<decltype(is_direct)::value>(u, first_token + row, feature, of_feature,
                                                          nullptr);
      });
}

// Returns the sums of z over the features first ... last.
template <typename Shape>
__device__ __forceinline__ float* read_input(unsigned char* shared, const ForwardParams& params,
                                             int64_t first_token, int64_t first, int64_t last) {
  return multiply_into_bottleneck<Shape, false>(shared, {params.x, params.num_tokens, last},
                                                {params.down_weight, params.bottleneck_size, last},
                                                first_token, first, last, Unchanged());
}

// The row-block form; grid: token blocks. Global memory per token: read x (H), residual and skip
// if given (H each), write y (H) and z (R). L2 serves the second read of x, and both weights.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_fwd_kernel(const __grid_constant__ ForwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
  const float* sums = read_input<Shape>(shared, params, first_token, 0, params.hidden_size);
  for_each_vector<Shape::kBlockT, Shape::kBlockR, Shape::kThreads>(
      threadIdx.x, [&](int row, int unit) {
        float z[kVector];
        load_whole(z, sums + row * Shape::kStrideSum + unit);
        finish_unit<typename Shape::Scalar>(params, z, first_token + row, unit, true);
        store_bottleneck<Shape>(shared, row, unit, z);
      });
  write_output<Shape>(shared, params, first_token, 0, params.hidden_size);
}

// Split form, first half: the sum of z over one slice of H. Grid: token blocks, slices.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_fwd_down_kernel(const __grid_constant__ ForwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
  const int64_t first = blockIdx.y * params.features_per_split;
  const int64_t last = min(first + params.features_per_split, params.hidden_size);
  const float* sums = read_input<Shape>(shared, params, first_token, first, last);
  store_partial<Shape>(params.partial, blockIdx.y, params.num_tokens, params.bottleneck_size,
                       first_token, sums);
}

// Split form, second half: y from the partial sums of z, which sit in L2. Grid: token blocks,
// feature blocks, the first of which stores z.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_fwd_up_kernel(const __grid_constant__ ForwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * Shape::kBlockH;
  for_each_vector<Shape::kBlockT, Shape::kBlockR, Shape::kThreads>(
      threadIdx.x, [&](int row, int unit) {
        float z[kVector];
        sum_partials(z, params.partial, params.num_splits, params.num_tokens,
                     params.bottleneck_size, first_token + row, unit);
        finish_unit<typename Shape::Scalar>(params, z, first_token + row, unit, blockIdx.y == 0);
        store_bottleneck<Shape>(shared, row, unit, z);
      });
  write_output<Shape>(shared, params, first_token, first,
                      min(first + Shape::kBlockH, params.hidden_size));
}

// The cluster form; grid: the blocks of one cluster after another. Global memory per token is that
// of the row-block form; nothing is read twice.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    bottleneck_fwd_cluster_kernel(const __grid_constant__ ForwardParams params) {
  using Scalar = typename Shape::Scalar;
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (kHasClusters) {
    const int64_t hidden_size = params.hidden_size, bottleneck_size = params.bottleneck_size;
    const Output<Scalar> output(params);
    const bool x_in_tile = params.x.dtype == kDTypeOf<Scalar>;
    run_cluster<Shape, false>(
        shared,
        {{params.x, params.num_tokens, hidden_size},
         {params.down_weight, bottleneck_size, hidden_size},
         {params.up_weight, hidden_size, bottleneck_size},
         params.features_per_split},
        Unchanged(),
        [&](float (&bias)[kVector], int64_t, int unit) { load_bias(params, bias, unit); },
        [&](float (&z)[kVector], const float (&bias)[kVector], float (&kept)[kVector], int unit) {
          finish<Scalar>(params, z, bias, kept, unit);
        },
        [&](const float (&z)[kVector], int64_t token, int unit) {
          store_z(params, z, token, unit);
        },
        output.direct, [&](int64_t feature) { return output.features(feature); },
        [&](auto is_direct, float (&u)[kVector], int64_t token, int64_t feature,
            const auto& of_feature, const Scalar* x) {
          output.template store<decltype(is_direct)::value>(u, token, feature, of_feature,
                                                            x_in_tile ? x : nullptr);
        });
  } else {
    trap();
  }
}

template <typename Shape>
cudaError_t launch_shape(const ForwardParams& params, cudaStream_t stream) {
  if (params.num_clusters > 0) {
    return switch_cluster_shape<Shape>(params.cluster_tokens, [&](auto shape) {
      using Cluster = typename decltype(shape)::type;
      return launch_cluster<Cluster>(bottleneck_fwd_cluster_kernel<Cluster>, params, stream);
    });
  }
  const auto token_blocks = static_cast<unsigned>(ceil_div(params.num_tokens, Shape::kBlockT));
  if (params.num_splits == 0) {
    return launch(bottleneck_fwd_kernel<Shape>, dim3(token_blocks), Shape::kThreads,
                  Shape::kSharedBytes, params, stream);
  }
  const dim3 down_grid(token_blocks, static_cast<unsigned>(params.num_splits));
  const cudaError_t error = launch(bottleneck_fwd_down_kernel<Shape>, down_grid, Shape::kThreads,
                                   Shape::kSharedBytes, params, stream);
  if (error != cudaSuccess) return error;
  const dim3 up_grid(token_blocks,
                     static_cast<unsigned>(ceil_div(params.hidden_size, Shape::kBlockH)));
  return launch(bottleneck_fwd_up_kernel<Shape>, up_grid, Shape::kThreads, Shape::kSharedBytes,
                params, stream);
}

}  // namespace

cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream) {
  if (!has_formula(params.activation)) return cudaErrorInvalidValue;
  return switch_dtype(params.compute_dtype, [&](auto type) {
    return switch_block_r(params.bottleneck_size, [&](auto block_r) {
      using Scalar = typename decltype(type)::type;
      return launch_shape<RowBlockShape<Scalar, decltype(block_r)::value>>(params, stream);
    });
  });
}

}  // namespace adapterkern
