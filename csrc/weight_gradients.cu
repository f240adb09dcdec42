// Weight, bias and scaling gradients, equations (6) to (8) and (10), (11), (13) of docs/math.md, as
// partial sums over slices of the tokens, added in the order of the slices: repeated runs give the
// same bits.
#include "weight_gradients.h"

#include "gradient_tiles.cuh"
#include "launch.cuh"
#include "static_switch.h"

namespace adapterkern {
namespace {

// Computes sum [S', R, H] and the column sums, over one slice of the tokens. Grid: feature blocks,
// unit blocks of dW_down = dz^T x and then of G^T = a^T dy, slices. The second kernel applies the
// scaling to dW_up and db_up. Tokens past the slice and padded units or features are zeros.
template <typename Shape, bool kDirect>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    bottleneck_bwd_dw_kernel(const __grid_constant__ BackwardParams params) {
  using Scalar = typename Shape::Scalar;
  constexpr int kUnits = Shape::kUnits, kFeatures = Shape::kFeatures;
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t bottleneck_size = params.bottleneck_size, hidden_size = params.hidden_size;
  const int unit_blocks = static_cast<int>(ceil_div(bottleneck_size, kUnits));
  const int unit_block = static_cast<int>(blockIdx.y);
  const bool is_up = unit_block >= unit_blocks;
  const int first_unit = (is_up ? unit_block - unit_blocks : unit_block) * kUnits;
  const int first_feature = static_cast<int>(blockIdx.x) * kFeatures;
  const int64_t split = blockIdx.z, first = split * params.tokens_per_split;
  const int64_t last = min(first + params.tokens_per_split, params.num_tokens);

  const View sum = choose(is_up, params.sum_up, params.sum_down);
  const View bias_sum = choose(is_up, params.sum_up_bias, params.sum_down_bias);
  // One row of blocks sums the columns: every unit block sees the same dy, every feature block dz.
  const bool sums_columns =
      bias_sum.data != nullptr && (is_up ? first_unit == 0 : first_feature == 0);
  if (sum.data == nullptr && !sums_columns) return;

  using Features = std::conditional_t<kDirect, TileCopy<Shape, kFeatures, Shape::kStrideF>,
                                      TileConversion<Shape, kFeatures, Shape::kStrideF>>;
  TileCopy<Shape, kUnits, Shape::kStrideU> units(
      {choose(is_up, params.a, params.dz), last, bottleneck_size}, first, first_unit);
  Features features({choose(is_up, params.dy, params.x), last, hidden_size}, first, first_feature);
  const int stages = static_cast<int>(params.token_stages);
  int steps_left = static_cast<int>(ceil_div(last - first, Shape::kTokens)), to_load = steps_left;
  const auto start = [&](int stage) {
    if (to_load > 0) {
      units.start(shared + stage);
      features.start(shared + stage + Shape::kUnitBytes);
    }
    copy_async_commit();  // an empty group keeps the count of pending groups
  };
  const auto finish = [&](int stage) {
    if (to_load-- > 0) features.finish(shared + stage + Shape::kUnitBytes);
  };

  const int warp = threadIdx.x / kWarpSize;
  const int warp_unit = warp / Shape::kWarpsAcross * Shape::kUnitsPerWarp;
  const int warp_feature = warp % Shape::kWarpsAcross * Shape::kFeaturesPerWarp;
  float acc[Shape::kUnitsPerWarp / 16][Shape::kFeaturesPerWarp / 8][4] = {};
  ColumnSums<Shape> column_sums;

  // Stages are counted in bytes of shared memory.
  const int last_stage = (stages - 1) * Shape::kStageBytes;
#pragma unroll 1
  for (int stage = 0; stage < last_stage; stage += Shape::kStageBytes) {
    start(stage);
    finish(stage);
  }
#pragma unroll 1
  for (int stage = 0, free = last_stage; steps_left > 0; --steps_left) {
    if (stages == kManyStages) {
      copy_async_wait<kManyStages - 2>();
    } else {
      copy_async_wait<kFewStages - 2>();
    }
    __syncthreads();  // this step's tiles are there, those of the step before are free
    start(free);
    const auto* unit_tile = reinterpret_cast<const Scalar*>(shared + stage);
    const auto* feature_tile = reinterpret_cast<const Scalar*>(shared + stage + Shape::kUnitBytes);
    multiply_tiles<Shape>(acc, unit_tile + warp_unit, feature_tile + warp_feature);
    if (sums_columns && is_up) {
      column_sums.add(feature_tile, Shape::kStrideF);
    } else if (sums_columns && column_sums.first < kUnits) {
      column_sums.add(unit_tile, Shape::kStrideU);
    }
    finish(free);
    free = stage;
    stage = stage == last_stage ? 0 : stage + Shape::kStageBytes;
  }

  if (sums_columns) {
    const int64_t columns = is_up ? hidden_size : bottleneck_size;
    const int first_column = is_up ? first_feature : first_unit;
    float* to = static_cast<float*>(bias_sum.data) + split * bias_sum.stride + first_column;
    column_sums.for_each([&](int column, float value) {
      const bool exists = column < (is_up ? kFeatures : kUnits) && first_column + column < columns;
      if (exists) to[column] = value;
    });
  }
  if (sum.data != nullptr) {
    store_sums(acc, sum, split, bottleneck_size, first_unit + warp_unit,
               first_feature + warp_feature);
  }
}

// In the second kernel a block owns tiles of kSide units and features, and a thread four elements
// of a tile: four features of one unit, then, in the transposed tile, four units of one feature.
constexpr int kSide = 32, kQuad = 4, kAcross = kSide / kQuad;
constexpr int kSumThreads = kSide * kAcross;
constexpr int kAhead = 16;  // slices whose loads are under way together
// Padded by one element: the tile is written by rows and read by columns.
constexpr int kSumStride = kSide + 1;
constexpr int kSumBytes = kSide * kSumStride * 4;

// total = the sum over the slices, in their order, of n elements of sum [S', rows, ...] from (row,
// column) on. The loads of kAhead slices are issued before the first addition waits for one.
template <int n>
__device__ __forceinline__ void sum_slices(float (&total)[n], const View& sum, int64_t slices,
                                           int64_t rows, int64_t row, int64_t column) {
#pragma unroll
  for (int i = 0; i < n; ++i) total[i] = 0.0f;
  if (sum.data == nullptr || row >= rows || column >= sum.stride) return;
  const float* from = static_cast<const float*>(sum.data) + row * sum.stride + column;
#pragma unroll 1
  for (auto left = static_cast<int>(slices); left > 0; left -= kAhead) {
    float parts[kAhead][n];
#pragma unroll
    for (int slice = 0; slice < kAhead; ++slice) {
#pragma unroll
      for (int i = 0; i < n; ++i) parts[slice][i] = 0.0f;
      if (slice < left) load_whole(parts[slice], from);
      from += rows * sum.stride;
    }
#pragma unroll
    for (int slice = 0; slice < kAhead; ++slice) {
#pragma unroll
      for (int i = 0; i < n; ++i) total[i] += parts[slice][i];
    }
  }
}

// dW_down and db_down, for the tile of the units from `unit` on.
__device__ __forceinline__ void finish_down(const BackwardParams& params, int64_t unit,
                                            int64_t first_feature) {
  const int64_t hidden_size = params.hidden_size, bottleneck_size = params.bottleneck_size;
  const int64_t row = unit + threadIdx.x / kAcross;
  const int64_t feature = first_feature + threadIdx.x % kAcross * kQuad;
  float total[kQuad];
  sum_slices(total, params.sum_down, params.token_splits, bottleneck_size, row, feature);
  store_vector(Matrix{params.d_down_weight, bottleneck_size, hidden_size}, row, feature, total);
  if (first_feature > 0 || threadIdx.x >= kSide) return;
  float bias[1];
  sum_slices(bias, params.sum_down_bias, params.token_splits, 1, 0, unit + threadIdx.x);
  store_vector(as_matrix(params.d_down_bias, bottleneck_size), 0, unit + threadIdx.x, bias);
}

// dW_up of the tile of the units from `unit` on; adds the tile's part of sum_r G[h, r] W_up[h, r]
// to d_scaling.
__device__ __forceinline__ void finish_up(const BackwardParams& params, float* tile, int64_t unit,
                                          int64_t first_feature, float factor, float& d_scaling) {
  const int64_t hidden_size = params.hidden_size, bottleneck_size = params.bottleneck_size;
  const int line = threadIdx.x / kAcross, quad = threadIdx.x % kAcross * kQuad;
  float g[kQuad];
  sum_slices(g, params.sum_up, params.token_splits, bottleneck_size, unit + line,
             first_feature + quad);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) tile[line * kSumStride + quad + i] = g[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuad; ++i) g[i] = tile[(quad + i) * kSumStride + line];
  if (params.d_scaling.data != nullptr) {
    float weight[kQuad];
    load_vector(weight, Matrix{params.up_weight, hidden_size, bottleneck_size},
                first_feature + line, unit + quad);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) d_scaling += g[i] * weight[i];
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) g[i] *= factor;
  store_vector(Matrix{params.d_up_weight, hidden_size, bottleneck_size}, first_feature + line,
               unit + quad, g);
  __syncthreads();  // before the next sums take the place of these
}

// Computes the gradients from the partial sums. Grid: feature blocks, unit blocks, 2 for those of
// the down- and the up-projection; one unit block if d(scaling)[h] = sum_r G[h, r] W_up[h, r] +
// b_up[h] sum_t dy[t, h], equation (13), is needed. The bound of two blocks an SM lets the loads
// have the registers that they need; without it the compiler issues eleven at once to fit in a
// third.
__global__ void __launch_bounds__(kSumThreads, 2)
    bottleneck_bwd_dw_sum_kernel(const __grid_constant__ BackwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t hidden_size = params.hidden_size, bottleneck_size = params.bottleneck_size;
  const int64_t first_feature = static_cast<int64_t>(blockIdx.x) * kSide;
  const int64_t units_apart = static_cast<int64_t>(gridDim.y) * kSide;
  if (blockIdx.z == 0) {
    for (int64_t unit = blockIdx.y * kSide; unit < bottleneck_size; unit += units_apart) {
      finish_down(params, unit, first_feature);
    }
    return;
  }
  const int64_t feature = first_feature + threadIdx.x / kAcross;
  const Scaling scaling = scaling_of(params);
  float factor[1], d_scaling = 0.0f;
  scaling.load(factor, feature);
  for (int64_t unit = blockIdx.y * kSide; unit < bottleneck_size; unit += units_apart) {
    finish_up(params, reinterpret_cast<float*>(shared), unit, first_feature, factor[0], d_scaling);
  }
  if (blockIdx.y > 0) return;
  for (int mask = kAcross / 2; mask > 0; mask /= 2) {
    d_scaling += __shfl_xor_sync(0xFFFFFFFF, d_scaling, mask);
  }
  if (threadIdx.x % kAcross != 0) return;
  float bias[1], up_bias[1];
  sum_slices(bias, params.sum_up_bias, params.token_splits, 1, 0, feature);
  load_vector(up_bias, as_matrix(params.up_bias, hidden_size), 0, feature);
  const float with_bias[1] = {d_scaling + bias[0] * up_bias[0]};
  store_vector(as_matrix(params.d_scaling, hidden_size), 0, feature, with_bias);
  bias[0] *= factor[0];
  store_vector(as_matrix(params.d_up_bias, hidden_size), 0, feature, bias);
}

// Whether rows can be copied by cp.async, Matrix::is_direct on the host, or are absent: of those no
// byte is read, and the tile is zeros.
template <typename Scalar>
bool is_copied(const View& view) {
  if (view.data == nullptr) return true;
  return view.dtype == kDTypeOf<Scalar> && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         view.stride * static_cast<int64_t>(sizeof(Scalar)) % 16 == 0;
}

template <typename Shape>
cudaError_t launch_sums(const BackwardParams& params, cudaStream_t stream) {
  using Scalar = typename Shape::Scalar;
  const int64_t stages = params.token_stages;
  if (stages != kManyStages && stages != kFewStages) return cudaErrorInvalidValue;
  if (!is_copied<Scalar>(params.dz) || !is_copied<Scalar>(params.a)) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.hidden_size, Shape::kFeatures)),
                  static_cast<unsigned>(2 * ceil_div(params.bottleneck_size, Shape::kUnits)),
                  static_cast<unsigned>(params.token_splits));
  const bool direct = is_copied<Scalar>(params.x) && is_copied<Scalar>(params.dy);
  return launch(
      direct ? bottleneck_bwd_dw_kernel<Shape, true> : bottleneck_bwd_dw_kernel<Shape, false>, grid,
      Shape::kThreads, static_cast<int>(stages) * Shape::kStageBytes, params, stream);
}

// Calls body(Type<the narrowest shape that holds R, or the widest>()).
template <typename Scalar, typename Body>
cudaError_t switch_gradient_shape(int64_t bottleneck_size, Body body) {
  using Narrow = NarrowGradientShape<Scalar>;
  if (bottleneck_size <= Narrow::kUnits) return body(Type<Narrow>());
  return body(Type<WideGradientShape<Scalar>>());
}

}  // namespace

cudaError_t launch_weight_gradients(const BackwardParams& params, cudaStream_t stream) {
  const cudaError_t error = switch_dtype(params.compute_dtype, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    return switch_gradient_shape<Scalar>(params.bottleneck_size, [&](auto shape) {
      return launch_sums<typename decltype(shape)::type>(params, stream);
    });
  });
  if (error != cudaSuccess) return error;
  const int64_t unit_blocks =
      params.d_scaling.data != nullptr ? 1 : ceil_div(params.bottleneck_size, kSide);
  const dim3 grid(static_cast<unsigned>(ceil_div(params.hidden_size, kSide)),
                  static_cast<unsigned>(unit_blocks), 2);
  return launch(bottleneck_bwd_dw_sum_kernel, grid, kSumThreads, kSumBytes, params, stream);
}

}  // namespace adapterkern
