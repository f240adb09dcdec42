// Weight, bias and scaling gradients, equations (6) to (8) and (10), (11), (13) of docs/math.md, as
// partial sums over slices of the tokens, added in the order of the slices: repeated runs give the
// same bits.
#include "weight_gradients.h"

#include "launch.cuh"
#include "products.cuh"
#include "static_switch.h"

namespace adapterkern {
namespace {

// A block accumulates one tile [kUnits, kFeatures], kTokens at a time. Its four warps divide the
// units, or the features if there are only 16 units.
template <typename ScalarT, int kUnitsT>
struct GradientShape {
  using Scalar = ScalarT;
  static constexpr int kUnits = kUnitsT;
  static constexpr int kFeatures = kUnits == 16 ? 128 : 64;
  static constexpr int kTokens = 32;
  static constexpr int kStages = sizeof(Scalar) == 2 ? 3 : 2;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlocksPerSm = sizeof(Scalar) == 2 ? 4 : 2;  // as in row_block.cuh
  static constexpr int kWarpsAcross = kUnits == 16 ? 4 : 1;
  static constexpr int kFeaturesPerWarp = kFeatures / kWarpsAcross;

  static constexpr int kStrideU = kUnits + kPadding<Scalar>;
  static constexpr int kStrideF = kFeatures + kPadding<Scalar>;
  static constexpr int kUnitBytes = tile_bytes<Scalar>(kTokens, kUnits);
  static constexpr int kStageBytes = kUnitBytes + tile_bytes<Scalar>(kTokens, kFeatures);
  static constexpr int kSharedBytes = larger(kStages * kStageBytes, kUnits * kFeatures * 4);
};

// The sum over a column of a tile [kTokens, ...] in shared memory.
template <int kTokens, typename Scalar>
__device__ __forceinline__ float sum_column(const Scalar* column, int stride) {
  float sum = 0.0f;
#pragma unroll
  for (int token = 0; token < kTokens; ++token) sum += to_float(column[token * stride]);
  return sum;
}

// Computes sum [S', R, H] and the column sums, over one slice of the tokens. Grid: feature blocks,
// unit blocks of dW_down = dz^T x and then of G^T = a^T dy, slices. The second kernel applies the
// scaling to dW_up and db_up. Tokens past the slice vanish because x and dy load as zero.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_bwd_dw_kernel(const __grid_constant__ BackwardParams params) {
  using Scalar = typename Shape::Scalar;
  constexpr int kThreads = Shape::kThreads, kTokens = Shape::kTokens;
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t bottleneck_size = params.bottleneck_size, hidden_size = params.hidden_size;
  const int64_t unit_blocks = ceil_div(bottleneck_size, Shape::kUnits);
  const bool is_up = blockIdx.y >= unit_blocks;
  const int64_t first_unit = blockIdx.y % unit_blocks * Shape::kUnits;
  const int64_t first_feature = static_cast<int64_t>(blockIdx.x) * Shape::kFeatures;
  const int64_t split = blockIdx.z, first = split * params.tokens_per_split;
  const int64_t last = min(first + params.tokens_per_split, params.num_tokens);

  const View& sum = is_up ? params.sum_up : params.sum_down;
  const View& bias_sum = is_up ? params.sum_up_bias : params.sum_down_bias;
  // One row of blocks sums the columns: every unit block sees the same dy, every feature block dz.
  const bool sums_columns =
      bias_sum.data != nullptr && (is_up ? first_unit == 0 : first_feature == 0);
  if (sum.data == nullptr && !sums_columns) return;

  const Matrix left{is_up ? params.a : params.dz, last, bottleneck_size};  // [T, R]
  const Matrix right{is_up ? params.dy : params.x, last, hidden_size};     // [T, H]
  const auto left_tile = [&](int slot) {
    return reinterpret_cast<Scalar*>(shared + slot * Shape::kStageBytes);
  };
  const auto right_tile = [&](int slot) {
    return reinterpret_cast<Scalar*>(shared + slot * Shape::kStageBytes + Shape::kUnitBytes);
  };
  const auto load = [&](int step, int slot) {
    const int64_t token = first + static_cast<int64_t>(step) * kTokens;
    load_tile<kTokens, Shape::kUnits, kThreads>(left_tile(slot), left, token, first_unit,
                                                Unchanged());
    load_tile<kTokens, Shape::kFeatures, kThreads>(right_tile(slot), right, token, first_feature,
                                                   Unchanged());
  };

  const int thread = threadIdx.x, warp = thread / kWarpSize;
  const int warp_unit = warp / Shape::kWarpsAcross * 16;
  const int warp_feature = warp % Shape::kWarpsAcross * Shape::kFeaturesPerWarp;
  const int columns = is_up ? Shape::kFeatures : Shape::kUnits;
  float column_sum = 0.0f;
  float acc[Shape::kFeaturesPerWarp / 8][4];
  clear(acc);
  const auto compute = [&](int, int slot) {
    multiply<kTokens, true, false>(acc, left_tile(slot) + warp_unit, Shape::kStrideU,
                                   right_tile(slot) + warp_feature, Shape::kStrideF);
    if (sums_columns && thread < columns) {
      column_sum += is_up ? sum_column<kTokens>(right_tile(slot) + thread, Shape::kStrideF)
                          : sum_column<kTokens>(left_tile(slot) + thread, Shape::kStrideU);
    }
  };
  pipeline<Shape::kStages>(static_cast<int>(ceil_div(last - first, kTokens)), load, compute);

  if (sums_columns && thread < columns) {
    const Matrix out{bias_sum, params.token_splits, is_up ? hidden_size : bottleneck_size};
    const float value[1] = {column_sum};
    store_vector(out, split, (is_up ? first_feature : first_unit) + thread, value);
  }
  if (sum.data == nullptr) return;
  float* sums = reinterpret_cast<float*>(shared);
  __syncthreads();  // the sums take the place of tiles that other warps may still read
  store_product(sums + warp_unit * Shape::kFeatures + warp_feature, Shape::kFeatures, acc);
  __syncthreads();
  Matrix out{sum, bottleneck_size, hidden_size};
  out.view.data = static_cast<float*>(sum.data) + split * bottleneck_size * hidden_size;
  for_each_vector<Shape::kUnits, Shape::kFeatures, kThreads>(
      threadIdx.x, [&](int unit, int feature) {
        float v[kVector];
        load_whole(v, sums + unit * Shape::kFeatures + feature);
        store_vector(out, first_unit + unit, first_feature + feature, v);
      });
}

// In the second kernel a block owns kSide features, and a thread kPerThread elements of each tile.
constexpr int kSide = 32;
constexpr int kSumThreads = 256;
constexpr int kSumRows = kSumThreads / kSide;
constexpr int kPerThread = kSide / kSumRows;
// Padded by one element: the tile is written by rows and read by columns.
constexpr int kSumBytes = kSide * (kSide + 1) * 4;

__device__ __forceinline__ float load_one(const Matrix& matrix, int64_t row, int64_t column) {
  float one[1];
  load_vector(one, matrix, row, column);
  return one[0];
}

__device__ __forceinline__ void store_one(const Matrix& matrix, int64_t row, int64_t column,
                                          float value) {
  const float one[1] = {value};
  store_vector(matrix, row, column, one);
}

// The sum over the slices, in their order, of sum [S', rows, columns] at (row, column).
__device__ __forceinline__ float sum_slices(const View& sum, int64_t slices, int64_t rows,
                                            int64_t columns, int64_t row, int64_t column) {
  if (sum.data == nullptr || row >= rows || column >= columns) return 0.0f;
  const float* from = static_cast<const float*>(sum.data) + row * columns + column;
  float total = 0.0f;
  for (int64_t slice = 0; slice < slices; ++slice) total += from[slice * rows * columns];
  return total;
}

// Computes the gradients from the partial sums. Grid: feature blocks, unit blocks; one of these if
// d(scaling)[h] = sum_r G[h, r] W_up[h, r] + b_up[h] sum_t dy[t, h], equation (13), is needed.
__global__ void __launch_bounds__(kSumThreads)
    bottleneck_bwd_dw_sum_kernel(const __grid_constant__ BackwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  float* const tile = reinterpret_cast<float*>(shared);
  const int64_t hidden_size = params.hidden_size, bottleneck_size = params.bottleneck_size;
  const int64_t slices = params.token_splits;
  const int lane = threadIdx.x % kSide, line = threadIdx.x / kSide;
  const int64_t first_feature = static_cast<int64_t>(blockIdx.x) * kSide;
  const int64_t units = ceil_div(ceil_div(bottleneck_size, gridDim.y), kSide) * kSide;
  const int64_t first_unit = blockIdx.y * units;
  const int64_t last_unit = min(first_unit + units, bottleneck_size);
  const Scaling scaling = scaling_of(params);
  const Matrix d_down{params.d_down_weight, bottleneck_size, hidden_size};
  const Matrix d_up{params.d_up_weight, hidden_size, bottleneck_size};
  const Matrix up_weight{params.up_weight, hidden_size, bottleneck_size};

  float d_scaling[kPerThread] = {};
  for (int64_t unit = first_unit; unit < last_unit; unit += kSide) {
    for (int i = 0; i < kPerThread; ++i) {  // a warp owns a unit: rows of the sums are contiguous
      const int64_t row = unit + line + i * kSumRows, feature = first_feature + lane;
      store_one(d_down, row, feature,
                sum_slices(params.sum_down, slices, bottleneck_size, hidden_size, row, feature));
      tile[(line + i * kSumRows) * (kSide + 1) + lane] =
          sum_slices(params.sum_up, slices, bottleneck_size, hidden_size, row, feature);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {  // a warp owns a feature: so are rows of W_up
      const int64_t feature = first_feature + line + i * kSumRows;
      float g[1] = {tile[lane * (kSide + 1) + line + i * kSumRows]};
      if (params.d_scaling.data != nullptr) {
        d_scaling[i] += g[0] * load_one(up_weight, feature, unit + lane);
      }
      scaling.multiply(g, feature);
      store_one(d_up, feature, unit + lane, g[0]);
    }
    __syncthreads();
    if (blockIdx.x == 0 && line == 0) {
      store_one(as_matrix(params.d_down_bias, bottleneck_size), 0, unit + lane,
                sum_slices(params.sum_down_bias, slices, 1, bottleneck_size, 0, unit + lane));
    }
  }
  if (blockIdx.y > 0) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t feature = first_feature + line + i * kSumRows;
    for (int mask = kSide / 2; mask > 0; mask /= 2) {
      d_scaling[i] += __shfl_xor_sync(0xFFFFFFFF, d_scaling[i], mask);
    }
    if (lane != 0) continue;
    float total[1] = {sum_slices(params.sum_up_bias, slices, 1, hidden_size, 0, feature)};
    const float with_bias =
        d_scaling[i] + total[0] * load_one(as_matrix(params.up_bias, hidden_size), 0, feature);
    store_one(as_matrix(params.d_scaling, hidden_size), 0, feature, with_bias);
    scaling.multiply(total, feature);
    store_one(as_matrix(params.d_up_bias, hidden_size), 0, feature, total[0]);
  }
}

template <typename Shape>
cudaError_t launch_sums(const BackwardParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.hidden_size, Shape::kFeatures)),
                  static_cast<unsigned>(2 * ceil_div(params.bottleneck_size, Shape::kUnits)),
                  static_cast<unsigned>(params.token_splits));
  return launch(bottleneck_bwd_dw_kernel<Shape>, grid, Shape::kThreads, Shape::kSharedBytes, params,
                stream);
}

}  // namespace

cudaError_t launch_weight_gradients(const BackwardParams& params, cudaStream_t stream) {
  const cudaError_t error = switch_dtype(params.compute_dtype, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    return params.bottleneck_size <= 16 ? launch_sums<GradientShape<Scalar, 16>>(params, stream)
                                        : launch_sums<GradientShape<Scalar, 64>>(params, stream);
  });
  if (error != cudaSuccess) return error;
  const int64_t unit_blocks =
      params.d_scaling.data != nullptr ? 1 : ceil_div(params.bottleneck_size, kSide);
  const dim3 grid(static_cast<unsigned>(ceil_div(params.hidden_size, kSide)),
                  static_cast<unsigned>(unit_blocks));
  return launch(bottleneck_bwd_dw_sum_kernel, grid, kSumThreads, kSumBytes, params, stream);
}

}  // namespace adapterkern
