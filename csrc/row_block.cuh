// The two products that forward and backward share: into the bottleneck, and out of it.
//
// forward:  z  = x W_down^T + b_down, y  = a W_up^T ...  (weights as nn.Linear keeps them)
// backward: da = (scaling dy) W_up,   dx = dz W_down ... (the same, transposed)
//
// A block owns kBlockT tokens and all of R. Shared memory is used twice: by the pipeline into the
// bottleneck, then by the bottleneck tile and, beside it, first the sums, later the pipeline out.
#pragma once

#include "products.cuh"

namespace adapterkern {

// Tile sizes of one dtype and one width of the bottleneck. Each block reads both weights from L2:
// with the tokens, (2 + 2 R / kBlockT) passes over x, balanced at kBlockT = 2 R. Everything fits
// the 99 KB of shared memory that compute capability 8.6, 8.9 and 12.x give a block.
template <typename ScalarT, int kBlockRT>
struct RowBlockShape {
  using Scalar = ScalarT;
  static constexpr bool kHalf = sizeof(Scalar) == 2;
  static constexpr int kBlockR = kBlockRT;
  static constexpr int kBlockT =
      kHalf ? (kBlockR == 64 || kBlockR == 128 ? 128 : 64) : (kBlockR == 256 ? 32 : 64);
  static constexpr int kBlockH = kHalf ? (kBlockR >= 128 ? 32 : 64) : (kBlockR == 256 ? 16 : 32);
  static constexpr int kStages = kHalf && kBlockR != 64 && kBlockR != 256 ? 3 : 2;

  // A warp owns 16 tokens, and half the width where the sums of 256 units would fill its registers.
  static constexpr int kWarpsN = kBlockR == 256 ? 2 : 1;
  static constexpr int kWarps = kBlockT / 16 * kWarpsN;
  static constexpr int kThreads = kWarps * kWarpSize;
  // This bounds the registers to 128 a thread, or 255 where float32 operands fill them. Without it
  // the compiler spills a few to fit one block more than shared memory allows.
  static constexpr int kBlocksPerSm = (kHalf ? 512 : 256) / kThreads;
  static constexpr int kUnitsPerWarp = kBlockR / kWarpsN;
  static constexpr int kFeaturesPerWarp = kBlockH / kWarpsN;

  static constexpr int kStrideH = kBlockH + kPadding<Scalar>;
  static constexpr int kStrideR = kBlockR + kPadding<Scalar>;
  static constexpr int kRowsBytes = tile_bytes<Scalar>(kBlockT, kBlockH);
  static constexpr int kWeightBytes =
      larger(tile_bytes<Scalar>(kBlockR, kBlockH), tile_bytes<Scalar>(kBlockH, kBlockR));
  static constexpr int kBottleneckBytes = tile_bytes<Scalar>(kBlockT, kBlockR);
  // The padding puts rows of a fragment into different banks; for one shape there is no room.
  static constexpr int kStrideSum = kBlockR + (kHalf && kBlockR == 128 ? 0 : 8);
  static constexpr int kSumBytes = kBlockT * kStrideSum * 4;
  static constexpr int kRoomBytes = 16 * kRoomStride<kFeaturesPerWarp> * 4;  // of one warp

  static constexpr int kSharedBytes =
      larger(kStages * (kRowsBytes + kWeightBytes),
             kBottleneckBytes + larger(kSumBytes, kStages* kWeightBytes + kWarps * kRoomBytes));
  static_assert(kSharedBytes <= 99 * 1024, "beyond compute capability 8.6, 8.9 and 12.x");
};

// The start of a warp's part of the block's tile.
template <typename Shape>
struct WarpPlace {
  int warp = threadIdx.x / kWarpSize;
  int row = warp / Shape::kWarpsN * 16;
  int part = warp % Shape::kWarpsN;
};

// Returns sums [kBlockT, kBlockR] float32 in shared memory, of row stride kStrideSum:
// rows[first_token ...][first ... last] times the weight, [R, H], or [H, R] if kTransposed.
template <typename Shape, bool kTransposed, typename Transform>
__device__ __forceinline__ float* multiply_into_bottleneck(unsigned char* shared,
                                                           const Matrix& rows, const Matrix& weight,
                                                           int64_t first_token, int64_t first,
                                                           int64_t last, Transform transform) {
  using Scalar = typename Shape::Scalar;
  constexpr int kThreads = Shape::kThreads, kBlockH = Shape::kBlockH, kBlockR = Shape::kBlockR;
  constexpr int kStageBytes = Shape::kRowsBytes + Shape::kWeightBytes;
  const WarpPlace<Shape> place;
  float acc[Shape::kUnitsPerWarp / 8][4];
  clear(acc);

  const auto rows_tile = [&](int slot) {
    return reinterpret_cast<Scalar*>(shared + slot * kStageBytes);
  };
  const auto weight_tile = [&](int slot) {
    return reinterpret_cast<Scalar*>(shared + slot * kStageBytes + Shape::kRowsBytes);
  };
  const auto load = [&](int step, int slot) {
    const int64_t feature = first + static_cast<int64_t>(step) * kBlockH;
    load_tile<Shape::kBlockT, kBlockH, kThreads>(rows_tile(slot), rows, first_token, feature,
                                                 transform);
    if (kTransposed) {
      load_tile<kBlockH, kBlockR, kThreads>(weight_tile(slot), weight, feature, 0, Unchanged());
    } else {
      load_tile<kBlockR, kBlockH, kThreads>(weight_tile(slot), weight, 0, feature, Unchanged());
    }
  };
  const auto compute = [&](int, int slot) {
    const Scalar* a = rows_tile(slot) + place.row * Shape::kStrideH;
    const int unit = place.part * Shape::kUnitsPerWarp;
    if (kTransposed) {
      multiply<kBlockH, false, false>(acc, a, Shape::kStrideH, weight_tile(slot) + unit,
                                      Shape::kStrideR);
    } else {
      multiply<kBlockH, false, true>(acc, a, Shape::kStrideH,
                                     weight_tile(slot) + unit * Shape::kStrideH, Shape::kStrideH);
    }
  };
  pipeline<Shape::kStages>(static_cast<int>(ceil_div(last - first, kBlockH)), load, compute);

  float* sums = reinterpret_cast<float*>(shared + Shape::kBottleneckBytes);
  __syncthreads();  // the sums take the place of tiles that other warps may still read
  store_product(sums + place.row * Shape::kStrideSum + place.part * Shape::kUnitsPerWarp,
                Shape::kStrideSum, acc);
  __syncthreads();
  return sums;
}

// Hands out u [kBlockT, first ... last], the bottleneck tile at the start of shared memory times
// the weight, [H, R], or [R, H] if kTransposed. `direct`, `features` and `store` are those of
// hand_out, with features of H in place of columns.
template <typename Shape, bool kTransposed, typename Features, typename Store>
__device__ __forceinline__ void multiply_out_of_bottleneck(unsigned char* shared,
                                                           const Matrix& weight, int64_t first,
                                                           int64_t last, bool direct,
                                                           Features features, Store store) {
  using Scalar = typename Shape::Scalar;
  constexpr int kThreads = Shape::kThreads, kBlockH = Shape::kBlockH, kBlockR = Shape::kBlockR;
  const WarpPlace<Shape> place;
  const Scalar* a = reinterpret_cast<Scalar*>(shared) + place.row * Shape::kStrideR;
  unsigned char* const tiles = shared + Shape::kBottleneckBytes;
  float* const room = reinterpret_cast<float*>(tiles + Shape::kStages * Shape::kWeightBytes +
                                               place.warp * Shape::kRoomBytes);

  const auto weight_tile = [&](int slot) {
    return reinterpret_cast<Scalar*>(tiles + slot * Shape::kWeightBytes);
  };
  const auto load = [&](int step, int slot) {
    const int64_t feature = first + static_cast<int64_t>(step) * kBlockH;
    if (kTransposed) {
      load_tile<kBlockR, kBlockH, kThreads>(weight_tile(slot), weight, 0, feature, Unchanged());
    } else {
      load_tile<kBlockH, kBlockR, kThreads>(weight_tile(slot), weight, feature, 0, Unchanged());
    }
  };
  const auto compute = [&](int step, int slot) {
    const int in_step = place.part * Shape::kFeaturesPerWarp;
    float acc[Shape::kFeaturesPerWarp / 8][4];
    clear(acc);
    if (kTransposed) {
      multiply<kBlockR, false, false>(acc, a, Shape::kStrideR, weight_tile(slot) + in_step,
                                      Shape::kStrideH);
    } else {
      multiply<kBlockR, false, true>(
          acc, a, Shape::kStrideR, weight_tile(slot) + in_step * Shape::kStrideR, Shape::kStrideR);
    }
    const int64_t feature = first + static_cast<int64_t>(step) * kBlockH + in_step;
    hand_out(
        room, acc, direct, [&](int column) { return features(feature + column); },
        [&](auto is_direct, float (&u)[kVector], int row, int column, const auto& of_feature) {
          store(is_direct, u, place.row + row, feature + column, of_feature);
        });
  };
  __syncthreads();  // the bottleneck tile is complete, and the sums beside it are read
  pipeline<Shape::kStages>(static_cast<int>(ceil_div(last - first, kBlockH)), load, compute);
}

// v = the sum over the slices of H, in their order, of partial [S, T, R] at (token, unit).
__device__ __forceinline__ void sum_partials(float (&v)[kVector], const View& partial,
                                             int64_t num_splits, int64_t num_tokens,
                                             int64_t bottleneck_size, int64_t token, int64_t unit) {
  Matrix slice{partial, num_tokens, bottleneck_size};
  load_vector(v, slice, token, unit);
  for (int64_t split = 1; split < num_splits; ++split) {
    slice.view.data = static_cast<float*>(slice.view.data) + num_tokens * bottleneck_size;
    add_vector(v, slice, token, unit);
  }
}

// Stores the block's sums into partial [S, T, R] at this split and these tokens.
template <typename Shape>
__device__ __forceinline__ void store_partial(const View& partial, int64_t split,
                                              int64_t num_tokens, int64_t bottleneck_size,
                                              int64_t first_token, const float* sums) {
  Matrix slice{partial, num_tokens, bottleneck_size};
  slice.view.data = static_cast<float*>(slice.view.data) + split * num_tokens * bottleneck_size;
  for_each_vector<Shape::kBlockT, Shape::kBlockR, Shape::kThreads>(
      threadIdx.x, [&](int row, int unit) {
        float v[kVector];
        load_whole(v, sums + row * Shape::kStrideSum + unit);
        store_vector(slice, first_token + row, unit, v);
      });
}

// Puts a finished vector of the bottleneck into the tile.
template <typename Shape>
__device__ __forceinline__ void store_bottleneck(unsigned char* shared, int row, int unit,
                                                 const float (&v)[kVector]) {
  using Scalar = typename Shape::Scalar;
  store_whole(reinterpret_cast<Scalar*>(shared) + row * Shape::kStrideR + unit, v);
}

}  // namespace adapterkern
