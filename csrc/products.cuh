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

// Stores kCount of the tiles of a warp's product, from `first` on, as rows of shared memory, from
// which they are read back in vectors.
template <int kCount, int kTiles>
__device__ __forceinline__ void store_tiles(float* to, int stride, const float (&acc)[kTiles][4],
                                            int first) {
  const int lane = threadIdx.x % kWarpSize;
  float* upper = to + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kCount; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float pair[2] = {acc[first + tile][2 * half], acc[first + tile][2 * half + 1]};
      store_whole(upper + 8 * half * stride + 8 * tile, pair);
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void store_product(float* to, int stride,
                                              const float (&acc)[kTiles][4]) {
  store_tiles<kTiles>(to, stride, acc, 0);
}

// A warp's product leaves it in chunks of so many columns, through a room in shared memory whose
// rows are shifted by 16 bytes in the banks.
__host__ __device__ constexpr int chunk_of(int columns) { return smaller(columns, 32); }
__host__ __device__ constexpr int room_stride(int columns) { return chunk_of(columns) + 4; }
template <int kColumns>
__host__ __device__ constexpr int room_bytes() {
  return 16 * room_stride(kColumns) * 4;
}

// The vectors of a chunk [16, kChunk] that one lane owns: it keeps its columns.
template <int kChunk>
struct LaneRows {
  static constexpr int kAcross = kChunk / kVector, kRowsApart = kWarpSize / kAcross;
  static constexpr int kCount = larger(16 / kRowsApart, 1);
  int first, column;  // the first row, and the first column of the vectors
  const float* room;

  __device__ __forceinline__ explicit LaneRows(const float* room)
      : first(threadIdx.x % kWarpSize / kAcross),
        column(threadIdx.x % kWarpSize % kAcross * kVector),
        room(room + column) {}

  // Calls body(i, row, where its vector of the product is) for the i-th vector.
  template <typename Body>
  __device__ __forceinline__ void for_each_unrolled(Body body) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first + i * kRowsApart;
      if (kRowsApart <= 16 || row < 16) body(i, row, room + row * room_stride(kChunk));
    }
  }

  // Calls body(row, where its vector of the product is).
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll 1
    for (int row = first; row < 16; row += kRowsApart) body(row, room + row * room_stride(kChunk));
  }
};

// Hands out a warp's product in vectors: calls body(the lane's rows, the first column of its
// vectors) for every chunk, while the chunk is in `room`.
template <int kTiles, typename Body>
__device__ __forceinline__ void hand_out(float* room, const float (&acc)[kTiles][4], Body body) {
  constexpr int kChunk = chunk_of(8 * kTiles);
#pragma unroll
  for (int first = 0; first < 8 * kTiles; first += kChunk) {
    store_tiles<kChunk / 8>(room, room_stride(kChunk), acc, first / 8);
    __syncwarp();
    const LaneRows<kChunk> rows(room);
    body(rows, first + rows.column);
    __syncwarp();  // before the next chunk overwrites what other lanes read here
  }
}

}  // namespace adapterkern
