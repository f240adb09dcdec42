// The launch of a kernel, in one place; tests/emulator holds the twin of this file.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <map>
#include <mutex>
#include <tuple>

namespace adapterkern {

// The shared memory that a kernel may use without opting in to more.
constexpr int kDefaultSharedBytes = 48 * 1024;

// Lets `kernel` use all the shared memory of a block: a limit for this launch alone would race with
// the launches of other threads.
template <typename Params>
cudaError_t allow_shared_memory(void (*kernel)(Params), int device) {
  int most = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Prepares `kernel` for a configuration and finds how many of its clusters can run at once. Answers
// are kept for each device, because asking the driver takes longer than a launch.
template <typename Params>
cudaError_t prepare(void (*kernel)(Params), const cudaLaunchConfig_t& config, unsigned cluster_size,
                    int* clusters) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Params), int, size_t, unsigned>, int> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, config.dynamicSmemBytes, cluster_size);
  const auto found = known.find(key);
  *clusters = found == known.end() ? INT_MAX : found->second;
  if (found != known.end()) return cudaSuccess;
  if (config.dynamicSmemBytes > kDefaultSharedBytes) error = allow_shared_memory(kernel, device);
  if (error == cudaSuccess && cluster_size > 1) {
    error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  }
  if (error == cudaSuccess) known[key] = *clusters;
  return error;
}

// The blocks of a cluster are consecutive along x. Any number of clusters can walk over the work,
// so the grid holds only as many as can run at once: one that had to wait would start its share
// when the others are done. A cluster lies within a GPC, which leaves some SMs idle.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                   const Params& params, cudaStream_t stream, unsigned cluster_size = 1) {
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
  int clusters = 0;
  const cudaError_t error = prepare(kernel, config, cluster_size, &clusters);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorLaunchOutOfResources;
  if (cluster_size > 1) config.gridDim.x = min(grid.x, clusters * cluster_size);
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace adapterkern
