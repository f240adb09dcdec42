// The launchers of csrc/ as a shared library for ctypes; structs arrive as the bytes that the
// Python binding would receive. Each returns nullptr, or why the launch failed.
#include "backward.cu"
#include "facts.cpp"
#include "forward.cu"
#include "norm_gradients.cu"
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
