// The forward of many adapters in one batch, equation (24) of docs/math.md: with i the slot of t,
// y[t] = residual[t] + skip[t] + s_i (act(x[t] D_i^T + b_i) U_i^T + c_i), and without the bracket
// where token t has no adapter. Units beyond the rank of a slot are not read.
//
// - tiles: a block takes a tile of the routing, whose tokens share a slot, through the products of
//   row_block.cuh. Rows are gathered as they are loaded and scattered as they are stored.
// - rows, for few tokens: each reads its own adapter, in two kernels over slices of H, as the split
//   form does; the products are too thin for tensor cores.
#include "grouped_forward.h"

#include "adapter_kernels.cuh"
#include "forward_policy.cuh"

namespace adapterkern {
namespace {

__device__ __forceinline__ const int32_t* indices(const View& view) {
  return static_cast<const int32_t*>(view.data);
}

// The adapter that a token or a tile takes; its rank is 0 where it takes none.
struct Adapter {
  int64_t slot, rank;

  __device__ __forceinline__ Adapter(const GroupedForwardParams& params, int64_t index)
      : slot(index), rank(0) {
    if (slot < 0 || slot >= params.slots) return;
    rank = params.bottleneck_size;
    if (params.ranks.data != nullptr) rank = min(rank, int64_t{indices(params.ranks)[slot]});
    if (rank < 0) rank = 0;
  }

  // The part of a stacked tensor that is this adapter's; none without an adapter.
  __device__ __forceinline__ View part_of(const View& stacked, int64_t slot_stride) const {
    const int64_t offset = slot * slot_stride * (stacked.dtype == kFloat32 ? 4 : 2);
    const bool exists = rank > 0 && stacked.data != nullptr;
    void* const data = exists ? static_cast<char*>(stacked.data) + offset : nullptr;
    return {to_global(data), stacked.dtype, stacked.stride};
  }
  __device__ __forceinline__ View down_weight(const GroupedForwardParams& params) const {
    return part_of(params.down_weights, params.down_slot_stride);
  }
  __device__ __forceinline__ View up_weight(const GroupedForwardParams& params) const {
    return part_of(params.up_weights, params.up_slot_stride);
  }
  __device__ __forceinline__ Matrix down_bias(const GroupedForwardParams& params) const {
    return as_matrix(part_of(params.down_biases, params.down_biases.stride), rank);
  }
  __device__ __forceinline__ Matrix up_bias(const GroupedForwardParams& params) const {
    return as_matrix(part_of(params.up_biases, params.up_biases.stride), params.hidden_size);
  }

  // The factor of the product. Without an adapter the product is zero, and has to be the neutral
  // element of the sum, which is -0: 0 would turn a residual of -0 into 0.
  __device__ __forceinline__ float scaling(const GroupedForwardParams& params) const {
    const bool adds =
        params.add_input || params.residual.data != nullptr || params.skip.data != nullptr;
    if (rank == 0) return adds ? -0.0f : 0.0f;
    if (params.scalings.data == nullptr) return 1.0f;
    return static_cast<const float*>(params.scalings.data)[slot];
  }
};

// Computes y from u = a U^T, in float32 until the single store, for tensors of any dtype at any
// address.
__device__ __forceinline__ void write_output(const GroupedForwardParams& params, View up_bias,
                                             float scaling, const float* from, int64_t token,
                                             int64_t feature) {
  const auto of = [&](const View& view) -> Matrix {
    return {view, params.num_tokens, params.hidden_size};
  };
  float u[kVector];
  load_whole(u, from);
  add_vector(u, as_matrix(up_bias, params.hidden_size), 0, feature);
#pragma unroll
  for (int i = 0; i < kVector; ++i) u[i] *= scaling;
  if (params.add_input) add_vector(u, of(params.x), token, feature);
  add_vector(u, of(params.residual), token, feature);
  add_vector(u, of(params.skip), token, feature);
  store_vector(of(params.y), token, feature, u);
}

// The same out of line, where tiles rarely come by.
__device__ ADAPTERKERN_RARE void store_any_output(const GroupedForwardParams& params, View up_bias,
                                                  float scaling, const float* from, int64_t token,
                                                  int64_t feature) {
  write_output(params, up_bias, scaling, from, token, feature);
}

// The policy of one tile: rows are places in it.
template <typename ScalarT>
struct GroupedForward : ForwardFormulas<ScalarT, GroupedForwardParams> {
  using Base = ForwardFormulas<ScalarT, GroupedForwardParams>;
  using Base::params;
  using typename Base::Features;
  using typename Base::Kept;
  using typename Base::OfUnits;
  using Scalar = ScalarT;

  Adapter adapter;
  const int32_t* tile;  // the tokens at its places
  int64_t places;
  float factor_of_all;

  __device__ __forceinline__ GroupedForward(const GroupedForwardParams& params, int64_t number)
      : Base(params),
        adapter(params, indices(params.tiles)[3 * number]),
        tile(indices(params.order) + indices(params.tiles)[3 * number + 1]),
        places(indices(params.tiles)[3 * number + 2]),
        factor_of_all(adapter.scaling(params)) {}

  __device__ __forceinline__ Gathered of_tile(const View& view, int64_t last) const {
    return {{view, params.num_tokens, last}, tile, places};
  }
  __device__ __forceinline__ Gathered rows(int64_t last) const { return of_tile(params.x, last); }
  __device__ __forceinline__ Matrix into(int64_t last) const {
    return {adapter.down_weight(params), adapter.rank, last};
  }
  __device__ __forceinline__ Matrix out() const {
    return {adapter.up_weight(params), params.hidden_size, adapter.rank};
  }

  __device__ __forceinline__ OfUnits of_units(int64_t unit) const {
    OfUnits found;
    load_vector(found.bias, adapter.down_bias(params), 0, unit);
    return found;
  }
  __device__ __forceinline__ void finish(float (&z)[kVector], const OfUnits& of_units,
                                         const float (&)[kVector], Kept& kept, int64_t unit) const {
    this->finish_units(z, of_units, kept, unit, adapter.rank);
    clear_padded_units(kept.z, unit, adapter.rank);
  }
  __device__ __forceinline__ void keep(const Kept& kept, int64_t place, int64_t unit) const {
    if (params.z.data == nullptr) return;
    const Gathered z = of_tile(params.z, params.bottleneck_size);
    store_units<Scalar>(z, z.row_of(place), unit, kept.z);
  }

  // x or the residual, and skip.
  __device__ __forceinline__ AddedRows<Gathered> added() const {
    const View first = choose(params.add_input, params.x, params.residual);
    const bool has_first = first.data != nullptr, has_skip = params.skip.data != nullptr;
    return {has_first + has_skip,
            {of_tile(choose(has_first, first, params.skip), params.hidden_size),
             of_tile(params.skip, params.hidden_size)}};
  }
  __device__ __forceinline__ Matrix bias() const { return adapter.up_bias(params); }
  __device__ __forceinline__ Matrix factor() const { return {}; }
  __device__ __forceinline__ Gathered output() const {
    return of_tile(params.y, params.hidden_size);
  }
  __device__ __forceinline__ bool is_direct() const {
    return this->template writes_direct<Scalar>(params.y, added());
  }
  __device__ __forceinline__ Features features(const void* bias, const void*, int column) const {
    Features found = {};
    if (adapter.rank > 0 && params.up_biases.data != nullptr) {
      this->load_feature(found.bias, params.up_biases, bias, column);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) found.factor[i] = factor_of_all;
    return found;
  }
  __device__ __forceinline__ void store_any(const float* from, int64_t place,
                                            int64_t feature) const {
    store_any_output(params, bias().view, factor_of_all, from, output().row_of(place), feature);
  }
};

// Grid: the tiles, each in as many blocks as it takes. Global memory per token: that of the
// row-block form. A tile without an adapter takes the way out alone, of a bottleneck of zeros.
template <typename Policy, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    bottleneck_grouped_tiles_kernel(const __grid_constant__ GroupedForwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  constexpr int kBlocks = kTileTokens / Shape::kBlockT;
  const Policy policy(params, blockIdx.x / kBlocks);
  const int64_t first = blockIdx.x % kBlocks * Shape::kBlockT;
  if (first >= policy.places) return;  // an empty tile has none
  const bool exists = policy.adapter.rank > 0;
  if (exists) {
    multiply_into_bottleneck<Shape>(shared, policy, first, 0, params.hidden_size, [] {});
  }
  finish_rows<Shape>(shared, policy, first, true, [&](float (&v)[kVector], int row, int unit) {
    if (exists) return load_whole(v, sums_in<Shape>(shared) + row * Shape::kStrideSum + unit);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = 0.0f;
  });
  __syncthreads();  // the sums are read, so that tiles can take their place
  multiply_out_of_bottleneck<Shape>(shared, policy, first, 0, params.hidden_size, [](int) {});
}

constexpr int kRowThreads = 256, kMostUnits = 256;
constexpr int kRowBlocksPerSm = 4;  // which bounds the registers to 64 a thread
constexpr int kLanesIn = 16;        // that share a unit in the first kernel: 128 features at a time

// Calls store(row, sum) with the product of each row of `weight`, from `first_row` on, and a vector
// that load(v, column) loads, over the columns from `first_column` on. All threads come here;
// `lanes` of a warp share a row. Source: as in load_as.
template <typename Source, typename Scalar, typename Load, typename Store>
__device__ __forceinline__ void multiply_rows(const Matrix& weight, int64_t first_row,
                                              int64_t first_column, int lanes, Load load,
                                              Store store) {
  // The loads of 64 bytes a thread are under way together; rare ones come one after the other.
  constexpr int kRowsAtOnce = std::is_void_v<Source> ? 1 : 8 / static_cast<int>(sizeof(Scalar));
  const int groups = kRowThreads / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
#pragma unroll 1
  for (int64_t start = first_row; start < weight.rows; start += groups * kRowsAtOnce) {
    const int64_t row = start + threadIdx.x / lanes;
    float sums[kRowsAtOnce] = {};
#pragma unroll 1
    for (int64_t column = first_column + lane * kVector; column < weight.columns;
         column += lanes * kVector) {
      float parts[kRowsAtOnce][kVector], v[kVector];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        // The last row again in place of one that is not there: a branch would hold up the loads.
        const int64_t there = min(row + i * groups, weight.rows - 1);
        if constexpr (std::is_void_v<Source>) {
          load_vector(parts[i], weight, there, column);
          round_to<Scalar>(parts[i]);
        } else {
          load_whole(parts[i], weight.at<Source>(there, column));
        }
      }
      load(v, column);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        float sum = parts[i][0] * v[0];
#pragma unroll
        for (int j = 1; j < kVector; ++j) sum += parts[i][j] * v[j];
        sums[i] += sum;
      }
    }
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        sums[i] += __shfl_xor_sync(0xFFFFFFFF, sums[i], mask);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (lane == 0 && row + i * groups < weight.rows) store(row + i * groups, sums[i]);
    }
  }
}

// Calls body(a null pointer to the type that the loads of multiply_rows have).
template <typename Scalar, typename Body>
__device__ __forceinline__ void with_source(const Matrix& weight, bool direct, Body body) {
  if (direct && weight.columns % kVector == 0 && weight.is_direct<Scalar>()) {
    return body(static_cast<Scalar*>(nullptr));
  }
  body(static_cast<void*>(nullptr));
}

// Rows, first half: the sums of one token over one slice of H. Grid: tokens, slices. Global memory:
// its part of the adapter's weight, once.
template <typename Scalar>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    bottleneck_grouped_rows_first_kernel(const __grid_constant__ GroupedForwardParams params) {
  const int64_t token = blockIdx.x, first = blockIdx.y * params.features_per_split;
  const int64_t last = min(first + params.features_per_split, params.hidden_size);
  const Adapter adapter(params, indices(params.token_slots)[token]);
  if (adapter.rank == 0) return;
  const Matrix weight = {adapter.down_weight(params), adapter.rank, last};
  const Matrix x = {params.x, params.num_tokens, last};
  float* const to = static_cast<float*>(params.partial.data) +
                    (blockIdx.y * params.num_tokens + token) * params.bottleneck_size;
  with_source<Scalar>(weight, x.is_direct<Scalar>(), [&](auto* type) {
    using Source = std::remove_pointer_t<decltype(type)>;
    multiply_rows<Source, Scalar>(
        weight, 0, first, kLanesIn,
        [&](float (&v)[kVector], int64_t feature) {
          if constexpr (std::is_void_v<Source>) {
            load_vector(v, x, token, feature);
            round_to<Scalar>(v);
          } else {
            load_whole(v, x.at<Source>(token, feature));
          }
        },
        [&](int64_t unit, float sum) { to[unit] = sum; });
  });
}

// A unit of the bottleneck of one token, from its sums over the slices of H, in their order.
template <typename Scalar>
__device__ __forceinline__ float finish_unit(const GroupedForwardParams& params,
                                             const Adapter& adapter, int64_t token, int unit,
                                             bool keeps) {
  float z[1] = {};
  if (unit < adapter.rank) {
    const float* from =
        static_cast<const float*>(params.partial.data) + token * params.bottleneck_size + unit;
    const auto splits = static_cast<int>(params.num_splits);
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      z[0] += from[split * params.num_tokens * params.bottleneck_size];
    }
    add_vector(z, adapter.down_bias(params), 0, unit);
    round_to<Scalar>(z);
  }
  if (keeps && unit < params.bottleneck_size && params.z.data != nullptr) {
    const Matrix kept = {params.z, params.num_tokens, params.bottleneck_size};
    *kept.at<Scalar>(token, unit) = from_float<Scalar>(z[0]);
  }
  if (unit >= adapter.rank) return 0.0f;
  with_activation(params.activation, AllFormulas(),
                  [&](auto formula) { z[0] = formula.value(z[0]); });
  round_to<Scalar>(z);
  return z[0];
}

// Rows, second half: the output of one token over one slice of H. Grid: tokens, slices, of which
// the first keeps z. Shared memory: | bottleneck | sums of the slice |, float32.
template <typename Scalar>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    bottleneck_grouped_rows_second_kernel(const __grid_constant__ GroupedForwardParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  float* const a = reinterpret_cast<float*>(shared);
  float* const sums = a + kMostUnits;
  const int64_t token = blockIdx.x, first = blockIdx.y * params.features_per_split;
  const int64_t last = min(first + params.features_per_split, params.hidden_size);
  const Adapter adapter(params, indices(params.token_slots)[token]);
  static_assert(kRowThreads == kMostUnits, "a unit has a thread");
  a[threadIdx.x] =
      finish_unit<Scalar>(params, adapter, token, static_cast<int>(threadIdx.x), blockIdx.y == 0);
  __syncthreads();  // the bottleneck is complete
  if (adapter.rank > 0) {
    const Matrix weight = {adapter.up_weight(params), last, adapter.rank};
    // As many lanes as the widest adapter has vectors, up to those of 128 bytes in half precision.
    int lanes = 1;
    while (lanes < 8 && lanes * kVector < params.bottleneck_size) lanes *= 2;
    with_source<Scalar>(weight, true, [&](auto* type) {
      multiply_rows<std::remove_pointer_t<decltype(type)>, Scalar>(
          weight, first, 0, lanes,
          [&](float (&v)[kVector], int64_t unit) { load_whole(v, a + unit); },
          [&](int64_t feature, float sum) { sums[feature - first] = sum; });
    });
  } else {
    for (int64_t i = threadIdx.x; i < last - first; i += kRowThreads) sums[i] = 0.0f;
  }
  __syncthreads();  // and the sums are
  const View bias = adapter.up_bias(params).view;
  const float scaling = adapter.scaling(params);
  for (int64_t i = threadIdx.x * kVector; i < last - first; i += kRowThreads * kVector) {
    write_output(params, bias, scaling, sums + i, token, first + i);
  }
}

template <typename Scalar>
cudaError_t launch_rows(const GroupedForwardParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(params.num_splits));
  const cudaError_t error =
      launch(bottleneck_grouped_rows_first_kernel<Scalar>, grid, kRowThreads, 0, params, stream);
  if (error != cudaSuccess) return error;
  const auto bytes = static_cast<int>((kMostUnits + params.features_per_split) * sizeof(float));
  return launch(bottleneck_grouped_rows_second_kernel<Scalar>, grid, kRowThreads, bytes, params,
                stream);
}

template <typename Shape>
cudaError_t launch_tiles(GroupedForwardParams params, cudaStream_t stream) {
  if (params.shared_bytes < Shape::kLeastBytes) params.shared_bytes = Shape::kLeastBytes;
  const dim3 grid(static_cast<unsigned>(params.num_tiles * (kTileTokens / Shape::kBlockT)));
  return launch(bottleneck_grouped_tiles_kernel<GroupedForward<typename Shape::Scalar>, Shape>,
                grid, Shape::kThreads, static_cast<int>(params.shared_bytes), params, stream);
}

}  // namespace

cudaError_t launch_grouped_forward(const GroupedForwardParams& params, cudaStream_t stream) {
  if (!has_formula(params.activation)) return cudaErrorInvalidValue;
  return switch_dtype(params.compute_dtype, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    if (params.num_tiles == 0) {  // on CUDA cores, where TF32 would gain nothing
      return launch_rows<std::conditional_t<sizeof(Scalar) == 4, float, Scalar>>(params, stream);
    }
    return switch_block_r(params.bottleneck_size, [&](auto width) {
      return launch_tiles<GroupedShape<Scalar, decltype(width)::value>>(params, stream);
    });
  });
}

}  // namespace adapterkern
