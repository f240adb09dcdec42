// The twin of csrc/launch.cuh: a launch runs at once, on the host.
#pragma once

#include <cuda_runtime_api.h>

#include "emulator.h"

namespace adapterkern {

inline std::string launch_error;  // of the last launch that failed

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                   const Params& params, cudaStream_t, unsigned cluster_size = 1) {
  try {
    emulator::launch(grid, threads, shared_bytes, cluster_size, [&] { kernel(params); });
    return cudaSuccess;
  } catch (const emulator::Error& error) {
    launch_error = error.what();
    return cudaErrorLaunchFailure;
  }
}

}  // namespace adapterkern
