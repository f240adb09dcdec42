// The adapter kernels in this build. A kernel family adds the name of each kernel here when its
// launcher is bound; adapterkern/backends/cuda/backend.py declines every call while the list is
// empty.
#pragma once

#include <initializer_list>

namespace adapterkern {

constexpr std::initializer_list<const char*> kKernels = {};

}  // namespace adapterkern
