// Launcher of the forward kernels; see forward.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace adapterkern {

// Launches y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up) on `stream`;
// allocates nothing and waits for nothing.
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);

}  // namespace adapterkern
