// Tiles in shared memory.
#pragma once

#include "memory.cuh"

namespace adapterkern {

// Leaves vectors unchanged on their way into a tile; an active transform rules out cp.async.
struct Unchanged {
  __device__ __forceinline__ bool is_active() const { return false; }
  template <int n>
  __device__ __forceinline__ void operator()(float (&)[n], int64_t) const {}
};

// Tiles have 16 bytes of padding a row: without it the eight rows of an 8 x 8 matrix would start in
// the same shared memory bank.
template <typename Scalar>
constexpr int kPadding = 16 / sizeof(Scalar);

template <typename Scalar>
__host__ __device__ constexpr int tile_bytes(int rows, int columns) {
  return rows * (columns + kPadding<Scalar>)*static_cast<int>(sizeof(Scalar));
}

// load_tile for a direct matrix. A thread keeps its columns, so all but the row is computed once.
template <int kRows, int kColumns, int kThreads, typename Scalar>
__device__ __forceinline__ void copy_tile(Scalar* tile, const Matrix& matrix, int64_t first_row,
                                          int64_t first_column) {
  constexpr int kPer = 16 / sizeof(Scalar), kAcross = kColumns / kPer;
  constexpr int kStride = kColumns + kPadding<Scalar>;
  static_assert(kThreads % kAcross == 0, "a thread would change its columns");
  constexpr int kRowsApart = kThreads / kAcross;
  const int first = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kPer;
  const auto rows = static_cast<int>(min(matrix.rows - first_row, int64_t{kRows}));
  const int64_t columns = min(matrix.columns - first_column - column, int64_t{kPer});
  const int bytes = columns > 0 ? static_cast<int>(columns * sizeof(Scalar)) : 0;
  const Scalar* from = matrix.at<Scalar>(first_row + first, first_column + column);
  Scalar* to = tile + first * kStride + column;
#pragma unroll
  for (int i = 0; i < ceil_div(kRows, kRowsApart); ++i) {
    const int row = first + i * kRowsApart;
    if (kRows % kRowsApart != 0 && row >= kRows) break;
    copy_async_16(to + i * kRowsApart * kStride, from + i * kRowsApart * matrix.view.stride,
                  row < rows ? bytes : 0);
  }
}

// load_tile through registers, for a matrix that is direct in its own type and whole vectors wide.
template <typename Source, int kRows, int kColumns, int kThreads, typename Scalar,
          typename Transform>
__device__ __forceinline__ void convert_tile(Scalar* tile, const Matrix& matrix, int64_t first_row,
                                             int64_t first_column, Transform transform) {
  constexpr int kPer = 16 / sizeof(Scalar), kAcross = kColumns / kPer;
  constexpr int kStride = kColumns + kPadding<Scalar>;
  constexpr int kRowsApart = kThreads / kAcross;
  const int first = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kPer;
  const bool exists = first_column + column < matrix.columns;
  const auto rows = static_cast<int>(min(matrix.rows - first_row, int64_t{kRows}));
  const Source* from = matrix.at<Source>(first_row + first, first_column + column);
#pragma unroll 4
  for (int row = first; row < kRows; row += kRowsApart) {
    float v[kPer] = {};
    if (exists && row < rows) {
      load_whole(v, from + (row - first) * matrix.view.stride);
      if (transform.is_active()) transform(v, first_column + column);
    }
    store_whole(tile + row * kStride + column, v);
  }
}

// Loads `matrix` from (first_row, first_column) on into a tile of the products' dtype, with zeros
// out of bounds. The common cases come first; the general loop checks every vector.
template <int kRows, int kColumns, int kThreads, typename Scalar, typename Transform>
__device__ __forceinline__ void load_tile(Scalar* tile, const Matrix& matrix, int64_t first_row,
                                          int64_t first_column, Transform transform) {
  constexpr int kPer = 16 / sizeof(Scalar), kAcross = kColumns / kPer;
  if (!transform.is_active() && matrix.is_direct<Scalar>()) {
    return copy_tile<kRows, kColumns, kThreads>(tile, matrix, first_row, first_column);
  }
  if (matrix.columns % kPer == 0) {
    if (matrix.is_direct<Scalar>()) {
      return convert_tile<Scalar, kRows, kColumns, kThreads>(tile, matrix, first_row, first_column,
                                                             transform);
    }
    if (sizeof(Scalar) == 2 && matrix.is_direct<float>()) {  // master weights, mostly
      return convert_tile<float, kRows, kColumns, kThreads>(tile, matrix, first_row, first_column,
                                                            transform);
    }
  }
#pragma unroll 1
  for (int index = threadIdx.x; index < kRows * kAcross; index += kThreads) {
    const int row = index / kAcross, column = index % kAcross * kPer;
    float v[kPer];
    load_vector(v, matrix, first_row + row, first_column + column);
    if (transform.is_active()) transform(v, first_column + column);
    store_whole(tile + row * (kColumns + kPadding<Scalar>)+column, v);
  }
}

// Runs compute(step, slot) for all `steps`, with load(step, slot) kStages - 1 steps ahead of it.
// The one barrier of a step publishes the tiles of this step and frees those of the step before.
template <int kStages, typename Load, typename Compute>
__device__ __forceinline__ void pipeline(int steps, Load load, Compute compute) {
  for (int step = 1 - kStages; step < steps; ++step) {
    if (step >= 0) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
    }
    const int ahead = step + kStages - 1;
    if (ahead < steps) load(ahead, ahead % kStages);
    copy_async_commit();  // an empty group past the end keeps the count of pending groups
    if (step >= 0) compute(step, step % kStages);
  }
}

// Calls body(row, column) for the vectors of a [kRows, kColumns] tile that `thread` of kThreads
// owns. The loop is not unrolled: its body holds every dtype and option.
template <int kRows, int kColumns, int kThreads, typename Body>
__device__ __forceinline__ void for_each_vector(int thread, Body body) {
  constexpr int kAcross = kColumns / kVector;
#pragma unroll 1
  for (int index = thread; index < kRows * kAcross; index += kThreads) {
    body(index / kAcross, index % kAcross * kVector);
  }
}

}  // namespace adapterkern
