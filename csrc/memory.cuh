// Loads and stores of vectors as float32, in memory of any dtype.
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

// The dtype that an element has in memory.
template <typename T>
constexpr DType kDTypeOf = kFloat32;
template <>
constexpr DType kDTypeOf<__half> = kFloat16;
template <>
constexpr DType kDTypeOf<__nv_bfloat16> = kBFloat16;

// Rounds v to the products' dtype.
template <typename Scalar, int n>
__device__ __forceinline__ void round_to(float (&v)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = to_float(from_float<Scalar>(v[i]));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Memory moves in words of 32 bits, up to four at once.
template <typename T>
constexpr int kPerWord = 4 / sizeof(T);

template <int n>
struct alignas(4 * n) Words {
  uint32_t values[n];
};

template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The float32 whose bits a field of the parameters holds.
__device__ __forceinline__ float float_of_bits(int64_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits));
}

// Unpacks the elements of one word.
__device__ __forceinline__ void unpack(float* v, uint32_t word, float) {
  v[0] = bits_as<float>(word);
}
__device__ __forceinline__ void unpack(float* v, uint32_t word, TFloat32) {
  v[0] = bits_as<float>(word);
}
__device__ __forceinline__ void unpack(float* v, uint32_t word, __nv_bfloat16) {
  v[0] = bits_as<float>(word << 16);
  v[1] = bits_as<float>(word & 0xFFFF0000u);
}
__device__ __forceinline__ void unpack(float* v, uint32_t word, __half) {
  const float2 pair = __half22float2(bits_as<__half2>(word));
  v[0] = pair.x;
  v[1] = pair.y;
}

// Packs a word of elements, rounded to nearest even.
__device__ __forceinline__ uint32_t pack(const float* v, float) { return bits_as<uint32_t>(v[0]); }
__device__ __forceinline__ uint32_t pack(const float* v, TFloat32) {
  return bits_as<uint32_t>(v[0]);
}
__device__ __forceinline__ uint32_t pack(const float* v, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(v[0], v[1]));
}
__device__ __forceinline__ uint32_t pack(const float* v, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(v[0], v[1]));
}

// The words that one memory instruction moves of n elements, which fill at least one word.
template <typename T, int n>
constexpr int kWordsPerAccess = smaller(4, n / kPerWord<T>);

// Loads as many words as W holds; `from` is aligned to them.
template <typename W>
__device__ __forceinline__ W load_words(const void* from) {
  return *static_cast<const W*>(from);
}

// Loads n elements as float32; `from` is aligned to the bytes that one access moves.
template <int n, typename T>
__device__ __forceinline__ void load_whole(float (&v)[n], const T* from) {
  constexpr int kWords = kWordsPerAccess<T, n>, kPer = kWords * kPerWord<T>;
#pragma unroll
  for (int i = 0; i < n; i += kPer) {
    const auto words = load_words<Words<kWords>>(from + i);
#pragma unroll
    for (int j = 0; j < kWords; ++j) unpack(v + i + j * kPerWord<T>, words.values[j], T());
  }
}

// Stores n elements to shared memory, the inverse of load_whole.
template <int n, typename T>
__device__ __forceinline__ void store_whole(T* to, const float (&v)[n]) {
  constexpr int kWords = kWordsPerAccess<T, n>, kPer = kWords * kPerWord<T>;
#pragma unroll
  for (int i = 0; i < n; i += kPer) {
    Words<kWords> words;
#pragma unroll
    for (int j = 0; j < kWords; ++j) words.values[j] = pack(v + i + j * kPerWord<T>, T());
    *reinterpret_cast<Words<kWords>*>(to + i) = words;
  }
}

// The same to global memory, where the compiler would split the vector into its words again.
template <int n, typename T>
__device__ __forceinline__ void store_whole_global(T* to, const float (&v)[n]) {
  constexpr int kWords = kWordsPerAccess<T, n>, kPer = kWords * kPerWord<T>;
#pragma unroll
  for (int i = 0; i < n; i += kPer) {
    uint32_t words[kWords];
#pragma unroll
    for (int j = 0; j < kWords; ++j) words[j] = pack(v + i + j * kPerWord<T>, T());
    store_global(to + i, words);
  }
}

template <int n>
__device__ __forceinline__ void copy(float (&to)[n], const float (&from)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = from[i];
}

// v += the elements that load_whole loads.
template <int n, typename T>
__device__ __forceinline__ void add_whole(float (&v)[n], const T* from) {
  float more[n];
  load_whole(more, from);
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] += more[i];
}

// Loads `count` of n elements from any address, and zeros for the rest.
template <int n, typename T>
__device__ __forceinline__ void load_elements(float (&v)[n], const T* from, int count) {
  if constexpr (n >= kPerWord<T>) {
    if (count >= n && is_aligned(from, 4 * kWordsPerAccess<T, n>)) return load_whole(v, from);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = i < count ? to_float(from[i]) : 0.0f;
}

template <int n, typename T>
__device__ __forceinline__ void store_elements(T* to, const float (&v)[n], int count) {
  if constexpr (n >= kPerWord<T>) {
    if (count >= n && is_aligned(to, 4 * kWordsPerAccess<T, n>)) return store_whole_global(to, v);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i < count) to[i] = from_float<T>(v[i]);
  }
}

// first ? a : b for views of a kernel's parameters, which are copied here: of `first ? params.x :
// params.dy` the compiler makes a choice between two addresses, and nvcc 13.0 loses it if one of
// them is the start of the parameters. A chosen address is no longer known to be a global one.
__device__ __forceinline__ View choose(bool first, View a, View b) {
  View chosen = first ? a : b;
  chosen.data = to_global(chosen.data);
  return chosen;
}

// A view and its bounds.
struct Matrix {
  View view;
  int64_t rows, columns;

  // Returns how many of the `n` elements from (row, column) on lie within the bounds.
  __device__ __forceinline__ int count(int64_t row, int64_t column, int n) const {
    if (view.data == nullptr || row >= rows || column >= columns) return 0;
    const int64_t left = columns - column;
    return left < n ? static_cast<int>(left) : n;
  }

  template <typename T>
  __device__ __forceinline__ T* at(int64_t row, int64_t column) const {
    return static_cast<T*>(view.data) + row * view.stride + column;
  }

  // Whether every row holds elements of type T and starts at a multiple of 16 bytes, so that 16
  // bytes are copied unchanged. One check a tile keeps dtypes and addresses out of the loops.
  template <typename T>
  __device__ __forceinline__ bool is_direct() const {
    return view.data != nullptr && view.dtype == kDTypeOf<T> && is_aligned(view.data, 16) &&
           view.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  }

  // The same for T or float32, in which residual streams and master weights are kept beside
  // half-precision products.
  template <typename T>
  __device__ __forceinline__ bool is_direct_as() const {
    return is_direct<T>() || is_direct<float>();
  }

  // Where in memory the row at a place of a tile is.
  __device__ __forceinline__ int64_t row_of(int64_t place) const { return place; }
};

// Rows of a matrix that lie anywhere in it: `tile` names them, at so many `places`. What is
// no row of the matrix is told as one past its end.
struct Gathered : Matrix {
  const int32_t* tile;
  int64_t places;

  __device__ __forceinline__ int64_t row_of(int64_t place) const {
    const int64_t row = place < places ? tile[place] : -1;
    return row < 0 || row > rows ? rows : row;
  }
};

__device__ __forceinline__ Matrix as_matrix(const View& vector, int64_t size) {
  return {{vector.data, vector.dtype, 0}, 1, size};
}

struct Vector {
  float values[kVector];
};

template <int n>
__device__ __forceinline__ void load_any(float (&v)[n], const void* data, int64_t dtype,
                                         int64_t offset, int count) {
  switch (dtype) {
    case kFloat16:
      return load_elements(v, static_cast<const __half*>(data) + offset, count);
    case kBFloat16:
      return load_elements(v, static_cast<const __nv_bfloat16*>(data) + offset, count);
    default:
      return load_elements(v, static_cast<const float*>(data) + offset, count);
  }
}

// One instance serves all the rare loads of a kernel.
__device__ ADAPTERKERN_RARE inline Vector load_any_vector(const void* data, int64_t dtype,
                                                          int64_t offset, int count) {
  Vector found;
  load_any(found.values, data, dtype, offset, count);
  return found;
}

// v = matrix[row][column ...], with zeros out of bounds.
template <int n>
__device__ __forceinline__ void load_vector(float (&v)[n], const Matrix& matrix, int64_t row,
                                            int64_t column) {
  const int count = matrix.count(row, column, n);
  const int64_t offset = row * matrix.view.stride + column;
  if constexpr (n == kVector) {
    copy(v, load_any_vector(matrix.view.data, matrix.view.dtype, offset, count).values);
  } else {
    load_any(v, matrix.view.data, matrix.view.dtype, offset, count);
  }
}

// The inverse; elements out of bounds are not written.
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

// v += matrix[row][column ...]; an absent matrix adds nothing.
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

  template <int n>
  __device__ __forceinline__ void load(float (&factor)[n], int64_t feature) const {
    if (channel) return load_vector(factor, learned, 0, feature);
    const float one = of_all();
#pragma unroll
    for (int i = 0; i < n; ++i) factor[i] = one;
  }

  // The factor of every feature, unless each has its own.
  __device__ __forceinline__ float of_all() const {
    float one[1] = {scale};
    if (!channel && learned.view.data != nullptr) load_vector(one, learned, 0, 0);
    return one[0];
  }

  template <int n>
  __device__ __forceinline__ void multiply(float (&v)[n], int64_t feature) const {
    float factor[n];
    load(factor, feature);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] *= factor[i];
  }
};

template <typename Params>
__device__ __forceinline__ Scaling scaling_of(const Params& params) {
  return {as_matrix(params.scaling, params.channel_scaling ? params.hidden_size : 1), params.scale,
          params.channel_scaling != 0};
}

}  // namespace adapterkern
