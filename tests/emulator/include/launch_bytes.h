// Runs a launcher on the bytes of its struct, as the Python binding does.
#pragma once

#include "launch.cuh"

namespace emulator {

// Returns nullptr, or why the launch failed.
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

}  // namespace emulator
