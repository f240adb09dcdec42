// The launcher of many adapters as a shared library for ctypes, beside library.cpp: these kernels
// take as long to compile as all of its forward.
#include "grouped_forward.cu"
#include "launch_bytes.h"

extern "C" const char* emulated_grouped_forward(const void* packed, size_t bytes, unsigned seed) {
  return emulator::run(adapterkern::launch_grouped_forward, packed, bytes, seed);
}
