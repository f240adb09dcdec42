// Tells which of the compiled architectures the driver chose for a device, by running there.
//
// The driver takes the machine code of the device's own architecture, else of a lower one of the
// same generation, else compiles the PTX. The choice decides which instructions the adapter kernels
// may use, and only running shows it. It also tells how many clusters a device can place at
// once: a cluster lies within a GPC, and a part of a GPU (MIG) may have room for none.
#include "probe.h"

#include <cuda_runtime.h>

namespace adapterkern {
namespace {

__global__ void probe_kernel(int* out) {
#if defined(__CUDA_ARCH__)
  out[0] = __CUDA_ARCH__;
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_SPECIFIC__)
  out[1] = 1;
#else
  out[1] = 0;
#endif
}

}  // namespace

cudaError_t launch_probe(int* out, cudaStream_t stream) {
  // The error of this launch alone: cudaGetLastError would tell an earlier one of another library.
  void* arguments[] = {&out};
  return cudaLaunchKernel(reinterpret_cast<const void*>(probe_kernel), dim3(1), dim3(1), arguments,
                          0, stream);
}

cudaError_t clusters_that_fit(int size, int threads, int shared_bytes, int* clusters) {
  cudaError_t error =
      cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(size);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, probe_kernel, &config);
}

}  // namespace adapterkern
