// Launcher of the kernels for the gradients of a norm; see norm_gradients.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace adapterkern {

// Launches the first part of the backward of a call with a norm: dy, where it is there, becomes the
// gradient of the output itself, which all other gradients come from.
cudaError_t launch_norm_gradients(const BackwardParams& params, cudaStream_t stream);

}  // namespace adapterkern
