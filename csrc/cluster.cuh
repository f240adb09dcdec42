// The cluster form of forward and backward, from compute capability 9.0 on.
//
// A cluster of blocks owns kBlockT tokens at a time, and each block one slice of H: its columns of
// x, and its part of both weights, which stay in shared memory while the cluster walks over the
// tokens. The blocks exchange their partial sums through distributed shared memory: each finishes
// some rows of the bottleneck and stores them in all blocks. So x and the weights are read once.
#pragma once

#include "cluster_tiles.cuh"
#include "launch.cuh"
#include "norm.cuh"
#include "policy.cuh"

namespace adapterkern {

// The vectors of the bottleneck that this thread finishes for its block's share of the rows. It
// keeps its units.
template <typename Shape>
struct Share {
  static constexpr int kAcross = Shape::kAcross;
  static_assert(Shape::kThreads % kAcross == 0, "a thread would change its units");
  int rows = Shape::kBlockT / cluster_size(), first = cluster_rank() * rows;
  int unit = threadIdx.x % kAcross * kVector;

  // Calls body(i, row) for the i-th vector.
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      const int index = threadIdx.x + i * Shape::kThreads;
      if (index < rows * kAcross) body(i, first + index / kAcross);
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

// Loads a vector of T as it is, to be added later.
template <typename T>
__device__ __forceinline__ void load_raw(Words<4> (&words)[2], const T* from) {
#pragma unroll
  for (int i = 0; i < kVector / (4 * kPerWord<T>); ++i) {
    words[i] = load_words<Words<4>>(from + i * 4 * kPerWord<T>);
  }
}

// v += the vector of T that load_raw loaded.
template <typename T>
__device__ __forceinline__ void add_raw(float (&v)[kVector], const Words<4> (&words)[2]) {
  float more[kVector];
#pragma unroll
  for (int i = 0; i < kVector / kPerWord<T>; ++i) {
    unpack(more + i * kPerWord<T>, words[i / 4].values[i % 4], T());
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] += more[i];
}

// Writes the output over the block's slice: the bottleneck times the block's part of the weight
// out, and what is added to it. The rows themselves come from their tile, if it holds them
// unchanged; loads of what else is added start before the product, all of a lane's together. Where
// a norm follows, the sum replaces the rows in the tile, and the warp's moments its product in the
// room.
template <bool kDirect, typename Shape, typename Policy>
__device__ __forceinline__ void write_slice(const ClusterTiles<Shape, Policy::kTransposed>& tiles,
                                            const Policy& policy, int slot, int64_t first_token,
                                            int64_t first_feature, bool rows_in_tile) {
  constexpr int kFeatures = Shape::kFeaturesPerStep, kSteps = kPanel / kFeatures;
  using Scalar = typename Shape::Scalar;
  using Rows = LaneRows<chunk_of(kFeatures)>;
  static_assert(chunk_of(kFeatures) == kFeatures, "a lane has one column in a step");
  const int warp = threadIdx.x / kWarpSize, first_row = warp % Shape::kWarpsT * 16;
  const auto* a = tiles.bottleneck() + first_row * Shape::kStrideR;
  float* const room = tiles.sums() + warp * (Shape::kRoomBytes / 4);
  const Rows lane(room);
  const Added added = policy.added();
  const int64_t num_tokens = policy.params.num_tokens, hidden_size = policy.params.hidden_size;
  [[maybe_unused]] LaneMoments<Rows::kCount> moments;
  for (int step = warp / Shape::kWarpsT; step < tiles.panels * kSteps; step += Shape::kWarpsOut) {
    const int panel = step / kSteps, in_panel = step % kSteps * kFeatures;
    const int feature = panel * kPanel + in_panel;  // of the slice
    const int64_t lane_feature = first_feature + feature + lane.column;
    const bool exists = lane_feature < hidden_size;
    Words<4> fetched[Policy::kMostAdded][Rows::kCount][2] = {};  // two hold a vector of float32
#pragma unroll
    for (int index = 0; kDirect && index < Policy::kMostAdded; ++index) {
      if (index >= added.count || (index == 0 && rows_in_tile)) continue;
      with_type_of<Scalar>(added.rows[index].view, [&](auto* type) {
        using Type = std::remove_pointer_t<decltype(type)>;
        lane.for_each_unrolled([&](int i, int row, const float*) {
          const int64_t token = first_token + first_row + row;
          if (!exists || token >= num_tokens) return;
          load_raw(fetched[index][i], added.rows[index].template at<Type>(token, lane_feature));
        });
      });
    }
    float acc[kFeatures / 8][4];
    clear(acc);
    if constexpr (Policy::kTransposed) {
      multiply<Shape::kBlockR, false, false>(acc, a, Shape::kStrideR, tiles.out(panel) + in_panel,
                                             Shape::kStridePanel);
    } else {
      multiply<Shape::kBlockR, false, true>(
          acc, a, Shape::kStrideR, tiles.out(panel) + in_panel * Shape::kStrideR, Shape::kStrideR);
    }
    auto* const in = tiles.rows(slot, panel) + first_row * Shape::kStridePanel + in_panel;
    hand_out(room, acc, [&](auto rows, int column) {
      if constexpr (!kDirect) {
        rows.for_each([&](int row, const float* from) {
          policy.store_any(from, first_token + first_row + row, first_feature + feature + column);
        });
        return;
      }
      const auto of_feature = policy.features(tiles.bias(), tiles.factor(), feature + column);
      float u[Rows::kCount][kVector];
      rows.for_each_unrolled([&](int i, int row, const float* from) {
        load_whole(u[i], from);
        policy.scale(u[i], of_feature);
        if (rows_in_tile) add_whole(u[i], in + row * Shape::kStridePanel + column);
      });
#pragma unroll
      for (int index = 0; index < Policy::kMostAdded; ++index) {
        if (index >= added.count || (index == 0 && rows_in_tile)) continue;
        with_type_of<Scalar>(added.rows[index].view, [&](auto* type) {
          using Type = std::remove_pointer_t<decltype(type)>;
          rows.for_each_unrolled(
              [&](int i, int, const float*) { add_raw<Type>(u[i], fetched[index][i]); });
        });
      }
      if constexpr (Policy::kHasNorm) {
        if (exists) moments.add([&](int i) { return moments_of(u[i], policy.has_mean()); });
        rows.for_each_unrolled([&](int i, int row, const float*) {
          store_whole(in + row * Shape::kStridePanel + column, u[i]);
        });
        return;
      }
      const Matrix output = policy.output();
      with_type_of<Scalar>(output.view, [&](auto* type) {
        using Type = std::remove_pointer_t<decltype(type)>;
        rows.for_each_unrolled([&](int i, int row, const float*) {
          const int64_t token = first_token + first_row + row;
          if (!exists || token >= num_tokens) return;
          store_whole_global(output.template at<Type>(token, lane_feature), u[i]);
        });
      });
    });
  }
  if constexpr (Policy::kHasNorm) {
    moments.gather(Rows::kAcross);
    if (lane.column > 0) return;
#pragma unroll
    for (int i = 0; i < Rows::kCount; ++i) {
      const float of_row[4] = {moments.rows[i].mean, moments.rows[i].squares, moments.count};
      store_whole(room + (lane.first + i * Rows::kRowsApart) * 4, of_row);
    }
  }
}

// Walks over the tokens. A cluster barrier stands before and after the exchange, and after that of
// a norm's moments, the only times when blocks access each other's shared memory: after it a block
// may overwrite its sums, or exit. The barrier also waits for a thread's global memory accesses, so
// those of the bottleneck stand outside it: z is copied with the weight out, and later with the
// output of the tokens before. So do the outputs of a norm, which follow the last barrier.
template <typename Shape, typename Policy>
__device__ __forceinline__ void run_cluster(unsigned char* shared, const Policy& policy) {
  using Scalar = typename Shape::Scalar;
  constexpr bool kTransposed = Policy::kTransposed;
  constexpr int kThreads = Shape::kThreads, kBlockT = Shape::kBlockT, kBlockR = Shape::kBlockR;
  const auto& params = policy.params;
  const int64_t hidden_size = params.hidden_size;
  const ClusterTiles<Shape, kTransposed> tiles{
      shared, static_cast<int>(params.features_per_split / kPanel)};
  const int64_t first_feature = cluster_rank() * params.features_per_split;
  const int64_t token_blocks = ceil_div(params.num_tokens, kBlockT);
  const int64_t clusters = gridDim.x / cluster_size();
  const bool writes = policy.features_out() > 0, direct = policy.is_direct();
  const Matrix all_rows = policy.rows(hidden_size);
  const bool rows_in_tile = params.add_input && !policy.transform().is_active() &&
                            all_rows.view.dtype == kDTypeOf<Scalar>;
  const Share<Shape> share;
  const auto of_units = policy.of_units(share.unit);

  const auto load_wide = [&](Scalar* tile, const Matrix& weight, int64_t feature) {
    load_tile<kBlockR, kPanel, kThreads>(tile, weight, 0, feature, Unchanged());
  };
  const auto load_tall = [&](Scalar* tile, const Matrix& weight, int64_t feature) {
    load_tile<kPanel, kBlockR, kThreads>(tile, weight, feature, 0, Unchanged());
  };
  const auto load_rows = [&](int64_t block, int slot) {
#pragma unroll 1
    for (int panel = 0; panel < tiles.panels; ++panel) {
      load_tile<kBlockT, kPanel, kThreads>(tiles.rows(slot, panel), all_rows, block * kBlockT,
                                           first_feature + panel * kPanel, policy.transform());
    }
  };
  const auto load_z = [&](int64_t block) {
    if constexpr (Policy::kReadsZ) {
      share.for_each([&](int i, int row) {
        fetch_units(tiles.z(i), policy.z(), block * kBlockT + row, share.unit);
      });
    }
  };

  int64_t block = blockIdx.x / cluster_size();
  load_rows(block, 0);
#pragma unroll 1
  for (int panel = 0; panel < tiles.panels; ++panel) {
    const int64_t feature = first_feature + panel * kPanel;
    if constexpr (kTransposed) {
      load_tall(tiles.into(panel), policy.into(hidden_size), feature);
    } else {
      load_wide(tiles.into(panel), policy.into(hidden_size), feature);
    }
  }
  copy_async_commit();
#pragma unroll 1
  for (int panel = 0; writes && panel < tiles.panels; ++panel) {
    const int64_t feature = first_feature + panel * kPanel;
    if constexpr (kTransposed) {
      load_wide(tiles.out(panel), policy.out(), feature);
    } else {
      load_tall(tiles.out(panel), policy.out(), feature);
    }
  }
  load_z(block);
  copy_async_commit();
  load_features<kThreads>(tiles.bias(), tiles.factor(), tiles.panels * kPanel, policy,
                          first_feature);
  [[maybe_unused]] const NormTiles<Shape, kTransposed> norm{tiles};
  if constexpr (Policy::kHasNorm) load_norm(norm, policy, first_feature);
  for (int slot = 0; block < token_blocks; block += clusters, slot ^= 1) {
    copy_async_wait<1>();  // for these rows
    __syncthreads();       // and the sums and the other slot are no longer read
    if (block + clusters < token_blocks) load_rows(block + clusters, slot ^ 1);
    copy_async_commit();
    sum_slice(tiles, slot);
    copy_async_wait<1>();  // for z, and for the weight out, the first time
    cluster_barrier();     // the sums of every block are there
    typename Policy::Kept kept[Shape::kVectors];
    share.for_each([&](int i, int row) {
      float v[kVector], z[kVector] = {};
      sum_blocks(tiles, v, row, share.unit);
      if constexpr (Policy::kReadsZ) load_whole(z, tiles.z(i));
      policy.finish(v, of_units, z, kept[i], share.unit);
      store_everywhere(tiles, v, row, share.unit);
    });
    cluster_barrier();  // the bottleneck is complete
    share.for_each(
        [&](int i, int row) { policy.keep(kept[i], block * kBlockT + row, share.unit); });
    load_z(block + clusters);
    copy_async_commit();  // even an empty group keeps the count of pending groups
    if constexpr (Policy::kHasNorm) {
      write_slice<true, Shape>(tiles, policy, slot, block * kBlockT, first_feature, rows_in_tile);
      exchange_moments(norm);
      write_normed(norm, policy, slot, block * kBlockT, first_feature);
    } else if (writes && direct) {
      write_slice<true, Shape>(tiles, policy, slot, block * kBlockT, first_feature, rows_in_tile);
    } else if (writes) {
      write_slice<false, Shape>(tiles, policy, slot, block * kBlockT, first_feature, false);
    }
  }
}

// Launches `kernel` of this shape, forward or backward.
template <typename Shape, bool kHasNorm, typename Params>
cudaError_t launch_cluster(void (*kernel)(Params), const Params& params, cudaStream_t stream) {
  const auto size = static_cast<unsigned>(params.num_splits);
  return launch(kernel, dim3(static_cast<unsigned>(params.num_clusters) * size), Shape::kThreads,
                Shape::shared_bytes(params.features_per_split, kHasNorm), params, stream, size);
}

}  // namespace adapterkern
