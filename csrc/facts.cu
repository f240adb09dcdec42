#include "facts.h"

#include "cluster_tiles.cuh"
#include "gradient_tiles.cuh"
#include "resident_tiles.cuh"
#include "row_block.cuh"

namespace adapterkern {
namespace {

template <typename Shape>
void add_row_block(std::vector<RowBlockFacts>& list) {
  list.push_back({Shape::kHalf, Shape::kBlockR, Shape::kLarge, Shape::kBlockT, Shape::kThreads,
                  Shape::kBlocksPerSm, Shape::kLeastBytes, Shape::kInBytes, Shape::kOutBytes,
                  Shape::kRowsBytes, Shape::kBesideBytes});
}

template <typename Shape>
void add_cluster(Facts& facts) {
  facts.clusters.push_back({Shape::kBlockR, Shape::kBlockT, Shape::kThreads, Shape::kPanelBytes,
                            Shape::kBesideBytes, Shape::kNormPanelBytes, Shape::kNormBesideBytes});
}

template <typename Shape>
void add_gradient(Facts& facts) {
  facts.gradients.push_back({Shape::kHalf, Shape::kUnits, Shape::kFeatures, Shape::kStageBytes});
}

}  // namespace

Facts launch_facts() {
  using Resident = ResidentShape;
  Facts facts{kPanel, kMostStages, {}, {}, {}, {}, {}};
  facts.resident = {Resident::kBlockR,
                    Resident::kBlockT,
                    Resident::kThreads,
                    kTileBytes,
                    Resident::beside_bytes(1) - Resident::beside_bytes(0),
                    Resident::beside_bytes(0),
                    Resident::kSlotsIn,
                    Resident::slots_out(0),
                    Resident::slots_out(1)};
  // Half precisions share their shapes, and so do TF32 and float32.
  for (const DType dtype : {kFloat32, kBFloat16}) {
    switch_dtype(dtype, [&](auto type) {
      using Scalar = typename decltype(type)::type;
      add_gradient<NarrowGradientShape<Scalar>>(facts);
      add_gradient<WideGradientShape<Scalar>>(facts);
      return cudaSuccess;
    });
    for (const int64_t bottleneck_size : {16, 32, 64, 128, 256}) {
      switch_dtype(dtype, [&](auto type) {
        return switch_block_r(bottleneck_size, [&](auto width) {
          using Scalar = typename decltype(type)::type;
          constexpr int kBlockR = decltype(width)::value;
          using Small = RowBlockShape<Scalar, kBlockR, false>;
          add_row_block<Small>(facts.row_blocks);
          if constexpr (Small::kHasTwoSizes) {
            add_row_block<RowBlockShape<Scalar, kBlockR, true>>(facts.row_blocks);
          }
          using Grouped = GroupedShape<Scalar, kBlockR>;
          if (kBlockR == Grouped::kBlockR) add_row_block<Grouped>(facts.grouped);
          for (const int64_t tokens : {16, 64}) {
            switch_cluster_shape<Scalar, kBlockR>(tokens, [&](auto shape) {
              add_cluster<typename decltype(shape)::type>(facts);
              return cudaSuccess;
            });
          }
          return cudaSuccess;
        });
      });
    }
  }
  return facts;
}

}  // namespace adapterkern
