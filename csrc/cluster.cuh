// The cluster form of forward and backward, from compute capability 9.0 on.
//
// A cluster of blocks owns kBlockT tokens at a time, and each block one slice of H: its columns of
// x, and its part of both weights, which stay in shared memory while the cluster walks over the
// tokens. The blocks exchange their partial sums through distributed shared memory: each finishes
// some rows of the bottleneck and stores them in all blocks. So x and the weights are read once.
#pragma once

#include "launch.cuh"
#include "products.cuh"
#include "static_switch.h"

namespace adapterkern {

constexpr int kMaxClusterSize = 8;  // blocks; every device with clusters can place them
constexpr int kMaxClusterBottleneck = 128;
constexpr int kPanel = 64;  // tiles over a slice are cut into panels of as many features

template <typename ScalarT, int kBlockRT, int kBlockTT>
struct ClusterShape {
  using Scalar = ScalarT;
  static constexpr int kBlockR = kBlockRT, kBlockT = kBlockTT;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

  // In the product into the bottleneck the warps divide the tokens, the units, then the features.
  static constexpr int kWarpsT = kBlockT / 16;
  static constexpr int kWarpsR = smaller(kWarps / kWarpsT, kBlockR / 16);
  static constexpr int kWarpsH = kWarps / kWarpsT / kWarpsR;
  static constexpr int kUnitsPerWarp = kBlockR / kWarpsR;
  // In the product out of it they divide the tokens and the features.
  static constexpr int kWarpsOut = kWarps / kWarpsT;
  static constexpr int kFeaturesPerStep = 32;

  static constexpr int kStrideR = kBlockR + kPadding<Scalar>;
  static constexpr int kStridePanel = kPanel + kPadding<Scalar>;
  static constexpr int kRowsPanelBytes = tile_bytes<Scalar>(kBlockT, kPanel);
  static constexpr int kWidePanelBytes = tile_bytes<Scalar>(kBlockR, kPanel);  // of [R, H]
  static constexpr int kTallPanelBytes = tile_bytes<Scalar>(kPanel, kBlockR);  // of [H, R]
  static constexpr int kBottleneckBytes = tile_bytes<Scalar>(kBlockT, kBlockR);
  static constexpr int kRoomBytes = 16 * kRoomStride<kFeaturesPerStep> * 4;  // of one warp
  // The sums into the bottleneck, and later the products out of it.
  static constexpr int kStrideSum = kBlockR + 8;  // rows of a fragment in banks of their own
  static constexpr int kSumBytes = larger(kWarpsH * kBlockT * kStrideSum * 4, kWarps* kRoomBytes);

  __host__ __device__ static constexpr int shared_bytes(int64_t features) {
    const int panels = static_cast<int>(features / kPanel);
    return panels * (2 * kRowsPanelBytes + kWidePanelBytes + kTallPanelBytes) + kBottleneckBytes +
           kSumBytes;
  }
};

// `rows` [T, H] times `into` gives the bottleneck, and that times `out` the output; without `out`
// there is none. The weights are [R, H] and [H, R], or the other way round if transposed.
struct ClusterProblem {
  Matrix rows, into, out;
  int64_t features;  // features of one block, a multiple of kPanel
};

// The addresses of one block's tiles.
template <typename Shape, bool kTransposed>
struct ClusterTiles {
  using Scalar = typename Shape::Scalar;
  static constexpr int kIntoBytes = kTransposed ? Shape::kTallPanelBytes : Shape::kWidePanelBytes;
  static constexpr int kOutBytes = kTransposed ? Shape::kWidePanelBytes : Shape::kTallPanelBytes;
  unsigned char* shared;
  int panels;

  __device__ __forceinline__ Scalar* into(int panel) const {
    return reinterpret_cast<Scalar*>(shared + panel * kIntoBytes);
  }
  __device__ __forceinline__ Scalar* out(int panel) const {
    return reinterpret_cast<Scalar*>(shared + panels * kIntoBytes + panel * kOutBytes);
  }
  __device__ __forceinline__ Scalar* rows(int slot, int panel) const {
    return reinterpret_cast<Scalar*>(shared + panels * (kIntoBytes + kOutBytes) +
                                     (slot * panels + panel) * Shape::kRowsPanelBytes);
  }
  __device__ __forceinline__ Scalar* bottleneck() const { return rows(2, 0); }
  __device__ __forceinline__ float* sums() const {
    return reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(bottleneck()) +
                                    Shape::kBottleneckBytes);
  }
};

// sums [kBlockT, kBlockR] = the block's columns of the rows times its part of `into`.
template <typename Shape, bool kTransposed>
__device__ __forceinline__ void sum_slice(const ClusterTiles<Shape, kTransposed>& tiles, int slot) {
  const int warp = threadIdx.x / kWarpSize, row = warp % Shape::kWarpsT * 16;
  const int part = warp / Shape::kWarpsT / Shape::kWarpsR;
  const int unit = warp / Shape::kWarpsT % Shape::kWarpsR * Shape::kUnitsPerWarp;
  float acc[Shape::kUnitsPerWarp / 8][4];
  clear(acc);
  for (int step = part; step < tiles.panels * (kPanel / 16); step += Shape::kWarpsH) {
    const int panel = step / (kPanel / 16), feature = step % (kPanel / 16) * 16;
    const auto* a = tiles.rows(slot, panel) + row * Shape::kStridePanel + feature;
    if (kTransposed) {
      multiply<16, false, false>(acc, a, Shape::kStridePanel,
                                 tiles.into(panel) + feature * Shape::kStrideR + unit,
                                 Shape::kStrideR);
    } else {
      multiply<16, false, true>(acc, a, Shape::kStridePanel,
                                tiles.into(panel) + unit * Shape::kStridePanel + feature,
                                Shape::kStridePanel);
    }
  }
  constexpr int kPartSize = Shape::kBlockT * Shape::kStrideSum;
  float* const sums = tiles.sums();
  store_product(sums + part * kPartSize + row * Shape::kStrideSum + unit, Shape::kStrideSum, acc);
  if (Shape::kWarpsH == 1) return;
  __syncthreads();  // the parts of all warps are there
  for (int index = threadIdx.x; index < kPartSize; index += Shape::kThreads) {
    float sum = sums[index];
#pragma unroll
    for (int other = 1; other < Shape::kWarpsH; ++other) sum += sums[other * kPartSize + index];
    sums[index] = sum;
  }
}

// The vectors of the bottleneck that this thread finishes for its block's share of the rows.
template <typename Shape>
struct Share {
  static constexpr int kAcross = Shape::kBlockR / kVector;
  static constexpr int kMost = larger(Shape::kBlockT / 2 * kAcross / Shape::kThreads, 1);
  int rows = Shape::kBlockT / cluster_size(), first = cluster_rank() * rows;

  // Calls body(i, row, unit) for the i-th vector.
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int index = threadIdx.x + i * Shape::kThreads;
      if (index < rows * kAcross) body(i, first + index / kAcross, index % kAcross * kVector);
    }
  }
};

// v = the sum over the blocks, in their order, of their sums at (row, unit).
template <typename Shape, bool kTransposed>
__device__ __forceinline__ void sum_blocks(const ClusterTiles<Shape, kTransposed>& tiles,
                                           float (&v)[kVector], int row, int unit) {
  const int size = cluster_size();
  const float* from = tiles.sums() + row * Shape::kStrideSum + unit;
  float parts[kMaxClusterSize][2][4];
#pragma unroll
  for (int block = 0; block < kMaxClusterSize; ++block) {  // all loads start before one is used
    if (block >= size) break;
    load_remote_16(parts[block][0], from, block);
    load_remote_16(parts[block][1], from + 4, block);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = parts[0][i / 4][i % 4];
#pragma unroll
  for (int block = 1; block < kMaxClusterSize; ++block) {
    if (block >= size) break;
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] += parts[block][i / 4][i % 4];
  }
}

// Puts v into the bottleneck tile of every block.
template <typename Shape, bool kTransposed>
__device__ __forceinline__ void store_everywhere(const ClusterTiles<Shape, kTransposed>& tiles,
                                                 const float (&v)[kVector], int row, int unit) {
  using Scalar = typename Shape::Scalar;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack(v + 2 * i, Scalar());
  Scalar* to = tiles.bottleneck() + row * Shape::kStrideR + unit;
  const int size = cluster_size();
  for (int block = 0; block < size; ++block) store_remote_16(to, words, block);
}

// Hands out the bottleneck times the block's part of `out`. `direct`, `features` and `store` are
// those of hand_out, with features counted within the slice; `store` also receives a pointer to the
// same elements of the rows.
template <typename Shape, bool kTransposed, typename Features, typename Store>
__device__ __forceinline__ void multiply_out(const ClusterTiles<Shape, kTransposed>& tiles,
                                             int slot, bool direct, Features features,
                                             Store store) {
  constexpr int kFeatures = Shape::kFeaturesPerStep, kSteps = kPanel / kFeatures;
  const int warp = threadIdx.x / kWarpSize, first_row = warp % Shape::kWarpsT * 16;
  const auto* a = tiles.bottleneck() + first_row * Shape::kStrideR;
  float* const room = tiles.sums() + warp * (Shape::kRoomBytes / 4);
  for (int step = warp / Shape::kWarpsT; step < tiles.panels * kSteps; step += Shape::kWarpsOut) {
    const int panel = step / kSteps, in_panel = step % kSteps * kFeatures;
    float acc[kFeatures / 8][4];
    clear(acc);
    if (kTransposed) {
      multiply<Shape::kBlockR, false, false>(acc, a, Shape::kStrideR, tiles.out(panel) + in_panel,
                                             Shape::kStridePanel);
    } else {
      multiply<Shape::kBlockR, false, true>(
          acc, a, Shape::kStrideR, tiles.out(panel) + in_panel * Shape::kStrideR, Shape::kStrideR);
    }
    const int feature = panel * kPanel + in_panel;
    const auto* in = tiles.rows(slot, panel) + first_row * Shape::kStridePanel + in_panel;
    hand_out(
        room, acc, direct, [&](int column) { return features(feature + column); },
        [&](auto is_direct, float (&u)[kVector], int row, int column, const auto& of_feature) {
          store(is_direct, u, first_row + row, feature + column, of_feature,
                in + row * Shape::kStridePanel + column);
        });
  }
}

// Walks over the tokens. For every vector of the bottleneck prepare(ahead, token, unit) loads the
// operands of finish(v, ahead, kept, unit), which turns sums into elements, and
// keep(kept, token, unit) stores what later kernels read. `direct`, `features` and `store` are
// those of multiply_out, with features of H.
// A cluster barrier stands before and after the exchange, the only time when blocks access each
// other's shared memory: after it a block may overwrite its sums, or exit. The barrier also waits
// for a thread's global memory accesses, so prepare and keep stand outside.
template <typename Shape, bool kTransposed, typename Transform, typename Prepare, typename Finish,
          typename Keep, typename Features, typename Store>
__device__ __forceinline__ void run_cluster(unsigned char* shared, const ClusterProblem& problem,
                                            Transform transform, Prepare prepare, Finish finish,
                                            Keep keep, bool direct, Features features,
                                            Store store) {
  using Scalar = typename Shape::Scalar;
  constexpr int kThreads = Shape::kThreads, kBlockT = Shape::kBlockT, kBlockR = Shape::kBlockR;
  const ClusterTiles<Shape, kTransposed> tiles{shared, static_cast<int>(problem.features / kPanel)};
  const int64_t first_feature = cluster_rank() * problem.features;
  const int64_t token_blocks = ceil_div(problem.rows.rows, kBlockT);
  const int64_t clusters = gridDim.x / cluster_size();
  const bool stores = problem.out.view.data != nullptr;
  const Share<Shape> share;

  const auto load_wide = [&](Scalar* tile, const Matrix& weight, int64_t feature) {
    load_tile<kBlockR, kPanel, kThreads>(tile, weight, 0, feature, Unchanged());
  };
  const auto load_tall = [&](Scalar* tile, const Matrix& weight, int64_t feature) {
    load_tile<kPanel, kBlockR, kThreads>(tile, weight, feature, 0, Unchanged());
  };
  const auto load_rows = [&](int64_t block, int slot) {
    for (int panel = 0; panel < tiles.panels; ++panel) {
      load_tile<kBlockT, kPanel, kThreads>(tiles.rows(slot, panel), problem.rows, block * kBlockT,
                                           first_feature + panel * kPanel, transform);
    }
  };

  int64_t block = blockIdx.x / cluster_size();
  load_rows(block, 0);
  for (int panel = 0; panel < tiles.panels; ++panel) {
    const int64_t feature = first_feature + panel * kPanel;
    if (kTransposed) {
      load_tall(tiles.into(panel), problem.into, feature);
    } else {
      load_wide(tiles.into(panel), problem.into, feature);
    }
  }
  copy_async_commit();
  for (int panel = 0; stores && panel < tiles.panels; ++panel) {
    const int64_t feature = first_feature + panel * kPanel;
    if (kTransposed) {
      load_wide(tiles.out(panel), problem.out, feature);
    } else {
      load_tall(tiles.out(panel), problem.out, feature);
    }
  }
  copy_async_commit();
  for (int slot = 0; block < token_blocks; block += clusters, slot ^= 1) {
    copy_async_wait<1>();  // for these rows
    __syncthreads();       // and the sums and the other slot are no longer read
    if (block + clusters < token_blocks) load_rows(block + clusters, slot ^ 1);
    copy_async_commit();
    sum_slice(tiles, slot);
    float kept[Share<Shape>::kMost][kVector];  // holds `ahead` until finish
    share.for_each(
        [&](int i, int row, int unit) { prepare(kept[i], block * kBlockT + row, unit); });
    copy_async_wait<1>();  // for the weight out, the first time
    cluster_barrier();     // the sums of every block are there
    share.for_each([&](int i, int row, int unit) {
      float v[kVector];
      sum_blocks(tiles, v, row, unit);
      finish(v, kept[i], kept[i], unit);
      store_everywhere(tiles, v, row, unit);
    });
    cluster_barrier();  // the bottleneck is complete
    share.for_each([&](int i, int row, int unit) { keep(kept[i], block * kBlockT + row, unit); });
    if (stores) {
      multiply_out(
          tiles, slot, direct, [&](int feature) { return features(first_feature + feature); },
          [&](auto is_direct, float (&u)[kVector], int row, int feature, const auto& of_feature,
              const auto* in) {
            store(is_direct, u, block * kBlockT + row, first_feature + feature, of_feature, in);
          });
    }
    copy_async_commit();  // an empty group keeps the count of pending groups
  }
}

// Calls body(Type<the cluster shape with the tiles of this row-block shape>()) if there is one: in
// half precision, for bottlenecks whose sums cost less to exchange than x costs to read again.
template <typename Shape, typename Body>
cudaError_t switch_cluster_shape(int64_t cluster_tokens, Body body) {
  using Scalar = typename Shape::Scalar;
  if constexpr (Shape::kHalf && Shape::kBlockR <= kMaxClusterBottleneck) {
    if (cluster_tokens == 16) return body(Type<ClusterShape<Scalar, Shape::kBlockR, 16>>());
    if (cluster_tokens == 64) return body(Type<ClusterShape<Scalar, Shape::kBlockR, 64>>());
  }
  return cudaErrorInvalidValue;
}

// Launches `kernel` of this shape, forward or backward.
template <typename Shape, typename Params>
cudaError_t launch_cluster(void (*kernel)(Params), const Params& params, cudaStream_t stream) {
  const auto size = static_cast<unsigned>(params.num_splits);
  return launch(kernel, dim3(static_cast<unsigned>(params.num_clusters) * size), Shape::kThreads,
                Shape::shared_bytes(params.features_per_split), params, stream, size);
}

}  // namespace adapterkern
