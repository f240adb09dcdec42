// Launcher of the kernels for the weight, bias and scaling gradients; see weight_gradients.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace adapterkern {

// Launches the second half of the backward, after dz.
cudaError_t launch_weight_gradients(const BackwardParams& params, cudaStream_t stream);

}  // namespace adapterkern
