// The tiles of the weight gradients: their sizes, how they reach shared memory, their product,
// their column sums.
#pragma once

#include <type_traits>

#include "products.cuh"

namespace adapterkern {

// A block accumulates one tile [kUnits, kFeatures] of dW_down or of G^T, kTokens at a time. It is
// the only block of its SM: the fewer blocks, the fewer partial sums, and the tiles under way, not
// the number of warps, hide the latency of memory. x and dy are read once for every kUnits units,
// dz and a once for every kFeatures features.
template <typename ScalarT, int kUnitsT>
struct GradientShape {
  using Scalar = ScalarT;
  static constexpr bool kHalf = sizeof(Scalar) == 2;
  static constexpr int kUnits = kUnitsT, kFeatures = kHalf ? 256 : 128, kTokens = 32;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

  // In half precision each fragment of x or dy serves 64 units; with 16, the loads of fragments
  // from shared memory would take as long as those of x from global memory.
  static constexpr int kUnitsPerWarp = kHalf ? 64 : 16;
  static constexpr int kWarpsAcross = kWarps * kUnitsPerWarp / kUnits;
  static constexpr int kFeaturesPerWarp = kFeatures / kWarpsAcross;

  // The padding puts the rows of a fragment into different banks.
  static constexpr int kStrideU = kUnits + 8, kStrideF = kFeatures + 8;
  static constexpr int kUnitBytes = kTokens * kStrideU * static_cast<int>(sizeof(Scalar));
  static constexpr int kStageBytes =
      kUnitBytes + kTokens * kStrideF * static_cast<int>(sizeof(Scalar));
};

// The two that are compiled for each dtype. A wider bottleneck takes several tiles.
template <typename Scalar>
using NarrowGradientShape = GradientShape<Scalar, sizeof(Scalar) == 2 ? 64 : 16>;
template <typename Scalar>
using WideGradientShape = GradientShape<Scalar, sizeof(Scalar) == 2 ? 128 : 64>;

// The numbers of stages that the kernel can wait for: all but the one in use are under way. Python
// chooses by the shared memory of the device, in launch_config.py.
constexpr int kManyStages = 6, kFewStages = 3;

// Copies tiles [kTokens, kColumns] of a matrix, one step of the tokens after the other, by
// cp.async. A thread keeps its columns, and its address moves along.
template <typename Shape, int kColumns, int kStride>
struct TileCopy {
  using Scalar = typename Shape::Scalar;
  static constexpr int kPer = 16 / sizeof(Scalar), kAcross = kColumns / kPer;
  static constexpr int kRowsApart = Shape::kThreads / kAcross;
  const Scalar* from;
  int64_t stride;
  int bytes, row, column, rows_left;

  __device__ __forceinline__ TileCopy(const Matrix& matrix, int64_t first_row, int64_t first_column)
      : stride(matrix.view.stride),
        row(threadIdx.x / kAcross),
        column(threadIdx.x % kAcross * kPer),
        rows_left(static_cast<int>(matrix.rows - first_row)) {
    from = matrix.at<Scalar>(first_row + row, first_column + column);
    bytes = matrix.count(first_row, first_column + column, kPer) * static_cast<int>(sizeof(Scalar));
  }

  __device__ __forceinline__ void start(unsigned char* tile) {
    Scalar* to = reinterpret_cast<Scalar*>(tile) + row * kStride + column;
#pragma unroll
    for (int i = 0; i < ceil_div(Shape::kTokens, kRowsApart); ++i) {
      if (kRowsApart > Shape::kTokens && row >= Shape::kTokens) break;
      copy_async_16(to + i * kRowsApart * kStride, from + i * kRowsApart * stride,
                    row + i * kRowsApart < rows_left ? bytes : 0);
    }
    from += Shape::kTokens * stride;
    rows_left -= Shape::kTokens;
  }

  __device__ __forceinline__ void finish(unsigned char*) const {}
};

// Does the same for rows of another dtype or at odd addresses, through registers: `start` loads,
// and `finish` converts and stores, with the products of a step between the two.
template <typename Shape, int kColumns, int kStride>
struct TileConversion {
  static constexpr int kAcross = kColumns / kVector, kRowsApart = Shape::kThreads / kAcross;
  static constexpr int kVectors = Shape::kTokens / kRowsApart;
  Matrix matrix;
  int64_t first_row, first_column;
  int row, column;
  bool whole;  // vectors of float32, as in a residual stream beside half-precision products
  float v[kVectors][kVector];

  __device__ __forceinline__ TileConversion(const Matrix& matrix, int64_t first_row,
                                            int64_t first_column)
      : matrix(matrix),
        first_row(first_row),
        first_column(first_column),
        row(threadIdx.x / kAcross),
        column(threadIdx.x % kAcross * kVector),
        whole(matrix.is_direct<float>() && matrix.columns % kVector == 0) {}

  __device__ __forceinline__ void start(unsigned char*) {
    if (whole) {  // one branch a tile, for its loads to be under way together
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = first_row + row + i * kRowsApart;
#pragma unroll
        for (int j = 0; j < kVector; ++j) v[i][j] = 0.0f;
        if (at >= matrix.rows || first_column + column >= matrix.columns) continue;
        load_whole(v[i], matrix.at<float>(at, first_column + column));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        load_vector(v[i], matrix, first_row + row + i * kRowsApart, first_column + column);
      }
    }
    first_row += Shape::kTokens;
  }

  __device__ __forceinline__ void finish(unsigned char* tile) const {
    using Scalar = typename Shape::Scalar;
    Scalar* to = reinterpret_cast<Scalar*>(tile) + row * kStride + column;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) store_whole(to + i * kRowsApart * kStride, v[i]);
  }
};

// acc [16 kRowTiles, 8 kTiles] += a^T b over kTokens, the product of one warp.
template <typename Shape, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_tiles(float (&acc)[kRowTiles][kTiles][4],
                                               const typename Shape::Scalar* a,
                                               const typename Shape::Scalar* b) {
  using Scalar = typename Shape::Scalar;
  if constexpr (Shape::kHalf) {
    const int lane = threadIdx.x % kWarpSize;
    const int in_matrix = lane % 8, low = lane / 8 % 2, high = lane / 16;
#pragma unroll
    for (int k = 0; k < Shape::kTokens; k += 16) {
      uint32_t fragment_a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrices_transposed(
            fragment_a[i], a + (k + 8 * high + in_matrix) * Shape::kStrideU + 16 * i + 8 * low);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t fragment_b[4];
        load_matrices_transposed(
            fragment_b, b + (k + 8 * low + in_matrix) * Shape::kStrideF + 8 * (tile + high));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_16x8x16(acc[i][tile], fragment_a[i], fragment_b[0], fragment_b[1], Scalar());
          mma_16x8x16(acc[i][tile + 1], fragment_a[i], fragment_b[2], fragment_b[3], Scalar());
        }
      }
    }
  } else {
    static_assert(kRowTiles == 1, "float32 has no fragments that rows could share");
    multiply<Shape::kTokens, true, false>(acc[0], a, Shape::kStrideU, b, Shape::kStrideF);
  }
}

// The sums over the tokens of a tile's columns, each warp those of kColumns. In half precision they
// are the product of 16 rows of ones with the tile; float32 and TF32 add whole float32 values.
template <typename Shape>
struct ColumnSums {
  using Scalar = typename Shape::Scalar;
  static constexpr int kColumns = Shape::kFeatures / Shape::kWarps;
  const int lane = threadIdx.x % kWarpSize, first = threadIdx.x / kWarpSize * kColumns;
  float sums[Shape::kHalf ? kColumns / 8 : 1][4] = {};

  __device__ __forceinline__ void add(const Scalar* tile, int stride) {
    if constexpr (Shape::kHalf) {
      constexpr uint32_t kPair = std::is_same_v<Scalar, __half> ? 0x3C003C00 : 0x3F803F80;
      const uint32_t ones[4] = {kPair, kPair, kPair, kPair};
#pragma unroll
      for (int k = 0; k < Shape::kTokens; k += 16) {
#pragma unroll
        for (int column = 0; column < kColumns; column += 16) {
          uint32_t fragment[4];
          load_matrices_transposed(
              fragment, tile + (k + lane % 16) * stride + first + column + lane / 16 * 8);
          mma_16x8x16(sums[column / 8], ones, fragment[0], fragment[1], Scalar());
          mma_16x8x16(sums[column / 8 + 1], ones, fragment[2], fragment[3], Scalar());
        }
      }
    } else if (lane < kColumns) {
      float sum = 0.0f;  // of one step: a shorter chain of additions rounds less
#pragma unroll
      for (int token = 0; token < Shape::kTokens; ++token) {
        sum += to_float(tile[token * stride + first + lane]);
      }
      sums[0][0] += sum;
    }
  }

  // Calls body(column, sum) for every column of the tile that this thread holds.
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
    if constexpr (Shape::kHalf) {
      if (lane >= 4) return;  // all rows of the product are the same
#pragma unroll
      for (int tile = 0; tile < kColumns / 8; ++tile) {
        body(first + 8 * tile + 2 * lane, sums[tile][0]);
        body(first + 8 * tile + 2 * lane + 1, sums[tile][1]);
      }
    } else if (lane < kColumns) {
      body(first + lane, sums[0][0]);
    }
  }
};

// Stores a warp's part of the tile at (unit, feature) of sum [S', R, H], whose rows are whole tiles
// of eight features. Four lanes write the 32 bytes of a sector.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void store_sums(const float (&acc)[kRowTiles][kTiles][4],
                                           const View& sum, int64_t split, int64_t bottleneck_size,
                                           int unit, int feature) {
  const int lane = threadIdx.x % kWarpSize;
  const int rows = static_cast<int>(bottleneck_size) - unit - lane / 4;
  const int columns = static_cast<int>(sum.stride) - feature;
  float* to = static_cast<float*>(sum.data) +
              (split * bottleneck_size + unit + lane / 4) * sum.stride + feature + lane % 4 * 2;
#pragma unroll
  for (int row = 0; row < 16 * kRowTiles; row += 8) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (row >= rows || 8 * tile >= columns) continue;
      const float* pair = acc[row / 16][tile] + row / 8 % 2 * 2;
      const uint32_t words[2] = {bits_as<uint32_t>(pair[0]), bits_as<uint32_t>(pair[1])};
      store_global(to + 8 * tile, words);
    }
    to += 8 * sum.stride;
  }
}

}  // namespace adapterkern
