// The two products that forward and backward share: into the bottleneck, and out of it.
//
// forward:  z  = x W_down^T + b_down, y  = a W_up^T ...  (weights as nn.Linear keeps them)
// backward: da = (scaling dy) W_up,   dx = dz W_down ... (the same, transposed)
//
// A block owns kBlockT tokens and all of R. README.md draws its shared memory, which is used twice:
// by the pipeline into the bottleneck, then by the bottleneck tile, the sums, and the pipeline out.
#pragma once

#include "policy.cuh"
#include "products.cuh"
#include "static_switch.h"

namespace adapterkern {

// Tile sizes of one dtype and one width of the bottleneck. Each block reads both weights from L2:
// with the tokens, (2 + 2 R / kBlockT) passes over x, balanced at kBlockT = 2 R. Small tiles fit
// the 99 KB of shared memory that compute capability 8.6, 8.9 and 12.x give a block; the two widths
// that gain by it have large ones too, for the 227 KB of 9.0 and 10.x. Where tokens come in groups
// of kMostTokens, blocks have no more of them, and one size.
template <typename ScalarT, int kBlockRT, bool kLargeT, int kMostTokens = 128>
struct RowBlockShape {
  using Scalar = ScalarT;
  static constexpr bool kHalf = sizeof(Scalar) == 2;
  static constexpr int kBlockR = kBlockRT;
  static constexpr bool kHasTwoSizes =
      kHalf && (kBlockR == 64 || kBlockR == 128) && kMostTokens == 128;
  static constexpr bool kLarge = kLargeT;
  static_assert(kHasTwoSizes || !kLarge, "one size serves every device");
  // Whether this architecture has a use for the tiles; otherwise the kernels are empty.
  static constexpr bool kIsCompiled = !kHasTwoSizes || (kLarge ? kHasLargeTiles : kHasSmallTiles);

  static constexpr int kBlockT = kHalf ? (kHasTwoSizes ? 128 : 64) : (kBlockR == 256 ? 32 : 64);
  static constexpr int kBlockH =
      kHalf ? (kLarge || kBlockT * kBlockR < 64 * 128 ? 64 : 32) : (kBlockR == 256 ? 16 : 32);

  // A warp owns 16 tokens, and half the width where the sums of 256 units would fill its registers.
  static constexpr int kWarpsN = kBlockR == 256 ? 2 : 1;
  static constexpr int kWarps = kBlockT / 16 * kWarpsN;
  static constexpr int kThreads = kWarps * kWarpSize;
  // This bounds the registers to 128 a thread, or 255 where float32 operands or wide sums fill
  // them, of which an SM has the shared memory for few blocks anyway. Without it the compiler
  // spills a few to fit one block more than shared memory allows.
  static constexpr int kBlocksPerSm = (kHalf && kBlockR < 128 ? 512 : 256) / kThreads;
  static constexpr int kUnitsPerWarp = kBlockR / kWarpsN;
  static constexpr int kFeaturesPerWarp = kBlockH / kWarpsN;

  static constexpr int kStrideH = kBlockH + kPadding<Scalar>;
  static constexpr int kStrideR = kBlockR + kPadding<Scalar>;
  static constexpr int kRowsBytes = tile_bytes<Scalar>(kBlockT, kBlockH);
  static constexpr int kWeightBytes =
      larger(tile_bytes<Scalar>(kBlockR, kBlockH), tile_bytes<Scalar>(kBlockH, kBlockR));
  static constexpr int kVectorBytes = kBlockH * 4;  // a value of up to 4 bytes for each feature
  static constexpr int kBottleneckBytes = tile_bytes<Scalar>(kBlockT, kBlockR);
  // The padding puts rows of a fragment into different banks; for one shape there is no room.
  static constexpr int kStrideSum = kBlockR + (kHalf && kBlockR == 128 && !kLarge ? 0 : 8);
  static constexpr int kSumBytes = kBlockT * kStrideSum * 4;
  static constexpr int kRoomBytes = room_bytes<kFeaturesPerWarp>();  // of one warp

  // A stage of the pipeline in, and one of the pipeline out without rows to add. A tile of float32
  // rows is no larger than two tiles.
  static constexpr int kInBytes = kRowsBytes + kWeightBytes;
  static constexpr int kOutBytes = kWeightBytes + 2 * kVectorBytes;
  // What stays beside the stages of the pipeline out.
  static constexpr int kBesideBytes = kBottleneckBytes + kWarps * kRoomBytes;
  // Two stages of each pipeline, the second without tiles to add, and the sums.
  static constexpr int kLeastBytes = larger(
      2 * kInBytes, kBottleneckBytes + larger(kSumBytes, kWarps* kRoomBytes + 2 * kOutBytes));
  static_assert(kLeastBytes <= (kLarge ? 227 : 99) * 1024, "beyond what a block may have");
};

// Tiles of a routing have so many tokens, the TILE of adapterkern/grouped/call.py. One shape serves
// several widths, to keep the extension small: a bank is as wide as its widest adapter, and units
// that an adapter does not have are not read.
constexpr int kTileTokens = 64;
template <typename Scalar, int kBlockR>
using GroupedShape =
    RowBlockShape<Scalar, kBlockR <= 64 ? 64 : (sizeof(Scalar) == 2 ? kBlockR : 256), false,
                  kTileTokens>;

// Calls body(the tiles of one dtype and width, which are large where asked for and there).
template <typename Scalar, int kBlockR, typename Body>
cudaError_t switch_row_block_shape(bool large, Body body) {
  if constexpr (RowBlockShape<Scalar, kBlockR, false>::kHasTwoSizes) {
    if (large) return body(Type<RowBlockShape<Scalar, kBlockR, true>>());
  }
  return body(Type<RowBlockShape<Scalar, kBlockR, false>>());
}

// The start of a warp's part of the block's tile.
template <typename Shape>
struct WarpPlace {
  int warp = threadIdx.x / kWarpSize;
  int row = warp / Shape::kWarpsN * 16;
  int part = warp % Shape::kWarpsN;
};

// The sums [kBlockT, kBlockR] float32 in shared memory, of row stride kStrideSum.
template <typename Shape>
__device__ __forceinline__ float* sums_in(unsigned char* shared) {
  return reinterpret_cast<float*>(shared + Shape::kBottleneckBytes);
}

template <typename Shape>
__device__ __forceinline__ typename Shape::Scalar* bottleneck_in(unsigned char* shared) {
  return reinterpret_cast<typename Shape::Scalar*>(shared);
}

// Leaves the rows over the features first ... last times the weight in sums_in(shared), and calls
// `meanwhile` once the tiles of the pipeline are no longer read.
template <typename Shape, typename Policy, typename Meanwhile>
__device__ __forceinline__ void multiply_into_bottleneck(unsigned char* shared,
                                                         const Policy& policy, int64_t first_token,
                                                         int64_t first, int64_t last,
                                                         Meanwhile meanwhile) {
  using Scalar = typename Shape::Scalar;
  constexpr int kThreads = Shape::kThreads, kBlockH = Shape::kBlockH, kBlockR = Shape::kBlockR;
  const WarpPlace<Shape> place;
  const auto rows = policy.rows(last);
  const Matrix weight = policy.into(last);
  float acc[Shape::kUnitsPerWarp / 8][4];
  clear(acc);

  const auto rows_tile = [&](int slot) {
    return reinterpret_cast<Scalar*>(shared + slot * Shape::kInBytes);
  };
  const auto weight_tile = [&](int slot) {
    return reinterpret_cast<Scalar*>(shared + slot * Shape::kInBytes + Shape::kRowsBytes);
  };
  const auto load = [&](int step, int slot) {
    const int64_t feature = first + static_cast<int64_t>(step) * kBlockH;
    load_tile<Shape::kBlockT, kBlockH, kThreads>(rows_tile(slot), rows, first_token, feature,
                                                 policy.transform());
    if constexpr (Policy::kTransposed) {
      load_tile<kBlockH, kBlockR, kThreads>(weight_tile(slot), weight, feature, 0, Unchanged());
    } else {
      load_tile<kBlockR, kBlockH, kThreads>(weight_tile(slot), weight, 0, feature, Unchanged());
    }
  };
  const auto compute = [&](int, int slot) {
    const Scalar* a = rows_tile(slot) + place.row * Shape::kStrideH;
    const int unit = place.part * Shape::kUnitsPerWarp;
    if constexpr (Policy::kTransposed) {
      multiply<kBlockH, false, false>(acc, a, Shape::kStrideH, weight_tile(slot) + unit,
                                      Shape::kStrideR);
    } else {
      multiply<kBlockH, false, true>(acc, a, Shape::kStrideH,
                                     weight_tile(slot) + unit * Shape::kStrideH, Shape::kStrideH);
    }
  };
  const int stages = policy.stages_in(Shape::kInBytes);
  pipeline(stages, static_cast<int>(ceil_div(last - first, kBlockH)), load, compute, [] {});

  __syncthreads();  // the sums take the place of tiles that other warps may still read
  meanwhile();
  store_product(
      sums_in<Shape>(shared) + place.row * Shape::kStrideSum + place.part * Shape::kUnitsPerWarp,
      Shape::kStrideSum, acc);
  copy_async_wait<0>();
  __syncthreads();
}

// What the pipeline out brings in a stage beside the weight: a bias and a factor for each feature,
// and the tiles of the rows to add, all of the types that they have in memory.
template <typename Shape>
struct OutStage {
  using Scalar = typename Shape::Scalar;
  unsigned char* start;

  __device__ __forceinline__ Scalar* weight() const { return reinterpret_cast<Scalar*>(start); }
  __device__ __forceinline__ unsigned char* bias() const { return start + Shape::kWeightBytes; }
  __device__ __forceinline__ unsigned char* factor() const { return bias() + Shape::kVectorBytes; }
  __device__ __forceinline__ unsigned char* added() const { return start + Shape::kOutBytes; }
};

template <typename Shape, typename Type>
constexpr int kAddedBytes = tile_bytes<Type>(Shape::kBlockT, Shape::kBlockH);

// Writes one step of the output, all of it direct, from a warp's product. A lane owns whole
// vectors; all that it reads is in shared memory.
template <typename Shape, typename Policy, typename AddedT, int kTiles>
__device__ __forceinline__ void write_step(float* room, const float (&acc)[kTiles][4],
                                           const Policy& policy, const AddedT& added,
                                           const OutStage<Shape>& stage,
                                           const WarpPlace<Shape>& place, int64_t first_token,
                                           int64_t first_feature) {
  using Scalar = typename Shape::Scalar;
  const int64_t num_tokens = policy.params.num_tokens;
  const int in_step = place.part * Shape::kFeaturesPerWarp;
  hand_out(room, acc, [&](auto rows, int in_part) {
    const int column = in_step + in_part;
    const int64_t feature = first_feature + column;
    const bool exists = feature < policy.params.hidden_size;
    const auto of_feature = policy.features(stage.bias(), stage.factor(), column);
    float u[rows.kCount][kVector];
    rows.for_each_unrolled([&](int i, int, const float* from) {
      load_whole(u[i], from);
      policy.scale(u[i], of_feature);
    });
    const unsigned char* tile = stage.added();
#pragma unroll
    for (int index = 0; index < Policy::kMostAdded; ++index) {
      if (index >= added.count) break;
      with_type_of<Scalar>(added.rows[index].view, [&](auto* type) {
        using Type = std::remove_pointer_t<decltype(type)>;
        constexpr int kStride = Shape::kBlockH + kPadding<Type>;
        const auto* from = reinterpret_cast<const Type*>(tile) + place.row * kStride + column;
        rows.for_each_unrolled(
            [&](int i, int row, const float*) { add_whole(u[i], from + row * kStride); });
        tile += kAddedBytes<Shape, Type>;
      });
    }
    const auto output = policy.output();
    with_type_of<Scalar>(output.view, [&](auto* type) {
      using Type = std::remove_pointer_t<decltype(type)>;
      rows.for_each_unrolled([&](int i, int row, const float*) {
        const int64_t token = output.row_of(first_token + place.row + row);
        if (!exists || token >= num_tokens) return;
        store_whole_global(output.template at<Type>(token, feature), u[i]);
      });
    });
  });
}

// Writes the output over the features first ... last: the bottleneck tile at the start of shared
// memory times the weight out, and what is added to it. The features are walked over backwards, as
// the last ones of the rows are the likeliest to be in L2 still.
template <typename Shape, typename Policy, typename Fill>
__device__ __forceinline__ void multiply_out_of_bottleneck(unsigned char* shared,
                                                           const Policy& policy,
                                                           int64_t first_token, int64_t first,
                                                           int64_t last, Fill fill) {
  using Scalar = typename Shape::Scalar;
  constexpr int kThreads = Shape::kThreads, kBlockH = Shape::kBlockH, kBlockR = Shape::kBlockR;
  const WarpPlace<Shape> place;
  const Scalar* a = bottleneck_in<Shape>(shared) + place.row * Shape::kStrideR;
  float* const room =
      reinterpret_cast<float*>(shared + Shape::kBottleneckBytes + place.warp * Shape::kRoomBytes);
  const Matrix weight = policy.out();
  const auto added = policy.added();
  int per_stage = Shape::kOutBytes;
#pragma unroll
  for (int i = 0; i < Policy::kMostAdded; ++i) {
    if (i < added.count) {
      with_type_of<Scalar>(added.rows[i].view, [&](auto* type) {
        per_stage += kAddedBytes<Shape, std::remove_pointer_t<decltype(type)>>;
      });
    }
  }
  bool direct = policy.is_direct() && policy.stages_out(Shape::kBesideBytes, per_stage) > 1;
  if constexpr (Policy::kHasFeatures) {
    direct = direct && is_direct_or_none<Scalar>(policy.bias()) &&
             is_direct_or_none<Scalar>(policy.factor());
  }
  const int bytes = direct ? per_stage : Shape::kOutBytes;
  const int steps = static_cast<int>(ceil_div(last - first, kBlockH));

  const auto stage_of = [&](int slot) {
    return OutStage<Shape>{shared + Shape::kBesideBytes + slot * bytes};
  };
  const auto feature_of = [&](int step) {
    return first + static_cast<int64_t>(steps - 1 - step) * kBlockH;
  };
  const auto load = [&](int step, int slot) {
    const OutStage<Shape> stage = stage_of(slot);
    const int64_t feature = feature_of(step);
    if constexpr (Policy::kTransposed) {
      load_tile<kBlockR, kBlockH, kThreads>(stage.weight(), weight, 0, feature, Unchanged());
    } else {
      load_tile<kBlockH, kBlockR, kThreads>(stage.weight(), weight, feature, 0, Unchanged());
    }
    if (!direct) return;
    if constexpr (Policy::kHasFeatures) {
      const auto copy = [&](unsigned char* to, const Matrix& vector, int first_thread) {
        with_type_of<Scalar>(vector.view, [&](auto* type) {
          copy_vector<kBlockH>(reinterpret_cast<decltype(type)>(to), vector, feature, first_thread);
        });
      };
      copy(stage.bias(), policy.bias(), 0);
      copy(stage.factor(), policy.factor(), kThreads / 2);
    }
    unsigned char* tile = stage.added();
#pragma unroll
    for (int i = 0; i < Policy::kMostAdded; ++i) {
      if (i >= added.count) break;
      with_type_of<Scalar>(added.rows[i].view, [&](auto* type) {
        copy_tile<Shape::kBlockT, kBlockH, kThreads>(reinterpret_cast<decltype(type)>(tile),
                                                     added.rows[i], first_token, feature);
        tile += kAddedBytes<Shape, std::remove_pointer_t<decltype(type)>>;
      });
    }
  };
  const auto compute = [&](int step, int slot) {
    const OutStage<Shape> stage = stage_of(slot);
    const int64_t feature = feature_of(step);
    const int in_step = place.part * Shape::kFeaturesPerWarp;
    float acc[Shape::kFeaturesPerWarp / 8][4];
    clear(acc);
    if constexpr (Policy::kTransposed) {
      multiply<kBlockR, false, false>(acc, a, Shape::kStrideR, stage.weight() + in_step,
                                      Shape::kStrideH);
    } else {
      multiply<kBlockR, false, true>(acc, a, Shape::kStrideR,
                                     stage.weight() + in_step * Shape::kStrideR, Shape::kStrideR);
    }
    if (direct) {
      write_step(room, acc, policy, added, stage, place, first_token, feature);
    } else {
      hand_out(room, acc, [&](auto rows, int column) {
        rows.for_each([&](int row, const float* from) {
          policy.store_any(from, first_token + place.row + row, feature + in_step + column);
        });
      });
    }
  };
  const int stages = policy.stages_out(Shape::kBesideBytes, bytes);
  pipeline(stages, steps, load, compute, [&] { fill(stages - 1); });
}

}  // namespace adapterkern
