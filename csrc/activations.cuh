// The activations in float32, and their gradients dz of da; formulas as in docs/math.md.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace adapterkern {

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

struct Gelu {
  static constexpr float kInvSqrt2 = 0.70710678f, kInvSqrt2Pi = 0.39894228f;
  static __device__ __forceinline__ float value(float z) {
    return 0.5f * z * (1.0f + erff(z * kInvSqrt2));
  }
  static __device__ __forceinline__ float gradient(float z, float da) {
    return da * (0.5f * (1.0f + erff(z * kInvSqrt2)) + z * expf(-0.5f * z * z) * kInvSqrt2Pi);
  }
};

// 0.5 z (1 + tanh c) = z sigmoid(2 c), without the cancellation for negative z.
struct GeluTanh {
  static constexpr float kTwoSqrt2OverPi = 1.59576912f, kCubic = 0.044715f;
  static __device__ __forceinline__ float gate(float z) {
    return sigmoid(kTwoSqrt2OverPi * (z + kCubic * z * z * z));
  }
  static __device__ __forceinline__ float value(float z) { return z * gate(z); }
  static __device__ __forceinline__ float gradient(float z, float da) {
    const float s = gate(z);
    return da * (s + z * s * (1.0f - s) * kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * z * z));
  }
};

// NaN is active, as in eager. The gradient selects, as autograd's does: Inf or NaN behind an
// inactive unit must not pass.
struct Relu {
  static __device__ __forceinline__ float value(float z) { return z < 0.0f ? 0.0f : z; }
  static __device__ __forceinline__ float gradient(float z, float da) {
    return z <= 0.0f ? 0.0f : da;
  }
};

struct Silu {
  static __device__ __forceinline__ float value(float z) { return z * sigmoid(z); }
  static __device__ __forceinline__ float gradient(float z, float da) {
    const float s = sigmoid(z);
    return da * (s * (1.0f + z * (1.0f - s)));
  }
};

struct Tanh {
  static __device__ __forceinline__ float value(float z) { return tanhf(z); }
  static __device__ __forceinline__ float gradient(float z, float da) {
    // 1 / cosh^2, which does not cancel as 1 - tanh^2 does.
    const float decay = expf(-2.0f * fabsf(z));
    return da * (4.0f * decay / ((1.0f + decay) * (1.0f + decay)));
  }
};

struct Sigmoid {
  static __device__ __forceinline__ float value(float z) { return sigmoid(z); }
  static __device__ __forceinline__ float gradient(float z, float da) {
    const float s = sigmoid(z);
    return da * (s * (1.0f - s));
  }
};

struct LeakyRelu {
  static constexpr float kSlope = 0.01f;
  static __device__ __forceinline__ float value(float z) { return z > 0.0f ? z : kSlope * z; }
  static __device__ __forceinline__ float gradient(float z, float da) {
    return da * (z > 0.0f ? 1.0f : kSlope);
  }
};

struct Identity {
  static __device__ __forceinline__ float value(float z) { return z; }
  static __device__ __forceinline__ float gradient(float, float da) { return da; }
};

// The formulas in the order of the enum Activation.
template <typename... Formulas>
struct FormulaList {
  static constexpr int64_t kSize = sizeof...(Formulas);
};
using AllFormulas = FormulaList<Gelu, GeluTanh, Relu, Silu, Tanh, Sigmoid, LeakyRelu, Identity>;

// The launchers refuse every other number: the last formula must not answer for a forgotten one.
// A trap in the kernels instead would cost registers, which some of them then spill.
inline bool has_formula(int64_t activation) {
  return 0 <= activation && activation < AllFormulas::kSize;
}

// Calls `body` with the formula of an activation. It is chosen at run time, once a vector: one more
// template dimension would multiply the kernels by eight to save a uniform branch.
template <int64_t number = 0, typename First, typename... Rest, typename Body>
__device__ __forceinline__ void with_activation(int64_t activation, FormulaList<First, Rest...>,
                                                Body body) {
  if constexpr (sizeof...(Rest) > 0) {
    if (activation != number) {
      return with_activation<number + 1>(activation, FormulaList<Rest...>(), body);
    }
  }
  body(First());
}

// Exchanges the halves of v. A loop of two turns over the first half then does all of it, with half
// the code of an unrolled one: eight formulas of every element would fill the instruction cache.
template <int n>
__device__ __forceinline__ void swap_halves(float (&v)[n]) {
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    const float low = v[i];
    v[i] = v[i + n / 2];
    v[i + n / 2] = low;
  }
}

// v = act(v)
template <int n>
__device__ __forceinline__ void apply_activation(float (&v)[n], int64_t activation) {
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    with_activation(activation, AllFormulas(), [&](auto formula) {
#pragma unroll
      for (int i = 0; i < n / 2; ++i) v[i] = formula.value(v[i]);
    });
    swap_halves(v);
  }
}

// v = 0 past the end of the bottleneck. Inf or NaN in a row times the zeros that the weights hold
// there is NaN, and NaN times zero in the product that follows would spoil a row which eager keeps
// finite.
template <int n>
__device__ __forceinline__ void clear_padded_units(float (&v)[n], int64_t unit,
                                                   int64_t bottleneck_size) {
  if (unit + n <= bottleneck_size) return;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (unit + i >= bottleneck_size) v[i] = 0.0f;
  }
}

// v, which is da, becomes dz, and z becomes act(z).
template <int n>
__device__ __forceinline__ void apply_gradient(float (&v)[n], float (&z)[n], int64_t activation) {
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    with_activation(activation, AllFormulas(), [&](auto formula) {
#pragma unroll
      for (int i = 0; i < n / 2; ++i) {
        v[i] = formula.gradient(z[i], v[i]);
        z[i] = formula.value(z[i]);
      }
    });
    swap_halves(v);
    swap_halves(z);
  }
}

}  // namespace adapterkern
