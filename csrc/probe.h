// Queries that only the device itself can answer; see probe.cu.
#pragma once

#include <cuda_runtime_api.h>

namespace adapterkern {

// Writes two ints to device memory at `out`: __CUDA_ARCH__ of the code that ran, and whether that
// code was compiled for one architecture only (the "a" of sm_90a).
cudaError_t launch_probe(int* out, cudaStream_t stream);

// Finds how many clusters of `size` blocks can run at once, if a block has `threads` threads and
// `shared_bytes` of shared memory. A size above 8 is beyond what every device can place.
cudaError_t clusters_that_fit(int size, int threads, int shared_bytes, int* clusters);

}  // namespace adapterkern
