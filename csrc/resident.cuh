// The resident form of forward and backward, for compute capability 9.0: the rows stay in shared
// memory from the product into the bottleneck until the output has taken their place.
//
// A cluster of blocks walks over tiles of 64 tokens; each block has a slice of H. Its warps have
// roles, which meet in rings of slots alone: some copy the rows, some either weight, one warpgroup
// multiplies into the bottleneck and one out of it. So the rows of the next tile arrive as the
// output of this one leaves, and memory is busy both ways.
//
// The blocks exchange their sums by st.async, without a barrier of the cluster: each sends the sums
// of some rows to the block that finishes them, and this one the finished rows to all. A block
// sends the sums of a tile when it has the bottleneck of the tile before, for which all blocks have
// read all sums, and when its place for the next one is free. So neither is overwritten while it is
// read; and as a block waits for all that is sent to it, it does not end before that has landed.
//
// Warp specialisation and rings of mbarriers are those of CUTLASS's kernels for Hopper
// (github.com/NVIDIA/cutlass, media/docs/cpp/efficient_gemm.md), the reduction by st.async that of
// QuACK (github.com/Dao-AILab/quack).
#pragma once

#include "launch.cuh"
#include "policy.cuh"
#include "resident_tiles.cuh"
#include "static_switch.h"

namespace adapterkern {

// The elements of a [64, 64] product that a lane holds: pairs of columns, in rows g and g + 8 of
// its warp's 16.
struct LanePairs {
  static constexpr int kCount = 32;
  int row = threadIdx.x / kWarpSize % 4 * 16 + threadIdx.x % kWarpSize / 4;
  int column = threadIdx.x % 4 * 2;
  int first = row % 8 * kVector + column;  // where the first pair of a row is in it

  // Where the pair from element i on is in its row of a tile, and its address: element_of, in few
  // instructions.
  __device__ __forceinline__ int in_row(int i) const { return first ^ i / 4 * kVector; }
  template <typename Half>
  __device__ __forceinline__ Half* place(Half* tile, int i) const {
    return tile + row * kTileSide + i / 2 % 2 * 8 * kTileSide + in_row(i);
  }

  // Calls body(index of the pair's first element, which of the two rows, column).
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) body(i, i / 2 % 2, column + i / 4 * 8);
  }
};

// acc += a b for the warpgroup: tiles of 64 tokens, and of a weight that is transposed or not.
// Copies and other blocks filled them, so each thread fences what it waited for.
template <bool kTransposed, typename Half>
__device__ __forceinline__ void multiply_tiles(float (&acc)[LanePairs::kCount], const Half* a,
                                               const Half* b) {
  // One step is 16 elements along a row, or 16 rows; descriptors count 16 bytes.
  constexpr int kStepA = 2, kStepB = kTransposed ? 16 * 8 : 2;
  const uint64_t from_a = operand_at(a), from_b = operand_at(b);
  fence_async_proxy();
  warpgroup_fence(acc);
#pragma unroll
  for (int step = 0; step < kTileSide / 16; ++step) {
    wgmma_64x64x16<kTransposed>(acc, from_a + step * kStepA, from_b + step * kStepB, Half());
  }
  warpgroup_wait(acc);
}

template <typename Policy>
struct ResidentBlock {
  using Scalar = typename Policy::Scalar;
  using Shape = ResidentShape;
  static constexpr bool kTransposed = Policy::kTransposed;

  const Policy& policy;
  const ResidentTiles& tiles;
  Added more;  // rows to add that are not those of the product
  bool adds_rows, writes;
  int64_t first_feature;  // of the block's slice
  int panels;
  int share = kTileSide / cluster_size();  // rows of the bottleneck that each block finishes

  template <typename Body>
  __device__ __forceinline__ void for_each_tile(Body body) const {
    const int size = cluster_size();
    const int64_t count = ceil_div(policy.params.num_tokens, kTileSide),
                  clusters = gridDim.x / size;
#pragma unroll 1
    for (int64_t tile = blockIdx.x / size; tile < count; tile += clusters) body(tile * kTileSide);
  }
  // Calls body(the first feature of a panel, of the slice).
  template <typename Body>
  __device__ __forceinline__ void for_each_panel(Body body) const {
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) body(panel * kTileSide);
  }

  // Fills a ring with what copy(turn, first token, first feature) copies for each panel. A slot is
  // filled when the copies of all threads have landed, for which none of them waits.
  template <typename Copy>
  __device__ __forceinline__ void fill(const Ring& ring, Copy copy) const {
    Turn turn(ring);
    for_each_tile([&](int64_t token) {
      for_each_panel([&](int in_slice) {
        turn.wait_free();
        copy(turn, token, first_feature + in_slice);
        copy_async_arrive(turn.filled());
        turn.pass();
      });
    });
    copy_async_commit();
    copy_async_wait<0>();
  }
  __device__ __forceinline__ void copy_rows(int thread) const {
    const Matrix rows = policy.rows(policy.params.hidden_size);
    fill(tiles.rows, [&](const Turn& turn, int64_t token, int64_t feature) {
      copy_swizzled<Shape::kRowThreads>(turn.template tile<Scalar>(), rows, token, feature, thread);
    });
  }
  __device__ __forceinline__ void copy_weight_in(int lane) const {
    const Matrix weight = policy.into(policy.params.hidden_size);
    fill(tiles.in, [&](const Turn& turn, int64_t, int64_t feature) {
      copy_swizzled<Shape::kWeightThreads>(turn.template tile<Scalar>(), weight,
                                           kTransposed ? feature : 0, kTransposed ? 0 : feature,
                                           lane);
    });
  }
  __device__ __forceinline__ void copy_weight_out(int lane) const {
    if (!writes) return;
    const Matrix weight = policy.out();
    fill(tiles.out, [&](const Turn& turn, int64_t token, int64_t feature) {
      copy_swizzled<Shape::kWeightThreads>(turn.template tile<Scalar>(), weight,
                                           kTransposed ? 0 : feature, kTransposed ? feature : 0,
                                           lane);
#pragma unroll
      for (int i = 0; i < Policy::kMostAdded; ++i) {
        if (i >= more.count) break;
        copy_swizzled<Shape::kWeightThreads>(turn.template tile<Scalar>(1 + i), more.rows[i], token,
                                             feature, lane);
      }
    });
  }

  // The rows times the weight into the bottleneck, and what the policy makes of the sums.
  __device__ __forceinline__ void multiply_in() const {
    Turn rows(tiles.rows), weight(tiles.in), sums(tiles.sums), bottleneck(tiles.bottleneck);
    Turn previous = bottleneck;
    const auto of_units = policy.of_units(threadIdx.x % (kTileSide / kVector) * kVector);
    bool is_first = true;
    for_each_tile([&](int64_t token) {
      float acc[LanePairs::kCount] = {};
      for_each_panel([&](int) {
        rows.wait_filled();
        weight.wait_filled();
        multiply_tiles<kTransposed>(acc, rows.template tile<Scalar>(),
                                    weight.template tile<Scalar>());
        weight.free();
        weight.pass();
        rows.pass();
      });
      if (!is_first) {
        previous.wait_filled();
        previous.pass();
      }
      is_first = false;
      bottleneck.wait_free();
      if (threadIdx.x == 0) {
        barrier_expect(sums.filled(), Shape::kSumBytes);
        barrier_expect(bottleneck.filled(), kTileBytes);
      }
      send_sums(acc, sums);
      finish_share(of_units, sums, bottleneck, token);
      sums.pass();
      bottleneck.pass();
    });
  }

  // Sends the sums of each row to the block that finishes it: each has as many rows, and a place
  // [blocks, rows, 64] for the sums of all blocks, swizzled as tiles are.
  __device__ __forceinline__ void send_sums(const float (&acc)[LanePairs::kCount],
                                            const Turn& sums) const {
    const LanePairs pairs;
    uint32_t to[2], barrier[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = pairs.row + 8 * i, owner = row * cluster_size() / kTileSide;
      const int place = cluster_rank() * share + (row & (share - 1));
      to[i] = remote_address(sums.template tile<float>() + place * kTileSide, owner);
      barrier[i] = remote_address(sums.filled(), owner);
    }
    pairs.for_each([&](int i, int which, int) {
      const uint32_t words[2] = {bits_as<uint32_t>(acc[i]), bits_as<uint32_t>(acc[i + 1])};
      store_async(to[which] + pairs.in_row(i) * 4, words, barrier[which]);
    });
  }

  // Finishes the block's share of the rows and sends them to all blocks. z, which the backward
  // reads, is copied to where they go.
  __device__ __forceinline__ void finish_share(const typename Policy::OfUnits& of_units,
                                               const Turn& sums, const Turn& bottleneck,
                                               int64_t first_token) const {
    constexpr int kAcross = kTileSide / kVector;
    const int size = cluster_size(), first_row = cluster_rank() * share;
    const int first = threadIdx.x / kAcross, unit = threadIdx.x % kAcross * kVector;
    Scalar* const tile = bottleneck.template tile<Scalar>();
    const auto for_each_row = [&](auto body) {
#pragma unroll 1  // one place for the formulas of every activation
      for (int row = first; row < share; row += Shape::kGroupThreads / kAcross) {
        body(row, first_token + first_row + row, element_of(tile, first_row + row, unit));
      }
    };
    if constexpr (Policy::kReadsZ) {
      for_each_row(
          [&](int, int64_t token, Scalar* place) { fetch_units(place, policy.z(), token, unit); });
      copy_async_commit();
    }
    // A warp without rows may come here when the sums of the next tile are complete already: it
    // must not wait, or it would for those of the tile after.
    if (first < share) sums.wait_filled();
    copy_async_wait<0>();
    for_each_row([&](int row, int64_t token, Scalar* place) {
      float v[kVector] = {}, z[kVector] = {};
      typename Policy::Kept kept;
#pragma unroll 1
      for (int block = 0; block < size; ++block) {  // in their order, so that bits repeat
        add_whole(v, element_of(sums.template tile<float>(), block * share + row, unit));
      }
      if constexpr (Policy::kReadsZ) load_whole(z, place);
      policy.finish(v, of_units, z, kept, unit);
      uint32_t words[kVector / 2];
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) words[i] = pack(v + 2 * i, Scalar());
#pragma unroll 1
      for (int block = 0; block < size; ++block) {
        store_async(remote_address(place, block), words,
                    remote_address(bottleneck.filled(), block));
      }
      policy.keep(kept, token, unit);
    });
  }

  // The bottleneck times the weight out of it, and the output. Where dx is not wanted there is
  // none, and the rows are free once their product is complete.
  __device__ __forceinline__ void multiply_out() const {
    Turn rows(tiles.rows), weight(tiles.out), bottleneck(tiles.bottleneck);
    for_each_tile([&](int64_t token) {
      bottleneck.wait_filled();
      for_each_panel([&](int in_slice) {
        if (writes) {
          float acc[LanePairs::kCount] = {};
          weight.wait_filled();
          multiply_tiles<kTransposed>(acc, bottleneck.template tile<Scalar>(),
                                      weight.template tile<Scalar>());
          finish_output(acc, rows.template tile<Scalar>(), weight, in_slice);
          weight.free();  // which also waits for all lanes: each stores what others wrote
          weight.pass();
          store_output(rows.template tile<Scalar>(), token, first_feature + in_slice);
        }
        rows.free();
        rows.pass();
      });
      bottleneck.free();
      bottleneck.pass();
    });
  }

  // Puts the output in the place of the rows, each warp its own 16. Each tensor is added in a loop
  // of its own, for the loops to hold no branch.
  __device__ __forceinline__ void finish_output(float (&u)[LanePairs::kCount], Scalar* rows,
                                                const Turn& weight, int in_slice) const {
    const LanePairs pairs;
    const auto add = [&](Scalar* tile) {
      pairs.for_each([&](int i, int, int) {
        float pair[2];
        load_whole(pair, pairs.place(tile, i));
        u[i] += pair[0];
        u[i + 1] += pair[1];
      });
    };
    if constexpr (Policy::kHasFeatures) {
      const auto with_features = [&](const float* values, auto apply) {
        pairs.for_each([&](int i, int, int column) {
          float pair[2];
          load_whole(pair, values + in_slice + column);
          u[i] = apply(u[i], pair[0]);
          u[i + 1] = apply(u[i + 1], pair[1]);
        });
      };
      with_features(tiles.bias, [](float u, float bias) { return u + bias; });
      if (policy.params.channel_scaling) {
        with_features(tiles.factor, [](float u, float factor) { return u * factor; });
      } else {
#pragma unroll
        for (int i = 0; i < LanePairs::kCount; ++i) u[i] *= policy.factor_of_all;
      }
    }
    if (adds_rows) add(rows);
#pragma unroll
    for (int j = 0; j < Policy::kMostAdded; ++j) {
      if (j < more.count) add(weight.template tile<Scalar>(1 + j));
    }
    pairs.for_each([&](int i, int, int) {
      const float pair[2] = {u[i], u[i + 1]};
      store_whole(pairs.place(rows, i), pair);
    });
  }

  __device__ __forceinline__ void store_output(const Scalar* rows, int64_t first_token,
                                               int64_t first_feature) const {
    constexpr int kAcross = kTileSide / kVector, kRowsApart = kWarpSize / kAcross;
    constexpr int kCount = 16 / kRowsApart;
    const int lane = threadIdx.x % kWarpSize, column = lane % kAcross * kVector;
    const int row = threadIdx.x / kWarpSize % 4 * 16 + lane / kAcross;
    const Matrix output = policy.output();
    auto* const to = output.template at<Scalar>(first_token + row, first_feature + column);
    const int64_t left =
        first_feature + column < output.columns ? output.rows - first_token - row : 0;
    Words<4> words[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      words[i] = load_words<Words<4>>(element_of(rows, row + i * kRowsApart, column));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i * kRowsApart >= left) continue;
      store_global(to + i * kRowsApart * output.view.stride, words[i].values);
    }
  }
};

// Grid: the blocks of one cluster after another. Global memory per token: read the rows (H), what
// else is added (H each) and z, write the output (H) and what is kept. L2 serves both weights to
// every 64 tokens.
template <typename Policy>
__global__ void __launch_bounds__(ResidentShape::kThreads, 1)
    bottleneck_resident_kernel(const __grid_constant__ typename Policy::Params params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (kHasWarpgroups) {
    using Shape = ResidentShape;
    const Policy policy(params);
    const Added added = policy.added();
    const bool adds_rows = params.add_input != 0;
    const auto panels = static_cast<int>(params.features_per_split / kTileSide);
    const Added more = adds_rows ? Added{added.count - 1, {added.rows[1], added.rows[1]}} : added;
    const ResidentTiles tiles(shared, params.shared_bytes, panels, more.count);
    const int64_t first_feature = cluster_rank() * params.features_per_split;
    const bool writes = policy.features_out() > 0;
    const ResidentBlock<Policy> block{policy, tiles,         more,  adds_rows,
                                      writes, first_feature, panels};
    if (threadIdx.x == 0) tiles.make_barriers();
    load_features<Shape::kThreads>(tiles.bias, tiles.factor, panels * kTileSide, policy,
                                   first_feature);
    cluster_barrier();
    const int copying = static_cast<int>(threadIdx.x) - 2 * Shape::kGroupThreads;
    const int of_weights = copying - Shape::kRowThreads;
    if (threadIdx.x < Shape::kGroupThreads) {
      block.multiply_in();
    } else if (copying < 0) {
      block.multiply_out();
    } else if (of_weights < 0) {
      block.copy_rows(copying);
    } else if (of_weights < Shape::kWeightThreads) {
      block.copy_weight_in(of_weights);
    } else {
      block.copy_weight_out(of_weights - Shape::kWeightThreads);
    }
  } else {
    trap();
  }
}

// Launches the resident form under PolicyOf<element type>.
template <template <typename> class PolicyOf, typename Params>
cudaError_t launch_resident(const Params& params, cudaStream_t stream) {
  const bool sends = params.num_splits > 1;  // which st.async needs
  if (!sends || params.bottleneck_size > ResidentShape::kBlockR) return cudaErrorInvalidValue;
  return switch_dtype(params.compute_dtype, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    if constexpr (sizeof(Scalar) == 2 && !PolicyOf<Scalar>::kHasNorm) {
      return launch(bottleneck_resident_kernel<PolicyOf<Scalar>>,
                    dim3(static_cast<unsigned>(params.resident_clusters * params.num_splits)),
                    ResidentShape::kThreads, static_cast<int>(params.shared_bytes), params, stream,
                    static_cast<unsigned>(params.num_splits));
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace adapterkern
