// The tiles of the cluster form and the product into the bottleneck; see cluster.cuh.
#pragma once

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
  static constexpr int kRoomBytes = room_bytes<kFeaturesPerStep>();  // of one warp
  // The sums into the bottleneck, and later the products out of it.
  static constexpr int kStrideSum = kBlockR + 8;  // rows of a fragment in banks of their own
  static constexpr int kSumBytes = larger(kWarpsH * kBlockT * kStrideSum * 4, kWarps* kRoomBytes);
  // The vectors of the bottleneck that a thread finishes, and the vectors of z that it keeps ready.
  static constexpr int kAcross = kBlockR / kVector;
  static constexpr int kVectors = larger(kBlockT / 2 * kAcross / kThreads, 1);
  static constexpr int kZBytes = kVectors * kThreads * 16;

  // For every panel two tiles of rows, both weights, and a float bias and factor for each feature.
  static constexpr int kPanelBytes =
      2 * kRowsPanelBytes + kWidePanelBytes + kTallPanelBytes + 2 * kPanel * 4;
  static constexpr int kBesideBytes = kBottleneckBytes + kSumBytes + kZBytes;
  // With a norm also a float weight and bias, and two floats of every row from each block.
  static constexpr int kNormPanelBytes = 2 * kPanel * 4;
  static constexpr int kNormBesideBytes = kMaxClusterSize * kBlockT * 2 * 4;
  __host__ __device__ static constexpr int shared_bytes(int64_t features, bool has_norm) {
    const auto panels = static_cast<int>(features / kPanel);
    return panels * kPanelBytes + kBesideBytes +
           (has_norm ? panels * kNormPanelBytes + kNormBesideBytes : 0);
  }
};

// The addresses of one block's tiles; README.md draws them.
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
  // The i-th vector of z of this thread, which no other reads.
  __device__ __forceinline__ Scalar* z(int i) const {
    return reinterpret_cast<Scalar*>(reinterpret_cast<unsigned char*>(sums()) + Shape::kSumBytes) +
           (i * Shape::kThreads + threadIdx.x) * kVector;
  }
  __device__ __forceinline__ float* bias() const {
    return reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(sums()) + Shape::kSumBytes +
                                    Shape::kZBytes);
  }
  __device__ __forceinline__ float* factor() const { return bias() + panels * kPanel; }
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

// Calls body(Type<the cluster shape of these tiles>()) if there is one: in half precision, for
// bottlenecks whose sums cost less to exchange than the rows cost to read again.
template <typename Scalar, int kBlockR, typename Body>
cudaError_t switch_cluster_shape(int64_t cluster_tokens, Body body) {
  if constexpr (sizeof(Scalar) == 2 && kBlockR <= kMaxClusterBottleneck) {
    if (cluster_tokens == 16) return body(Type<ClusterShape<Scalar, kBlockR, 16>>());
    if (cluster_tokens == 64) return body(Type<ClusterShape<Scalar, kBlockR, 64>>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace adapterkern
