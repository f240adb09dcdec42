// The adapter kernels in this build, by the names that profilers show. While the list is empty
// adapterkern/backends/cuda/backend.py declines every call.
#pragma once

#include <initializer_list>

namespace adapterkern {

constexpr std::initializer_list<const char*> kKernels = {
    "bottleneck_row_block_kernel",          "bottleneck_split_first_kernel",
    "bottleneck_split_second_kernel",       "bottleneck_cluster_kernel",
    "bottleneck_resident_kernel",           "bottleneck_bwd_dw_kernel",
    "bottleneck_bwd_dw_sum_kernel",         "bottleneck_bwd_norm_kernel",
    "bottleneck_bwd_norm_sum_kernel",       "bottleneck_grouped_tiles_kernel",
    "bottleneck_grouped_rows_first_kernel", "bottleneck_grouped_rows_second_kernel",
};

}  // namespace adapterkern
