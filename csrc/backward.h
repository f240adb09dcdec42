// Launcher of the backward kernels; see backward.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace adapterkern {

// The gradients that `params` gives room for, on `stream`; allocates nothing, waits for nothing.
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace adapterkern
