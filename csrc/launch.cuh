// The launch of a kernel, in one place; tests/emulator holds the twin of this file.
#pragma once

#include <cuda_runtime.h>

namespace adapterkern {

// What a kernel may use without asking for more.
constexpr int kDefaultSharedBytes = 48 * 1024;

// Lets `kernel` use all the shared memory there is: a limit for this launch alone would race with
// the launches of other threads.
template <typename Params>
cudaError_t allow_shared_memory(void (*kernel)(Params), int shared_bytes) {
  if (shared_bytes <= kDefaultSharedBytes) return cudaSuccess;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// The blocks of a cluster follow one another along x. `persistent` blocks walk over the work with
// any number of clusters, so there are no more than can run at once: one that had to wait would
// begin its share when the others are done. A cluster lies within a GPC, which leaves some SMs out.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                   const Params& params, cudaStream_t stream, unsigned cluster_size = 1,
                   bool persistent = false) {
  cudaError_t error = allow_shared_memory(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
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
  if (persistent) {
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorLaunchOutOfResources;
    config.gridDim.x = min(grid.x, clusters * cluster_size);
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace adapterkern
