// The backward of the norm behind the output, equations (19) to (22) of docs/math.md: dy = ds, and
// the gradients of the norm's weight and bias, as partial sums over blocks of tokens that are added
// in their order: repeated runs give the same bits.
#include "norm_gradients.h"

#include "launch.cuh"
#include "policy.cuh"
#include "static_switch.h"

namespace adapterkern {
namespace {

// A row of up to kMostNormThreads vectors has a thread for each, which keeps its features; short
// rows lie side by side in a block.
// Most is what the registers of a thread allow, and twice kNormThreads fit an SM.
constexpr int kNormThreads = 384, kMostNormThreads = 768;

__host__ __device__ constexpr int threads_of_row(int64_t hidden_size) {
  return static_cast<int>(ceil_div(hidden_size, kVector * kWarpSize)) * kWarpSize;
}
__host__ __device__ constexpr int rows_of_block(int64_t hidden_size) {
  return larger(kNormThreads / threads_of_row(hidden_size), 1);
}

// A vector of rows of T as it lies in memory.
template <typename T>
struct RawVector {
  Words<4> words[kVector / (4 * kPerWord<T>)] = {};

  __device__ __forceinline__ void fetch(const T* from) {
#pragma unroll
    for (int i = 0; i < kVector / (4 * kPerWord<T>); ++i) {
      words[i] = load_words<Words<4>>(from + i * 4 * kPerWord<T>);
    }
  }
  __device__ __forceinline__ void unpack_to(float (&v)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector / kPerWord<T>; ++i) {
      unpack(v + i * kPerWord<T>, words[i / 4].values[i % 4], T());
    }
  }
};

// What a thread reads of one row.
template <typename Scalar, typename Normed>
struct NormRow {
  RawVector<Normed> d_normed;
  RawVector<Scalar> stream;
  float mean = 0.0f, rstd = 0.0f;

  // Loads the vector at `offset`, of `token`, or zeros past the last token.
  __device__ __forceinline__ void fetch(const BackwardParams& params, int64_t token,
                                        int64_t offset) {
    *this = {};
    if (token >= params.num_tokens) return;
    d_normed.fetch(static_cast<const Normed*>(params.d_normed.data) + offset);
    if (params.stream.data == nullptr) return;
    stream.fetch(static_cast<const Scalar*>(params.stream.data) + offset);
    rstd = static_cast<const float*>(params.rstd.data)[token];
    if (params.norm == kLayer) mean = static_cast<const float*>(params.mean.data)[token];
  }
};

// Sums `v` over the threads of the row, in a fixed order. `places`: room for as many pairs as the
// block has warps, in turn one of two, so that one barrier a row is enough.
__device__ __forceinline__ void sum_row(float (&v)[2], float* places, int warps) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] += __shfl_xor_sync(0xFFFFFFFF, v[i], mask);
  }
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) store_whole(places + 2 * warp, v);
  __syncthreads();  // the sums of every warp are there
  const float* from = places + 2 * (warp / warps * warps);
  v[0] = v[1] = 0.0f;
#pragma unroll 4
  for (int i = 0; i < warps; ++i) add_whole(v, from + 2 * i);
}

// Adds up the column sums of the rows that lie side by side in the block, in their order, and
// stores them as its row of `sum`.
__device__ __forceinline__ void store_column_sums(const View& sum, float* room,
                                                  const float (&v)[kVector], int rows,
                                                  int64_t feature, int64_t hidden_size) {
  if (sum.data == nullptr) return;
  const int across = static_cast<int>(blockDim.x) / rows * kVector;
  const int first = static_cast<int>(threadIdx.x) * kVector;
  store_whole(room + first, v);
  __syncthreads();  // the sums of every row are there
  if (first < across && feature < hidden_size) {
    float total[kVector];
    copy(total, v);
#pragma unroll 1
    for (int row = 1; row < rows; ++row) {
      add_whole(total, room + row * across + first);
    }
    store_whole_global(static_cast<float*>(sum.data) + blockIdx.x * sum.stride + feature, total);
  }
  __syncthreads();  // before the next sums take the place of these
}

__device__ __forceinline__ void store_weight(float* to, const BackwardParams& params,
                                             int64_t feature) {
  const bool has_weight = params.norm_weight.data != nullptr;
  const float offset = has_weight ? float_of_bits(params.weight_offset) : 1.0f;
  float weight[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) weight[i] = offset;
  add_vector(weight, as_matrix(params.norm_weight, params.hidden_size), 0, feature);
  store_whole(to, weight);
}

// Walks over the tokens, a row or more at a time; the next ones are fetched meanwhile. Grid: blocks
// that share the tokens. Global memory per token: d_normed, stream and d_stream, and dy; rows of
// all four follow one another without gaps.
template <typename Scalar, typename Normed>
__global__ void __launch_bounds__(kMostNormThreads, 1)
    bottleneck_bwd_norm_kernel(const __grid_constant__ BackwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int64_t hidden_size = params.hidden_size, num_tokens = params.num_tokens;
  const int threads = threads_of_row(hidden_size), rows = rows_of_block(hidden_size);
  const int64_t feature = static_cast<int64_t>(threadIdx.x % threads) * kVector;
  const int64_t apart = static_cast<int64_t>(gridDim.x) * rows;
  const float of_each = 1.0f / static_cast<float>(hidden_size);
  const float of_mean = params.norm == kLayer ? of_each : 0.0f;
  auto* const dy = static_cast<Scalar*>(params.dy.data);
  const auto* const d_stream = static_cast<const Scalar*>(params.d_stream.data);
  float* places = reinterpret_cast<float*>(shared);
  float* const room = places + 4 * (blockDim.x / kWarpSize);
  // The thread's part of the weight lies in its part of the room, which saves registers.
  float* const weight = room + threadIdx.x * kVector;
  store_weight(weight, params, feature);

  float d_weight[kVector] = {}, d_bias[kVector] = {};
  int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  // A thread without features has no tokens.
  int64_t token = feature < hidden_size ? first + threadIdx.x / threads : num_tokens;
  int64_t offset = token * hidden_size + feature;
  NormRow<Scalar, Normed> row;
  row.fetch(params, token, offset);
  for (bool odd = false; first < num_tokens; first += apart, odd = !odd) {
    float g[kVector], xhat[kVector], factor[kVector];
    load_whole(factor, weight);
    row.d_normed.unpack_to(g);
    row.stream.unpack_to(xhat);
    const float rstd = row.rstd;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      xhat[i] = (xhat[i] - row.mean) * rstd;
      d_bias[i] += g[i];
    }
    float rounded[kVector];
    copy(rounded, xhat);
    if (params.cast_before_weight) round_to<Scalar>(rounded);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      d_weight[i] += g[i] * rounded[i];
      g[i] *= factor[i];
    }
    const bool stores = token < num_tokens;
    const int64_t to = offset;
    token += apart;
    offset += apart * hidden_size;
    row.fetch(params, token, offset);
    if (dy == nullptr) continue;
    RawVector<Scalar> added;
    if (stores && d_stream != nullptr) added.fetch(d_stream + to);
    float means[2] = {};  // of g, and of g xhat
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      means[0] += g[i];
      means[1] += g[i] * xhat[i];
    }
    sum_row(means, places + (odd ? 2 * (blockDim.x / kWarpSize) : 0), threads / kWarpSize);
    if (!stores) continue;
    means[0] *= of_mean;
    means[1] *= of_each;
    float ds[kVector];
    added.unpack_to(ds);
#pragma unroll
    for (int i = 0; i < kVector; ++i) ds[i] += rstd * (g[i] - means[0] - xhat[i] * means[1]);
    store_whole_global(dy + to, ds);
  }
  store_column_sums(params.sum_norm_weight, room, d_weight, rows, feature, hidden_size);
  store_column_sums(params.sum_norm_bias, room, d_bias, rows, feature, hidden_size);
}

constexpr int kNormColumns = 32, kNormParts = 8;

// Adds the partial sums of the blocks. Grid: features, 2 for the weight and the bias. Each warp of
// a block adds a part of the partial sums, and the first one adds the parts.
__global__ void __launch_bounds__(kNormColumns* kNormParts)
    bottleneck_bwd_norm_sum_kernel(const __grid_constant__ BackwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const bool is_bias = blockIdx.y == 1;
  const View sum = choose(is_bias, params.sum_norm_bias, params.sum_norm_weight);
  const View to = choose(is_bias, params.d_norm_bias, params.d_norm_weight);
  if (sum.data == nullptr) return;
  const int column = threadIdx.x % kNormColumns, part = threadIdx.x / kNormColumns;
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kNormColumns + column;
  float* const parts = reinterpret_cast<float*>(shared) + column;
  float total[1] = {};
  if (feature < params.hidden_size) {
    const float* from = static_cast<const float*>(sum.data) + feature;
#pragma unroll 8
    for (int64_t block = part; block < params.norm_blocks; block += kNormParts) {
      total[0] += from[block * sum.stride];
    }
  }
  parts[part * kNormColumns] = total[0];
  __syncthreads();  // every part is there
  if (part > 0) return;
  for (int i = 1; i < kNormParts; ++i) total[0] += parts[i * kNormColumns];
  store_vector(as_matrix(to, params.hidden_size), 0, feature, total);
}

template <typename Scalar, typename Normed>
cudaError_t launch_rows(const BackwardParams& params, cudaStream_t stream) {
  const int threads = threads_of_row(params.hidden_size) * rows_of_block(params.hidden_size);
  if (threads > kMostNormThreads) return cudaErrorInvalidValue;
  const int warps = threads / kWarpSize;
  return launch(bottleneck_bwd_norm_kernel<Scalar, Normed>,
                dim3(static_cast<unsigned>(params.norm_blocks)), threads,
                4 * (4 * warps + threads * kVector), params, stream);
}

}  // namespace

cudaError_t launch_norm_gradients(const BackwardParams& params, cudaStream_t stream) {
  const cudaError_t error = switch_dtype(params.compute_dtype, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    if constexpr (sizeof(Scalar) == 2) {
      if (params.d_normed.dtype == kDTypeOf<Scalar>) {
        return launch_rows<Scalar, Scalar>(params, stream);
      }
      if (params.d_normed.dtype == kFloat32) return launch_rows<Scalar, float>(params, stream);
    }
    return cudaErrorInvalidValue;
  });
  if (error != cudaSuccess) return error;
  if (params.sum_norm_weight.data == nullptr && params.sum_norm_bias.data == nullptr) {
    return cudaSuccess;
  }
  const auto columns = static_cast<unsigned>(ceil_div(params.hidden_size, kNormColumns));
  return launch(bottleneck_bwd_norm_sum_kernel, dim3(columns, 2), kNormColumns * kNormParts,
                kNormColumns * kNormParts * 4, params, stream);
}

}  // namespace adapterkern
