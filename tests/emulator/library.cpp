// The launchers of csrc/ as a shared library for ctypes; structs arrive as the bytes that the
// Python binding would receive. Each returns nullptr, or why the launch failed.
#include "backward.cu"
#include "forward.cu"
#include "weight_gradients.cu"

namespace {

template <typename Params>
const char* run(cudaError_t (*launch)(const Params&, cudaStream_t), const void* packed,
                size_t bytes, unsigned seed) {
  if (bytes != sizeof(Params)) return "the bytes are not those of the struct";
  Params params;
  std::memcpy(&params, packed, sizeof(Params));
  emulator::seed = seed;
  adapterkern::launch_error = "an invalid value";
  return launch(params, nullptr) == cudaSuccess ? nullptr : adapterkern::launch_error.c_str();
}

}  // namespace

extern "C" const char* emulated_forward(const void* packed, size_t bytes, unsigned seed) {
  return run(adapterkern::launch_forward, packed, bytes, seed);
}

extern "C" const char* emulated_backward(const void* packed, size_t bytes, unsigned seed) {
  return run(adapterkern::launch_backward, packed, bytes, seed);
}

// Returns the shared memory of one block of a cluster; 0 if there is no cluster form.
extern "C" int cluster_bytes(int64_t features, int64_t tokens, int64_t bottleneck_size) {
  int bytes = 0;
  adapterkern::switch_block_r(bottleneck_size, [&](auto block_r) {
    using Shape = adapterkern::RowBlockShape<__nv_bfloat16, decltype(block_r)::value>;
    return adapterkern::switch_cluster_shape<Shape>(tokens, [&](auto shape) {
      bytes = decltype(shape)::type::shared_bytes(features);
      return cudaSuccess;
    });
  });
  return bytes;
}

// Returns kBlockT for a dtype and a bottleneck_size; 0 if there is no tile.
extern "C" int block_tokens(int64_t dtype, int64_t bottleneck_size) {
  int tokens = 0;
  adapterkern::switch_dtype(dtype, [&](auto type) {
    return adapterkern::switch_block_r(bottleneck_size, [&](auto block_r) {
      using Scalar = typename decltype(type)::type;
      tokens = adapterkern::RowBlockShape<Scalar, decltype(block_r)::value>::kBlockT;
      return cudaSuccess;
    });
  });
  return tokens;
}

// Puts the units, the features and the bytes of one stage of the weight gradients' tile into `out`.
extern "C" void gradient_shape(int64_t dtype, int64_t bottleneck_size, int* out) {
  adapterkern::switch_dtype(dtype, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    return adapterkern::switch_gradient_shape<Scalar>(bottleneck_size, [&](auto shape) {
      using Shape = typename decltype(shape)::type;
      out[0] = Shape::kUnits, out[1] = Shape::kFeatures, out[2] = Shape::kStageBytes;
      return cudaSuccess;
    });
  });
}
