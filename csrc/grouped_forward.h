// Launcher of the kernels of many adapters; see grouped_forward.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace adapterkern {

// Launches the forward of a batch whose tokens take different adapters, on `stream`; allocates
// nothing and waits for nothing.
cudaError_t launch_grouped_forward(const GroupedForwardParams& params, cudaStream_t stream);

}  // namespace adapterkern
