// The launchers of csrc/ as a shared library for ctypes; structs arrive as the bytes that the
// Python binding would receive.
#include "backward.cu"
#include "facts.cpp"
#include "forward.cu"
#include "launch_bytes.h"
#include "norm_gradients.cu"
#include "weight_gradients.cu"

extern "C" const char* emulated_forward(const void* packed, size_t bytes, unsigned seed) {
  return emulator::run(adapterkern::launch_forward, packed, bytes, seed);
}

extern "C" const char* emulated_backward(const void* packed, size_t bytes, unsigned seed) {
  return emulator::run(adapterkern::launch_backward, packed, bytes, seed);
}
