// Launcher of the probe kernel; see probe.cu.
#pragma once

#include <cuda_runtime_api.h>

namespace adapterkern {

// Writes two ints to device memory at `out`: __CUDA_ARCH__ of the code that ran, and whether that
// code was compiled for one architecture only (the "a" of sm_90a).
cudaError_t launch_probe(int* out, cudaStream_t stream);

}  // namespace adapterkern
