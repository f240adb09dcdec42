// What the launchers see of the CUDA runtime.
#pragma once

#include "emulator.h"

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
