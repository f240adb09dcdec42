// Vectors of global memory in any dtype, and tiles in shared memory.
//
// Row offsets are 64 bits wide: T * H passes 2^31 in real batches.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace adapterkern {

constexpr int kWarpSize = 32;
// Elements of a vector that goes through float32 registers: 16 bytes in half precision.
constexpr int kVector = 8;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(TFloat32 value) { return value.value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ TFloat32 from_float<TFloat32>(float value) {
  return {value};
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// How an element lies in memory.
template <typename T>
constexpr DType kDTypeOf = kFloat32;
template <>
constexpr DType kDTypeOf<__half> = kFloat16;
template <>
constexpr DType kDTypeOf<__nv_bfloat16> = kBFloat16;

// Rounds to the products' dtype.
template <typename Scalar, int n>
__device__ __forceinline__ void round_to(float (&v)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = to_float(from_float<Scalar>(v[i]));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// What one memory instruction moves.
template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T values[n];
};

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// `n` elements from `from` on as float32, zeros from `count` on; wide accesses where the address
// allows them.
template <int n, typename T>
__device__ __forceinline__ void load_elements(float (&v)[n], const T* from, int count) {
  constexpr int kPer = smaller(16 / sizeof(T), n);
  if (count >= n && is_aligned(from, kPer * sizeof(T))) {
#pragma unroll
    for (int i = 0; i < n; i += kPer) {
      const auto pack = *reinterpret_cast<const Pack<T, kPer>*>(from + i);
#pragma unroll
      for (int j = 0; j < kPer; ++j) v[i + j] = to_float(pack.values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <int n, typename T>
__device__ __forceinline__ void store_elements(T* to, const float (&v)[n], int count) {
  constexpr int kPer = smaller(16 / sizeof(T), n);
  if (count >= n && is_aligned(to, kPer * sizeof(T))) {
#pragma unroll
    for (int i = 0; i < n; i += kPer) {
      Pack<T, kPer> pack;
#pragma unroll
      for (int j = 0; j < kPer; ++j) pack.values[j] = from_float<T>(v[i + j]);
      *reinterpret_cast<Pack<T, kPer>*>(to + i) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < count) to[i] = from_float<T>(v[i]);
    }
  }
}

// v += the elements from `from` on, an aligned address.
template <int n, typename T>
__device__ __forceinline__ void add_elements(float (&v)[n], const T* from) {
  float more[n];
  load_elements(more, from, n);
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] += more[i];
}

// A view and the part of it that exists.
struct Matrix {
  View view;
  int64_t rows, columns;

  // How many of the `n` elements from (row, column) on exist.
  __device__ __forceinline__ int count(int64_t row, int64_t column, int n) const {
    if (view.data == nullptr || row >= rows || column >= columns) return 0;
    const int64_t left = columns - column;
    return left < n ? static_cast<int>(left) : n;
  }

  template <typename T>
  __device__ __forceinline__ T* at(int64_t row, int64_t column) const {
    return static_cast<T*>(view.data) + row * view.stride + column;
  }
};

__device__ __forceinline__ Matrix as_matrix(const View& vector, int64_t size) {
  return {{vector.data, vector.dtype, 0}, 1, size};
}

// v = matrix[row][column ...], zeros where nothing exists.
template <int n>
__device__ __forceinline__ void load_vector(float (&v)[n], const Matrix& matrix, int64_t row,
                                            int64_t column) {
  const int count = matrix.count(row, column, n);
  switch (matrix.view.dtype) {
    case kFloat16:
      return load_elements(v, matrix.at<__half>(row, column), count);
    case kBFloat16:
      return load_elements(v, matrix.at<__nv_bfloat16>(row, column), count);
    default:
      return load_elements(v, matrix.at<float>(row, column), count);
  }
}

// The inverse; what does not exist is left alone.
template <int n>
__device__ __forceinline__ void store_vector(const Matrix& matrix, int64_t row, int64_t column,
                                             const float (&v)[n]) {
  const int count = matrix.count(row, column, n);
  switch (matrix.view.dtype) {
    case kFloat16:
      return store_elements(matrix.at<__half>(row, column), v, count);
    case kBFloat16:
      return store_elements(matrix.at<__nv_bfloat16>(row, column), v, count);
    default:
      return store_elements(matrix.at<float>(row, column), v, count);
  }
}

// v += matrix[row][column ...], where there is a matrix.
template <int n>
__device__ __forceinline__ void add_vector(float (&v)[n], const Matrix& matrix, int64_t row,
                                           int64_t column) {
  if (matrix.view.data == nullptr) return;
  float more[n];
  load_vector(more, matrix, row, column);
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] += more[i];
}

// The scaling of each feature: a float, a learned [1] or a learned [H].
struct Scaling {
  Matrix learned;
  float scale;
  bool channel;

  __device__ __forceinline__ bool is_one() const {
    return learned.view.data == nullptr && scale == 1.0f;
  }

  template <int n>
  __device__ __forceinline__ void multiply(float (&v)[n], int64_t feature) const {
    float factor[n];
    if (channel) {
      load_vector(factor, learned, 0, feature);
    } else {
      float one[1] = {scale};
      if (learned.view.data != nullptr) load_vector(one, learned, 0, 0);
#pragma unroll
      for (int i = 0; i < n; ++i) factor[i] = one[0];
    }
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] *= factor[i];
  }
};

template <typename Params>
__device__ __forceinline__ Scaling scaling_of(const Params& params) {
  return {as_matrix(params.scaling, params.channel_scaling ? params.hidden_size : 1),
          static_cast<float>(params.scale), params.channel_scaling != 0};
}

// What happens to a vector on its way into a tile; an active one keeps it off cp.async.
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

// The part of `matrix` from (first_row, first_column) on, into a tile of the products' dtype; zeros
// where nothing exists. cp.async where neither dtype nor alignment forbids it, else through
// registers.
template <int kRows, int kColumns, int kThreads, typename Scalar, typename Transform>
__device__ __forceinline__ void load_tile(Scalar* tile, const Matrix& matrix, int64_t first_row,
                                          int64_t first_column, Transform transform) {
  constexpr int kPer = 16 / sizeof(Scalar);
  constexpr int kAcross = kColumns / kPer;
  const bool same = matrix.view.dtype == kDTypeOf<Scalar> && !transform.is_active();
  for (int index = threadIdx.x; index < kRows * kAcross; index += kThreads) {
    const int row = index / kAcross, column = index % kAcross * kPer;
    Scalar* to = tile + row * (kColumns + kPadding<Scalar>)+column;
    const int count = matrix.count(first_row + row, first_column + column, kPer);
    const Scalar* from = count == 0 ? static_cast<Scalar*>(matrix.view.data)
                                    : matrix.at<Scalar>(first_row + row, first_column + column);
    if (same && is_aligned(from, 16)) {
      copy_async_16(to, from, count * sizeof(Scalar));
    } else {
      float v[kPer];
      load_vector(v, matrix, first_row + row, first_column + column);
      if (transform.is_active()) transform(v, first_column + column);
      store_elements(to, v, kPer);
    }
  }
}

// Runs compute(step, slot) over `steps`, with kStages - 1 steps of load(step, slot) ahead of it.
// The one barrier a step both publishes the tiles of this step and frees those of the step before.
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

// Calls body(row, column) for the vectors of a [kRows, kColumns] tile; `thread` of kThreads. Not
// unrolled: the body holds every dtype and option.
template <int kRows, int kColumns, int kThreads, typename Body>
__device__ __forceinline__ void for_each_vector(int thread, Body body) {
  constexpr int kAcross = kColumns / kVector;
#pragma unroll 1
  for (int index = thread; index < kRows * kAcross; index += kThreads) {
    body(index / kAcross, index % kAcross * kVector);
  }
}

}  // namespace adapterkern
