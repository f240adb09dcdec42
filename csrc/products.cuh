// Products of tiles in shared memory, one warp each, in half precision, TF32 and full float32.
#pragma once

#include <type_traits>

#include "tiles.cuh"

namespace adapterkern {

// acc [16, 8 kTiles] += a b, the product of one warp over kDepth, in the layout of mma.sync for all
// dtypes. `a` is a tile [16, kDepth], or its transpose; `b` a tile [kDepth, 8 kTiles], or its
// transpose; strides in elements. The b of mma.sync is the transpose of an nn.Linear weight.
template <int kDepth, bool kTransposedA, bool kTransposedB, int kTiles, typename Half>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const Half* a, int stride_a,
                                         const Half* b, int stride_b) {
  static_assert(kTiles % 2 == 0, "tiles are loaded in pairs");
  const int lane = threadIdx.x % kWarpSize;
  const int in_matrix = lane % 8, low = lane / 8 % 2, high = lane / 16;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t fragment_a[4];
    if (kTransposedA) {
      load_matrices_transposed(fragment_a, a + (k + 8 * high + in_matrix) * stride_a + 8 * low);
    } else {
      load_matrices(fragment_a, a + (8 * low + in_matrix) * stride_a + k + 8 * high);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t fragment_b[4];
      if (kTransposedB) {
        load_matrices(fragment_b, b + (8 * (tile + high) + in_matrix) * stride_b + k + 8 * low);
      } else {
        load_matrices_transposed(fragment_b,
                                 b + (k + 8 * low + in_matrix) * stride_b + 8 * (tile + high));
      }
      mma_16x8x16(acc[tile], fragment_a, fragment_b[0], fragment_b[1], Half());
      mma_16x8x16(acc[tile + 1], fragment_a, fragment_b[2], fragment_b[3], Half());
    }
  }
}

// float32 runs in full precision on the CUDA cores. Each step adds the sum of eight products
// to the accumulator: the chain of additions is eight times shorter, its rounding error smaller.
template <int kDepth, bool kTransposedA, bool kTransposedB, int kTiles>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const float* a, int stride_a,
                                         const float* b, int stride_b) {
  constexpr int kStep = 8;
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll 1  // an unrolled tile would not fit the instruction cache
  for (int k = 0; k < kDepth; k += kStep) {
    float rows[2][kStep];  // row and row + 8 of a
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kTransposedA) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) rows[half][i] = a[(k + i) * stride_a + row + 8 * half];
      } else {
        load_whole(rows[half], a + (row + 8 * half) * stride_a + k);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float columns[2][kStep];  // column and column + 1 of b
      if (kTransposedB) {
        load_whole(columns[0], b + (8 * tile + column) * stride_b + k);
        load_whole(columns[1], b + (8 * tile + column + 1) * stride_b + k);
      } else {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          float pair[2];
          load_whole(pair, b + (k + i) * stride_b + 8 * tile + column);
          columns[0][i] = pair[0];
          columns[1][i] = pair[1];
        }
      }
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float sum = rows[part / 2][0] * columns[part % 2][0];
#pragma unroll
        for (int i = 1; i < kStep; ++i) sum += rows[part / 2][i] * columns[part % 2][i];
        acc[tile][part] += sum;
      }
    }
  }
}

// float32 in TF32. ldmatrix has no form for 32-bit elements, so they are loaded one by one.
template <int kDepth, bool kTransposedA, bool kTransposedB, int kTiles>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const TFloat32* a, int stride_a,
                                         const TFloat32* b, int stride_b) {
  const int lane = threadIdx.x % kWarpSize;
  const int group = lane / 4, in_group = lane % 4;
#pragma unroll 2
  for (int k = 0; k < kDepth; k += 8) {
    uint32_t fragment_a[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = group + part % 2 * 8, depth = k + in_group + part / 2 * 4;
      fragment_a[part] =
          to_tf32(a[kTransposedA ? depth * stride_a + row : row * stride_a + depth].value);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t fragment_b[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int depth = k + in_group + part * 4, column = 8 * tile + group;
        fragment_b[part] =
            to_tf32(b[kTransposedB ? column * stride_b + depth : depth * stride_b + column].value);
      }
      mma_16x8x8(acc[tile], fragment_a, fragment_b[0], fragment_b[1]);
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&acc)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[tile][i] = 0.0f;
  }
}

// Stores one warp's product as rows of shared memory, from which it is read back in vectors.
template <int kTiles>
__device__ __forceinline__ void store_product(float* to, int stride,
                                              const float (&acc)[kTiles][4]) {
  const int lane = threadIdx.x % kWarpSize;
  float* upper = to + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float pair[2] = {acc[tile][2 * half], acc[tile][2 * half + 1]};
      store_whole(upper + 8 * half * stride + 8 * tile, pair);
    }
  }
}

// The row stride of a warp's staging buffer in hand_out; it shifts rows by 16 bytes in the banks.
template <int kColumns>
constexpr int kRoomStride = kColumns + 4;

// Hands out a warp's product in vectors, through `room`, its staging buffer in shared memory. A
// lane keeps its columns, calls `features(column)` for them once, and for every row calls
// store(is direct, u, row, column, features). If all memory is direct the loop is unrolled, so that
// its loads overlap; the other loop's body holds every dtype and option.
template <int kTiles, typename Features, typename Store>
__device__ __forceinline__ void hand_out(float* room, const float (&acc)[kTiles][4], bool direct,
                                         Features features, Store store) {
  constexpr int kAcross = 8 * kTiles / kVector, kRowsApart = kWarpSize / kAcross;
  constexpr int kStride = kRoomStride<8 * kTiles>;
  const int lane = threadIdx.x % kWarpSize;
  const int first = lane / kAcross, column = lane % kAcross * kVector;
  store_product(room, kStride, acc);
  __syncwarp();
  const auto of_column = features(column);
  const auto step = [&](auto is_direct, int row) {
    float u[kVector];
    load_whole(u, room + row * kStride + column);
    store(is_direct, u, row, column, of_column);
  };
  if (direct) {
#pragma unroll
    for (int i = 0; i < 16; i += kRowsApart) {
      if (kRowsApart <= 16 || first < 16) step(std::true_type(), first + i);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < 16; row += kRowsApart) step(std::false_type(), row);
  }
  __syncwarp();  // before the next product overwrites what other lanes read here
}

}  // namespace adapterkern
