// What the policies of forward and backward share; adapter_kernels.cuh tells what a policy is.
#pragma once

#include "memory.cuh"

namespace adapterkern {

// The most stages of a pipeline: four tiles of rows under way hide the latency of global memory.
constexpr int kMostStages = 5;

// The tensors that are added to the output, rows of H: at most two.
template <typename MatrixT>
struct AddedRows {
  int count;
  MatrixT rows[2];
};
using Added = AddedRows<Matrix>;

template <typename Scalar>
__device__ __forceinline__ bool is_direct_or_none(const Matrix& matrix) {
  return matrix.view.data == nullptr || matrix.is_direct_as<Scalar>();
}

// Calls body(a null pointer of the type that a direct matrix has), Scalar or float. A loop over
// rows stands in the body, so that it holds no branch.
template <typename Scalar, typename Body>
__device__ __forceinline__ void with_type_of(const View& view, Body body) {
  if (view.dtype == kDTypeOf<Scalar>) return body(static_cast<Scalar*>(nullptr));
  if constexpr (kDTypeOf<Scalar> != kFloat32) body(static_cast<float*>(nullptr));
}

// Stores a vector of the bottleneck; an absent matrix takes nothing. What later kernels read has
// the dtype of the products.
template <typename Scalar>
__device__ __forceinline__ void store_units(const Matrix& matrix, int64_t token, int64_t unit,
                                            const float (&v)[kVector]) {
  const int count = matrix.count(token, unit, kVector);
  if (count > 0) store_elements(matrix.at<Scalar>(token, unit), v, count);
}

// Brings a vector of the bottleneck in half precision into shared memory, as part of a group of
// copies where it can be copied, with zeros out of bounds.
template <typename Half>
__device__ __forceinline__ void fetch_units(Half* to, const Matrix& matrix, int64_t token,
                                            int64_t unit) {
  const int count = matrix.count(token, unit, kVector);
  if (matrix.is_direct<Half>()) {
    return copy_async_16(to, count > 0 ? matrix.at<Half>(token, unit) : matrix.view.data,
                         count * static_cast<int>(sizeof(Half)));
  }
  float v[kVector];
  load_elements(v, matrix.at<Half>(token, unit), count);
  store_whole(to, v);
}

// Loads the bias and the factor of so many features as float32, once for all tokens.
template <int kThreads, typename Policy>
__device__ __forceinline__ void load_features(float* bias, float* factor, int features,
                                              const Policy& policy, int64_t first_feature) {
  if constexpr (Policy::kHasFeatures) {
#pragma unroll 1
    for (int feature = threadIdx.x * kVector; feature < features; feature += kThreads * kVector) {
      float v[kVector];
      load_vector(v, policy.bias(), 0, first_feature + feature);
      store_whole(bias + feature, v);
      scaling_of(policy.params).load(v, first_feature + feature);
      store_whole(factor + feature, v);
    }
  }
}

template <typename ParamsT>
struct PolicyBase {
  using Params = ParamsT;
  const Params& params;

  __device__ __forceinline__ explicit PolicyBase(const Params& params) : params(params) {}

  __device__ __forceinline__ Matrix of_tokens(const View& view, int64_t last) const {
    return {view, params.num_tokens, last};
  }
  __device__ __forceinline__ Matrix of_units_of(const View& view) const {
    return {view, params.num_tokens, params.bottleneck_size};
  }

  // Whether the output is written, and all that is added to it read, in whole vectors of Scalar or
  // float.
  template <typename Scalar, typename AddedT>
  __device__ __forceinline__ bool writes_direct(const View& output, const AddedT& added) const {
    return params.hidden_size % kVector == 0 &&
           of_tokens(output, params.hidden_size).template is_direct_as<Scalar>() &&
           is_direct_or_none<Scalar>(added.rows[0]) && is_direct_or_none<Scalar>(added.rows[1]);
  }

  // The stages for which the shared memory of the launch has room, up to kMostStages.
  __device__ __forceinline__ int stages_in(int bytes) const { return stages_out(0, bytes); }
  __device__ __forceinline__ int stages_out(int beside, int bytes) const {
    return smaller(kMostStages, (static_cast<int>(params.shared_bytes) - beside) / bytes);
  }
};

}  // namespace adapterkern
