// __half and __nv_bfloat16 as bits, rounding to nearest even as the GPU's conversions do, and
// their pairs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

struct __half {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float __bfloat162float(__nv_bfloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7FFF};
  const uint32_t bits = bits_of(value);
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

struct float2 {
  float x, y;
};

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, exponent = value.bits >> 10 & 31,
                 mantissa = value.bits & 0x3FF;
  if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
  if (exponent > 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = bits_of(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7FFF};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};  // rounds to infinity
  if (magnitude < 0x1p-14f) {  // subnormal: adding 0.5 leaves the 10 bits, rounded, at the bottom
    return {static_cast<uint16_t>(sign | (bits_of(magnitude + 0.5f) - bits_of(0.5f)))};
  }
  const uint32_t bits = bits_of(magnitude), rounded = (bits + 0xFFF + (bits >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | (rounded - (112 << 10)))};
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
