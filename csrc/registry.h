// The adapter kernels in this build, by the names that profilers show. While the list is empty
// adapterkern/backends/cuda/backend.py declines every call.
#pragma once

#include <initializer_list>

namespace adapterkern {

constexpr std::initializer_list<const char*> kKernels = {
    "bottleneck_fwd_kernel",          "bottleneck_fwd_down_kernel",
    "bottleneck_fwd_up_kernel",       "bottleneck_fwd_cluster_kernel",
    "bottleneck_bwd_dx_kernel",       "bottleneck_bwd_split_dz_kernel",
    "bottleneck_bwd_split_dx_kernel", "bottleneck_bwd_cluster_dx_kernel",
    "bottleneck_bwd_dw_kernel",       "bottleneck_bwd_dw_sum_kernel",
};

}  // namespace adapterkern
