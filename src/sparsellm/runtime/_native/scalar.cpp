// Any machine: the set bits of a mask word are visited one by one.
#include "kernels.h"
#include "numbers.h"

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace sparsellm {
namespace {

inline int lowest_bit(uint64_t bits) {
#ifdef _MSC_VER
  unsigned long index;
  _BitScanForward64(&index, bits);
  return static_cast<int>(index);
#else
  return __builtin_ctzll(bits);
#endif
}

inline uint64_t read_word(const uint8_t* mask, int64_t word) {
  uint64_t bits;
  std::memcpy(&bits, mask + 8 * word, 8);
  return bits;
}

struct Bf16 {
  static float read(const uint8_t* values, int64_t i) {
    return bf16_to_fp32(reinterpret_cast<const uint16_t*>(values)[i]);
  }
};
struct Fp16 {
  static float read(const uint8_t* values, int64_t i) {
    return fp16_to_fp32(reinterpret_cast<const uint16_t*>(values)[i]);
  }
};
struct Fp32 {
  static float read(const uint8_t* values, int64_t i) { return reinterpret_cast<const float*>(values)[i]; }
};
struct Int8 {
  static float read(const uint8_t* values, int64_t i) { return reinterpret_cast<const int8_t*>(values)[i]; }
};

template <class Values>
void dot(const Rows& rows, const float* x, int64_t pitch, int tokens, float* sums) {
  for (int r = 0; r < rows.count; ++r) {
    float totals[kMaxTokens] = {};
    int64_t next = 0;
    for (int64_t word = 0; word < rows.words; ++word) {
      for (uint64_t bits = read_word(rows.mask[r], word); bits != 0; bits &= bits - 1) {
        const float weight = Values::read(rows.values[r], next++);
        const float* at = x + 64 * word + lowest_bit(bits);
        for (int t = 0; t < tokens; ++t) totals[t] += weight * at[t * pitch];
      }
    }
    for (int t = 0; t < tokens; ++t) sums[r * tokens + t] = totals[t];
  }
}

template <class Element>
void spread(const uint8_t* mask, int64_t columns, const uint8_t* values, uint8_t* out) {
  const Element* from = reinterpret_cast<const Element*>(values);
  Element* to = reinterpret_cast<Element*>(out);
  std::memset(to, 0, static_cast<size_t>(columns) * sizeof(Element));
  for (int64_t word = 0; 64 * word < columns; ++word)
    for (uint64_t bits = read_word(mask, word); bits != 0; bits &= bits - 1) to[64 * word + lowest_bit(bits)] = *from++;
}

void int4_to_fp32(const uint8_t* codes, const uint16_t* scales, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int code = (codes[i / 2] >> (i % 2 * 4)) & 15;
    out[i] = static_cast<float>(code - 8) * bf16_to_fp32(scales[i / 32]);
  }
}

}  // namespace

const InstructionSet kScalar = {
    "scalar",
    [] { return true; },
    1,
    {{dot<Bf16>, 1, 1.0f}, {dot<Fp16>, 1, 1.0f}, {dot<Fp32>, 1, 1.0f}, {dot<Int8>, 1, 1.0f}, {nullptr, 1, 1.0f}},
    spread<uint16_t>,
    spread<uint32_t>,
    int4_to_fp32,
};

}  // namespace sparsellm
