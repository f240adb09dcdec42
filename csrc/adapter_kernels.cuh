// The kernels of forward and backward: one set, under the policies of forward.cu and backward.cu.
//
// - row block: a block owns kBlockT tokens and all of R; the bottleneck never leaves the chip.
// - split, for few tokens: two kernels. The first computes partial sums of the bottleneck over
//   slices of H, the second adds them and writes the output, over other slices of H.
// - cluster, from compute capability 9.0 on: each block takes a slice of H, and the blocks exchange
//   their sums on the chip; both weights and the rows are read once.
// - resident, for compute capability 9.0: a block keeps 64 tokens on the chip, so the rows are read
//   once, and copies, products and output take place at the same time.
//
// A policy tells what the rows, the weights, the bottleneck and the output are:
//   Scalar, Params, Kept, OfUnits      types: of the products, and those named below
//   kTransposed                        whether the weights enter as transposes of the forward's
//   kReadsZ                            whether finish reads z, saved by the forward
//   kHasFeatures                       whether the output has a bias and a factor for each feature
//   kMostAdded                         the most tensors that are added to the output
//   kHasNorm                           whether a norm of the output follows; see norm.cuh
//   rows, into, out, z, added, bias, factor, output   tensors; rows and into end where a slice ends
//   transform()                        changes vectors of the rows on their way into a tile
//   of_units(unit), finish(...)        turns a sum into an element of the bottleneck
//   keep(kept, token, unit)            stores what later kernels read
//   is_direct(), features, scale       write the output where all is in whole vectors of the
//                                      products' dtype or float32
//   store_any                          writes it in any dtype, to any address
#pragma once

#include "activations.cuh"
#include "cluster.cuh"
#include "resident.cuh"
#include "row_block.cuh"

namespace adapterkern {

// Finishes the block's rows of the bottleneck. sums(v, row, unit) loads a vector of sums.
template <typename Shape, typename Policy, typename Sums>
__device__ __forceinline__ void finish_rows(unsigned char* shared, const Policy& policy,
                                            int64_t first_token, bool keeps, Sums sums) {
  constexpr int kAcross = Shape::kBlockR / kVector;
  static_assert(Shape::kThreads % kAcross == 0, "a thread would change its units");
  const int unit = threadIdx.x % kAcross * kVector;
  const auto of_units = policy.of_units(unit);
#pragma unroll 1  // one place for the formulas of every activation
  for (int row = threadIdx.x / kAcross; row < Shape::kBlockT; row += Shape::kThreads / kAcross) {
    float v[kVector], z[kVector] = {};
    typename Policy::Kept kept;
    auto* const place = bottleneck_in<Shape>(shared) + row * Shape::kStrideR + unit;
    sums(v, row, unit);
    if constexpr (Policy::kReadsZ) load_whole(z, place);
    policy.finish(v, of_units, z, kept, unit);
    store_whole(place, v);
    if (keeps) policy.keep(kept, first_token + row, unit);
  }
}

// Loads z into the bottleneck tile, whose vectors finish_rows replaces one by one.
template <typename Shape, typename Policy>
__device__ __forceinline__ void load_z(unsigned char* shared, const Policy& policy,
                                       int64_t first_token) {
  if constexpr (Policy::kReadsZ) {
    load_tile<Shape::kBlockT, Shape::kBlockR, Shape::kThreads>(
        bottleneck_in<Shape>(shared), policy.z(), first_token, 0, Unchanged());
    copy_async_commit();
  }
}

// The row-block form; grid: token blocks. Global memory per token: read the rows (H), what is added
// (H each) and z, write the output (H) and what is kept. The rows are added in a second reading,
// which L2 serves as far as the rows of all blocks at work fit it; it serves both weights.
template <typename Policy, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_row_block_kernel(const __grid_constant__ typename Policy::Params params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (Shape::kIsCompiled) {
    const Policy policy(params);
    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
    multiply_into_bottleneck<Shape>(shared, policy, first_token, 0, policy.features_in(),
                                    [&] { load_z<Shape>(shared, policy, first_token); });
    finish_rows<Shape>(shared, policy, first_token, true, [&](float (&v)[kVector], int row, int u) {
      load_whole(v, sums_in<Shape>(shared) + row * Shape::kStrideSum + u);
    });
    __syncthreads();  // the sums are read, so that tiles can take their place
    multiply_out_of_bottleneck<Shape>(shared, policy, first_token, 0, policy.features_out(),
                                      [](int) {});
  } else {
    trap();
  }
}

// Returns the row of partial [S, T, kBlockR] at a slice and a token.
template <typename Shape, typename Params>
__device__ __forceinline__ float* partial_row(const Params& params, int64_t split, int64_t token) {
  return static_cast<float*>(params.partial.data) +
         (split * params.num_tokens + token) * Shape::kBlockR;
}

// Split form, first half: the sums over one slice of H. Grid: token blocks, slices.
template <typename Policy, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_split_first_kernel(const __grid_constant__ typename Policy::Params params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (Shape::kIsCompiled) {
    const Policy policy(params);
    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
    const int64_t first = blockIdx.y * params.features_per_split;
    multiply_into_bottleneck<Shape>(shared, policy, first_token, first,
                                    min(first + params.features_per_split, params.hidden_size),
                                    [] {});
    for_each_vector<Shape::kBlockT, Shape::kBlockR, Shape::kThreads>(
        threadIdx.x, [&](int row, int unit) {
          if (first_token + row >= params.num_tokens) return;
          float v[kVector];
          load_whole(v, sums_in<Shape>(shared) + row * Shape::kStrideSum + unit);
          store_whole_global(partial_row<Shape>(params, blockIdx.y, first_token + row) + unit, v);
        });
  } else {
    trap();
  }
}

// v = the sum over the slices of H, in their order, of the partial sums at (token, unit). The loads
// of four slices are under way together.
template <typename Shape, typename Params>
__device__ __forceinline__ void sum_partials(float (&v)[kVector], const Params& params,
                                             int64_t token, int unit) {
  constexpr int kAtOnce = 4;
  const bool exists = token < params.num_tokens;
  const float* from = partial_row<Shape>(params, 0, exists ? token : 0) + unit;
  const int64_t stride = params.num_tokens * Shape::kBlockR;
  const auto splits = static_cast<int>(exists ? params.num_splits : 0);
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = 0.0f;
#pragma unroll 1
  for (int split = 0; split < splits; split += kAtOnce) {
    float parts[kAtOnce][kVector] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (split + i < splits) load_whole(parts[i], from + (split + i) * stride);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] += parts[i][j];
    }
  }
}

// Split form, second half: the output over one slice of H, from the partial sums, which sit in L2.
// Grid: token blocks, slices, of which the first keeps what later kernels read.
template <typename Policy, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_split_second_kernel(const __grid_constant__ typename Policy::Params params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (Shape::kIsCompiled) {
    const Policy policy(params);
    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Shape::kBlockT;
    const int64_t first = blockIdx.y * params.features_per_output_split;
    const int64_t last = min(first + params.features_per_output_split, policy.features_out());
    load_z<Shape>(shared, policy, first_token);
    multiply_out_of_bottleneck<Shape>(shared, policy, first_token, first, last, [&](int pending) {
      if constexpr (Policy::kReadsZ) {
        copy_async_wait_for(pending);
        __syncthreads();  // z is there
      }
      finish_rows<Shape>(shared, policy, first_token, blockIdx.y == 0,
                         [&](float (&v)[kVector], int row, int unit) {
                           sum_partials<Shape>(v, params, first_token + row, unit);
                         });
    });
  } else {
    trap();
  }
}

// The cluster form; grid: the blocks of one cluster after another. Global memory per token is that
// of the row-block form, but no row is read twice unless a transform keeps it out of its tile.
template <typename Policy, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    bottleneck_cluster_kernel(const __grid_constant__ typename Policy::Params params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (kHasClusters) {
    run_cluster<Shape>(shared, Policy(params));
  } else {
    trap();
  }
}

// Launches the kernels of one row-block shape.
template <typename Policy, typename Shape>
cudaError_t launch_row_block(typename Policy::Params params, cudaStream_t stream) {
  if (params.shared_bytes < Shape::kLeastBytes) params.shared_bytes = Shape::kLeastBytes;
  const auto bytes = static_cast<int>(params.shared_bytes);
  const auto run = [&](auto kernel, int64_t slices) {
    const dim3 grid(static_cast<unsigned>(ceil_div(params.num_tokens, Shape::kBlockT)),
                    static_cast<unsigned>(slices));
    return launch(kernel, grid, Shape::kThreads, bytes, params, stream);
  };
  if (params.num_splits == 0) return run(bottleneck_row_block_kernel<Policy, Shape>, 1);
  if (params.partial.stride != Shape::kBlockR) return cudaErrorInvalidValue;
  const cudaError_t error = run(bottleneck_split_first_kernel<Policy, Shape>, params.num_splits);
  if (error != cudaSuccess) return error;
  return run(bottleneck_split_second_kernel<Policy, Shape>, params.output_splits);
}

// Launches the cluster kernel of one shape, under PolicyOf<element type>.
template <template <typename> class PolicyOf, int kBlockR, typename Scalar, typename Params>
cudaError_t launch_clusters(const Params& params, cudaStream_t stream) {
  return switch_cluster_shape<Scalar, kBlockR>(params.cluster_tokens, [&](auto shape) {
    using Shape = typename decltype(shape)::type;
    using Policy = PolicyOf<Scalar>;
    return launch_cluster<Shape, Policy::kHasNorm>(bottleneck_cluster_kernel<Policy, Shape>, params,
                                                   stream);
  });
}

// Launches the kernels of the form that `params` ask for, under PolicyOf<element type>.
template <template <typename> class PolicyOf, typename Params>
cudaError_t launch_adapter(const Params& params, cudaStream_t stream) {
  if (!has_formula(params.activation)) return cudaErrorInvalidValue;
  if (params.resident_clusters > 0) return launch_resident<PolicyOf>(params, stream);
  return switch_dtype(params.compute_dtype, [&](auto type) {
    return switch_block_r(params.bottleneck_size, [&](auto width) {
      using Scalar = typename decltype(type)::type;
      constexpr int kBlockR = decltype(width)::value;
      if (params.num_clusters > 0) {
        return launch_clusters<PolicyOf, kBlockR, Scalar>(params, stream);
      }
      if constexpr (PolicyOf<Scalar>::kHasNorm) {
        return cudaErrorInvalidValue;
      } else {
        return switch_row_block_shape<Scalar, kBlockR>(params.large_tiles != 0, [&](auto shape) {
          using Shape = typename decltype(shape)::type;
          return launch_row_block<PolicyOf<Scalar>, Shape>(params, stream);
        });
      }
    });
  });
}

}  // namespace adapterkern
