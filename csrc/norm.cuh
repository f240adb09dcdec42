// The norm of the output in the cluster form, equations (16) to (18) and (23) of docs/math.md.
//
// The sum takes the place of the rows in their tile, which belongs to these tokens until the next
// rows are fetched into it. Its statistics, of the unrounded sum, are merged lane by lane, warp by
// warp and block by block, always in the same order; then each block normalises its own slice.
#pragma once

#include "cluster_tiles.cuh"
#include "policy.cuh"

namespace adapterkern {

// The mean, and the sum of the squared distances from it. Without a mean, as in an RMSNorm, the
// former stays 0.
struct Moments {
  float mean, squares;
};

// Merges the moments of b elements into those of a, equation (23).
struct Merge {
  float of_b, weight;

  __device__ __forceinline__ Merge(float a, float b)
      : of_b(b > 0.0f ? b / (a + b) : 0.0f), weight(a * of_b) {}

  __device__ __forceinline__ void operator()(Moments& a, const Moments& b) const {
    const float distance = b.mean - a.mean;
    a.mean += distance * of_b;
    a.squares += b.squares + distance * distance * weight;
  }
};

__device__ __forceinline__ Moments moments_of(const float (&v)[kVector], bool has_mean) {
  Moments found = {};
  if (has_mean) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) found.mean += v[i];
    found.mean /= kVector;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    found.squares += (v[i] - found.mean) * (v[i] - found.mean);
  }
  return found;
}

// What the norm needs of shared memory, behind the factors of the features.
template <typename Shape, bool kTransposed>
struct NormTiles {
  using Tiles = ClusterTiles<Shape, kTransposed>;
  Tiles tiles;

  __device__ __forceinline__ float* weight() const {
    return tiles.factor() + tiles.panels * kPanel;
  }
  __device__ __forceinline__ float* bias() const { return weight() + tiles.panels * kPanel; }
  // The moments of the rows over the slice of `block`: pairs of floats.
  __device__ __forceinline__ float* of_block(int block) const {
    return bias() + tiles.panels * kPanel + block * Shape::kBlockT * 2;
  }
  // Those over the features of a warp, and their number, which lie in the warp's room.
  __device__ __forceinline__ float* of_warp(int warp, int row) const {
    return tiles.sums() + warp * (Shape::kRoomBytes / 4) + row * 4;
  }
};

// The moments of the rows that a lane finishes, over its features.
template <int kRows>
struct LaneMoments {
  Moments rows[kRows] = {};
  float count = 0.0f;  // of features, the same in every row

  // Adds a vector of each row; of(i) gives that of the i-th.
  template <typename Of>
  __device__ __forceinline__ void add(Of of) {
    const Merge merge(count, kVector);
#pragma unroll
    for (int i = 0; i < kRows; ++i) merge(rows[i], of(i));
    count += kVector;
  }

  // Merges the moments of the `lanes` neighbours that share the rows; the first of them has all.
  __device__ __forceinline__ void gather(int lanes) {
#pragma unroll
    for (int mask = 1; mask < lanes; mask *= 2) {
      const float others = __shfl_xor_sync(0xFFFFFFFF, count, mask);
      const Merge merge(count, others);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float mean = __shfl_xor_sync(0xFFFFFFFF, rows[i].mean, mask);
        const float squares = __shfl_xor_sync(0xFFFFFFFF, rows[i].squares, mask);
        merge(rows[i], {mean, squares});
      }
      count += others;
    }
  }
};

// Loads weight and bias of each feature of the slice as float32, once for all tokens.
template <typename Shape, bool kTransposed, typename Policy>
__device__ __forceinline__ void load_norm(const NormTiles<Shape, kTransposed>& norm,
                                          const Policy& policy, int64_t first_feature) {
  const auto& params = policy.params;
  const Matrix weight = as_matrix(params.norm_weight, params.hidden_size);
  const Matrix bias = as_matrix(params.norm_bias, params.hidden_size);
  const bool has_weight = params.norm_weight.data != nullptr;
  const float offset = has_weight ? policy.weight_offset() : 1.0f;
#pragma unroll 1
  for (int feature = threadIdx.x * kVector; feature < norm.tiles.panels * kPanel;
       feature += Shape::kThreads * kVector) {
    float v[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = offset;
    add_vector(v, weight, 0, first_feature + feature);
    store_whole(norm.weight() + feature, v);
    load_vector(v, bias, 0, first_feature + feature);
    store_whole(norm.bias() + feature, v);
  }
}

// Merges the moments of the warps, sends them to every block, and waits for those of the others. A
// thread sends two rows to one block. They are read before the next cluster barrier, and those of
// other tokens take their place after the one behind it.
template <typename Shape, bool kTransposed>
__device__ __forceinline__ void exchange_moments(const NormTiles<Shape, kTransposed>& norm) {
  constexpr int kPairs = Shape::kBlockT / 2;
  const int size = cluster_size();
  float* const to = norm.of_block(cluster_rank());
  __syncthreads();  // the moments of every warp are there
#pragma unroll 1
  for (int index = threadIdx.x; index < kPairs * size; index += Shape::kThreads) {
    const int block = index / kPairs, first = index % kPairs * 2;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (first + i) % 16, warp = (first + i) / 16;
      Moments all = {};
      float count = 0.0f;
#pragma unroll
      for (int part = 0; part < Shape::kWarpsOut; ++part) {
        float of_warp[4];
        load_whole(of_warp, norm.of_warp(part * Shape::kWarpsT + warp, row));
        Merge(count, of_warp[2])(all, {of_warp[0], of_warp[1]});
        count += of_warp[2];
      }
      words[2 * i] = bits_as<uint32_t>(all.mean);
      words[2 * i + 1] = bits_as<uint32_t>(all.squares);
    }
    store_remote_16(to + first * 2, words, block);
  }
  cluster_barrier();  // the moments of every block are there
}

// The mean and 1 / standard deviation of a row, from the moments of all blocks in their order.
template <typename Shape, bool kTransposed, typename Policy>
__device__ __forceinline__ void statistics_of(const NormTiles<Shape, kTransposed>& norm,
                                              const Policy& policy, int row, float& mean,
                                              float& rstd) {
  const auto slice = static_cast<int>(policy.params.features_per_split);
  auto left = static_cast<int>(policy.params.hidden_size);
  Moments all = {};
  float count = 0.0f;
#pragma unroll 1
  for (int block = 0; left > 0; ++block, left -= slice) {
    float of_block[2];
    load_whole(of_block, norm.of_block(block) + row * 2);
    const auto features = static_cast<float>(smaller(left, slice));
    Merge(count, features)(all, {of_block[0], of_block[1]});
    count += features;
  }
  mean = all.mean;
  rstd = 1.0f / sqrtf(all.squares / count + policy.eps());
}

// Writes the norm of the sums in the tile, the sums themselves where they are asked for, and the
// statistics for the backward. A thread keeps its rows, whose statistics it merges once.
template <typename Shape, bool kTransposed, typename Policy>
__device__ __forceinline__ void write_normed(const NormTiles<Shape, kTransposed>& norm,
                                             const Policy& policy, int slot, int64_t first_token,
                                             int64_t first_feature) {
  using Scalar = typename Shape::Scalar;
  constexpr int kAcross = kPanel / kVector, kRowsAtOnce = Shape::kThreads / kAcross;
  constexpr int kRows = larger(Shape::kBlockT / kRowsAtOnce, 1);
  constexpr int kPanelsAtOnce = larger(kRowsAtOnce / Shape::kBlockT, 1);
  const auto& params = policy.params;
  const int column = threadIdx.x % kAcross * kVector;
  const int first_row = threadIdx.x / kAcross % Shape::kBlockT;
  const int first_panel = threadIdx.x / kAcross / Shape::kBlockT;
  const bool keeps = cluster_rank() == 0 && first_panel == 0 && column == 0;
  float mean[kRows], rstd[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i * kRowsAtOnce;
    const int64_t token = first_token + row;
    statistics_of(norm, policy, row, mean[i], rstd[i]);
    if (!keeps || token >= params.num_tokens) continue;
    if (params.mean.data != nullptr) static_cast<float*>(params.mean.data)[token] = mean[i];
    if (params.rstd.data != nullptr) static_cast<float*>(params.rstd.data)[token] = rstd[i];
  }
  const Matrix sums = policy.output(), normed = policy.normed();
  for (int panel = first_panel; panel < norm.tiles.panels; panel += kPanelsAtOnce) {
    const int64_t feature = first_feature + panel * kPanel + column;
    if (feature >= params.hidden_size) break;
    float weight[kVector], bias[kVector];
    load_whole(weight, norm.weight() + panel * kPanel + column);
    load_whole(bias, norm.bias() + panel * kPanel + column);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first_row + i * kRowsAtOnce;
      const int64_t token = first_token + row;
      if (token >= params.num_tokens) continue;
      const auto words =
          load_words<Words<4>>(norm.tiles.rows(slot, panel) + row * Shape::kStridePanel + column);
      if (sums.view.data != nullptr) store_global(sums.at<Scalar>(token, feature), words.values);
      float v[kVector];
#pragma unroll
      for (int j = 0; j < 4; ++j) unpack(v + 2 * j, words.values[j], Scalar());
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] = (v[j] - mean[i]) * rstd[i];
      if (params.cast_before_weight) round_to<Scalar>(v);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] = v[j] * weight[j] + bias[j];
      with_type_of<Scalar>(normed.view, [&](auto* type) {
        using Type = std::remove_pointer_t<decltype(type)>;
        store_whole_global(normed.at<Type>(token, feature), v);
      });
    }
  }
}

}  // namespace adapterkern
