// Launcher of the backward kernels; see backward.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace adapterkern {

// Launches the kernels for the gradients with an output in `params`; allocates and awaits nothing.
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace adapterkern
