// The launch of a kernel, in one place; tests/emulator holds the twin of this file.
#pragma once

#include <cuda_runtime.h>

namespace adapterkern {

// What a kernel may use without asking for more.
constexpr int kDefaultSharedBytes = 48 * 1024;

// The blocks of a cluster follow one another along x.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                   const Params& params, cudaStream_t stream, unsigned cluster_size = 1) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = cluster_size > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace adapterkern
