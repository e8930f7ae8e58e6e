// fp16 and bf16 in plain C++, for what is not worth an instruction set: activations, results and single rows.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparsellm {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_fp32(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t fp32_to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_fp32(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return from_bits(sign | ((magnitude << 13) + 0x38000000u));
  const float small = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal
  return sign ? -small : small;
}

// Round to nearest, ties to even; overflow to infinity; NaN stays NaN.
inline uint16_t fp32_to_fp16(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {                                              // below 2^-14: a multiple of 2^-24
    const float steps = from_bits(magnitude) * 0x1p24f + 0x1p23f;              // the sum rounds to an integer
    return static_cast<uint16_t>(sign | (to_bits(steps) - 0x4b000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace sparsellm
