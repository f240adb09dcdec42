// Tells which of the compiled architectures the driver chose for a device, by running there.
//
// The driver takes the machine code of the device's own architecture, else of a lower one of the
// same generation, else compiles the PTX. The choice decides which instructions the adapter kernels
// may use, and only running shows it.
#include "probe.h"

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
  probe_kernel<<<1, 1, 0, stream>>>(out);
  return cudaGetLastError();
}

}  // namespace adapterkern
