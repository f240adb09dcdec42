// What the forward of one adapter and that of many share, equations (1) to (4) of docs/math.md.
#pragma once

#include "activations.cuh"
#include "policy.cuh"

namespace adapterkern {

template <typename ScalarT, typename Params>
struct ForwardFormulas : PolicyBase<Params> {
  using PolicyBase<Params>::PolicyBase;
  using Scalar = ScalarT;
  static constexpr bool kTransposed = false, kReadsZ = false, kHasFeatures = true;
  static constexpr bool kHasNorm = false;
  static constexpr int kMostAdded = 2;
  struct OfUnits {
    float bias[kVector];
  };
  struct Kept {
    float z[kVector];
  };
  struct Features {
    float bias[kVector], factor[kVector];
  };

  __device__ __forceinline__ Unchanged transform() const { return {}; }

  // z becomes a = act(z) for the units that exist. Both are rounded where eager rounds, because
  // backward recomputes a from the stored z.
  __device__ __forceinline__ void finish_units(float (&z)[kVector], const OfUnits& of_units,
                                               Kept& kept, int64_t unit, int64_t units) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] += of_units.bias[i];
    round_to<Scalar>(z);
    copy(kept.z, z);
    apply_activation(z, this->params.activation);
    clear_padded_units(z, unit, units);
  }

  static __device__ __forceinline__ void load_feature(float (&v)[kVector], const View& view,
                                                      const void* from, int column) {
    with_type_of<Scalar>(view, [&](auto* type) {
      load_whole(v, static_cast<const std::remove_pointer_t<decltype(type)>*>(from) + column);
    });
  }

  __device__ __forceinline__ void scale(float (&u)[kVector], const Features& of_feature) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) u[i] = (u[i] + of_feature.bias[i]) * of_feature.factor[i];
  }
};

}  // namespace adapterkern
