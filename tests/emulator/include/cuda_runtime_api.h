// The part of the CUDA runtime that the launchers use.
#pragma once

#include "emulator.h"

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
