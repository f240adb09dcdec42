// Tiles in shared memory.
#pragma once

#include "memory.cuh"

namespace adapterkern {

// Leaves vectors unchanged on their way into a tile. An active transform rules out cp.async, and
// has factors of its columns, which a thread loads once.
struct Unchanged {
  __device__ __forceinline__ bool is_active() const { return false; }
  template <int n>
  __device__ __forceinline__ void load(float (&)[n], int64_t) const {}
};

// v *= factors
template <int n>
__device__ __forceinline__ void multiply_by(float (&v)[n], const float (&factors)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] *= factors[i];
}

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

// The same for gathered rows, whose places in memory are all read before the first copy.
template <int kRows, int kColumns, int kThreads, typename Scalar>
__device__ __forceinline__ void copy_tile(Scalar* tile, const Gathered& matrix, int64_t first_row,
                                          int64_t first_column) {
  constexpr int kPer = 16 / sizeof(Scalar), kAcross = kColumns / kPer;
  constexpr int kStride = kColumns + kPadding<Scalar>, kRowsApart = kThreads / kAcross;
  static_assert(kThreads % kAcross == 0 && kRows % kRowsApart == 0, "a thread has whole rows");
  const int first = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kPer;
  int rows[kRows / kRowsApart];
#pragma unroll
  for (int i = 0; i < kRows / kRowsApart; ++i) {
    rows[i] = static_cast<int>(matrix.row_of(first_row + first + i * kRowsApart));
  }
#pragma unroll
  for (int i = 0; i < kRows / kRowsApart; ++i) {
    const int count = matrix.count(rows[i], first_column + column, kPer);
    copy_async_16(tile + (first + i * kRowsApart) * kStride + column,
                  matrix.at<Scalar>(count > 0 ? rows[i] : 0, first_column + column),
                  count * static_cast<int>(sizeof(Scalar)));
  }
}

// A tile's size, and the threads that load it, for the one function that serves every shape.
struct TileSize {
  int rows, columns, threads;
};

// Loads whole vectors of type Source, or if it is void of any dtype from any address.
template <typename Source, int n>
__device__ __forceinline__ void load_as(float (&v)[n], const Matrix& matrix, int64_t row,
                                        int64_t column) {
  if constexpr (std::is_void_v<Source>) {
    load_vector(v, matrix, row, column);
  } else if (row < matrix.rows && column < matrix.columns) {
    load_whole(v, matrix.at<Source>(row, column));
  }
}

// convert_tile of one kind of source. A thread keeps its columns.
template <typename Source, typename Scalar, typename MatrixT, typename Transform>
__device__ __forceinline__ void convert_rows(Scalar* tile, TileSize size, const MatrixT& matrix,
                                             int64_t first_row, int64_t first_column,
                                             Transform transform) {
  constexpr int kPer = 16 / sizeof(Scalar);
  const int across = size.columns / kPer, apart = size.threads / across;
  const int column = static_cast<int>(threadIdx.x) % across * kPer;
  float factors[kPer];
  if (transform.is_active()) transform.load(factors, first_column + column);
#pragma unroll(std::is_void_v<Source> ? 1 : 4)
  for (int row = threadIdx.x / across; row < size.rows; row += apart) {
    float v[kPer] = {};
    load_as<Source>(v, matrix, matrix.row_of(first_row + row), first_column + column);
    if (transform.is_active()) multiply_by(v, factors);
    store_whole(tile + row * (size.columns + kPadding<Scalar>)+column, v);
  }
}

// load_tile through registers, for what cp.async cannot copy: another dtype, a transform, odd
// addresses. One instance serves every tile of a kernel: it is rare, or bound by its conversions.
template <typename Scalar, typename MatrixT, typename Transform>
__device__ ADAPTERKERN_RARE void convert_tile(Scalar* tile, TileSize size, MatrixT matrix,
                                              int64_t first_row, int64_t first_column,
                                              Transform transform) {
  const bool whole = matrix.columns % (16 / sizeof(Scalar)) == 0;
  if (whole && matrix.template is_direct<Scalar>()) {
    convert_rows<Scalar>(tile, size, matrix, first_row, first_column, transform);
  } else if (sizeof(Scalar) == 2 && whole &&
             matrix.template is_direct<float>()) {  // mostly master weights
    convert_rows<float>(tile, size, matrix, first_row, first_column, transform);
  } else {
    convert_rows<void>(tile, size, matrix, first_row, first_column, transform);
  }
}

// Loads `matrix` from (first_row, first_column) on into a tile of the products' dtype, with zeros
// out of bounds.
template <int kRows, int kColumns, int kThreads, typename Scalar, typename MatrixT,
          typename Transform>
__device__ __forceinline__ void load_tile(Scalar* tile, const MatrixT& matrix, int64_t first_row,
                                          int64_t first_column, Transform transform) {
  if (!transform.is_active() && matrix.template is_direct<Scalar>()) {
    copy_tile<kRows, kColumns, kThreads>(tile, matrix, first_row, first_column);
  } else {
    convert_tile(tile, {kRows, kColumns, kThreads}, matrix, first_row, first_column, transform);
  }
}

// Copies kColumns elements of a vector that is direct as its type, from `first_column` on, with
// zeros out of bounds, by the threads from `first_thread` on; of an absent one it copies nothing.
template <int kColumns, typename Type>
__device__ __forceinline__ void copy_vector(Type* to, const Matrix& vector, int64_t first_column,
                                            int first_thread) {
  constexpr int kPer = 16 / sizeof(Type);
  const int index = static_cast<int>(threadIdx.x) - first_thread;
  if (vector.view.data == nullptr || index < 0 || index >= kColumns / kPer) return;
  const int64_t column = first_column + index * kPer;
  const int count = vector.count(0, column, kPer);
  copy_async_16(to + index * kPer, vector.at<Type>(0, column),
                count * static_cast<int>(sizeof(Type)));
}

// Waits until at most `pending` of this thread's latest groups are incomplete.
__device__ __forceinline__ void copy_async_wait_for(int pending) {
  if (pending >= 4) return copy_async_wait<4>();
  if (pending == 3) return copy_async_wait<3>();
  if (pending == 2) return copy_async_wait<2>();
  if (pending == 1) return copy_async_wait<1>();
  copy_async_wait<0>();
}

// Runs compute(step, slot) for all `steps`, with load(step, slot) stages - 1 steps ahead of it. The
// one barrier of a step publishes the tiles of this step and frees those of the step before. The
// shared memory of the device decides how many stages there are, so they are counted at run time.
// `start` runs once, before the first step and if there is none, with the first loads under way.
template <typename Load, typename Compute, typename Start>
__device__ __forceinline__ void pipeline(int stages, int steps, Load load, Compute compute,
                                         Start start) {
  int slot = 0, ahead_slot = 0;
  for (int step = 1 - stages; step < larger(steps, 1); ++step) {
    if (step == 0) start();
    if (step >= 0) {
      copy_async_wait_for(stages - 2);
      __syncthreads();
    }
    const int ahead = step + stages - 1;
    if (ahead < steps) load(ahead, ahead_slot);
    copy_async_commit();  // an empty group past the end keeps the count of pending groups
    if (++ahead_slot == stages) ahead_slot = 0;
    if (step < 0 || step >= steps) continue;
    compute(step, slot);
    if (++slot == stages) slot = 0;
  }
}

// Calls body(row, column) for the vectors of a [kRows, kColumns] tile that `thread` of kThreads
// owns.
template <int kRows, int kColumns, int kThreads, typename Body>
__device__ __forceinline__ void for_each_vector(int thread, Body body) {
  constexpr int kAcross = kColumns / kVector;
#pragma unroll 1
  for (int index = thread; index < kRows * kAcross; index += kThreads) {
    body(index / kAcross, index % kAcross * kVector);
  }
}

}  // namespace adapterkern
