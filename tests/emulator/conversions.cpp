// The emulator's half-precision types, for a comparison with torch's.
#include "half_types.h"

extern "C" void widen(const char* kind, const uint16_t* from, float* to, int size) {
  const bool half = std::strcmp(kind, "half") == 0;
  for (int i = 0; i < size; ++i) {
    to[i] = half ? __half2float({from[i]}) : __bfloat162float({from[i]});
  }
}

extern "C" void narrow(const char* kind, const float* from, uint16_t* to, int size) {
  const bool half = std::strcmp(kind, "half") == 0;
  for (int i = 0; i < size; ++i) {
    to[i] = half ? __float2half_rn(from[i]).bits : __float2bfloat16_rn(from[i]).bits;
  }
}
