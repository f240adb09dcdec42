// Turns run-time codes into template arguments.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "params.h"
#include "ptx.cuh"

namespace adapterkern {

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<element type of the products>()).
template <typename Body>
cudaError_t switch_dtype(int64_t dtype, Body body) {
  switch (dtype) {
    case kFloat32:
      return body(Type<float>());
    case kFloat16:
      return body(Type<__half>());
    case kBFloat16:
      return body(Type<__nv_bfloat16>());
    case kTFloat32:
      return body(Type<TFloat32>());
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls body(the narrowest compiled tile that holds R, as an integral constant); the backend
// declines an R above the widest. 16 is the narrowest pair of tensor-core tiles.
template <typename Body>
cudaError_t switch_block_r(int64_t bottleneck_size, Body body) {
  if (bottleneck_size <= 16) return body(std::integral_constant<int, 16>());
  if (bottleneck_size <= 32) return body(std::integral_constant<int, 32>());
  if (bottleneck_size <= 64) return body(std::integral_constant<int, 64>());
  if (bottleneck_size <= 128) return body(std::integral_constant<int, 128>());
  if (bottleneck_size <= 256) return body(std::integral_constant<int, 256>());
  return cudaErrorInvalidValue;
}

}  // namespace adapterkern
