// Any machine: the set bits of a mask word are visited one by one.
#include "kernels.h"
#include "numbers.h"

#include <algorithm>
#include <cmath>

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

void int4_to_int8(const uint8_t* codes, int64_t count, const int8_t* levels, int8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = levels[(codes[i / 2] >> (i % 2 * 4)) & 15];
}

void int8_to_fp32(const int8_t* values, float scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(values[i]) * scale;
}

// The definition of the integer product, lane by lane; every other kernel has the same bits.
template <bool kScaled>
void integer_dot(const Rows& rows, const Rounded& x, int tokens, float* sums) {
  const int64_t unit = words_of(kScaled ? scales_of(rows.shift) : kOfRows);
  for (int r = 0; r < rows.count; ++r) {
    float totals[kMaxTokens][16] = {}, parts[kMaxTokens][16] = {};
    int32_t products[kMaxTokens][16] = {};
    int64_t next = 0;
    for (int64_t word = 0; word < rows.words; ++word) {
      for (uint64_t bits = read_word(rows.mask[r], word); bits != 0; bits &= bits - 1) {
        const int column = lowest_bit(bits);
        const int32_t weight = reinterpret_cast<const int8_t*>(rows.values[r])[next++];
        for (int t = 0; t < tokens; ++t)
          products[t][column / 4] += weight * x.codes[t * x.pitch + 64 * word + column];
      }
      const bool last = word + 1 == rows.words;
      for (int t = 0; t < tokens; ++t)
        for (int lane = 0; lane < 16; ++lane) {
          if (last || (word + 1) % unit == 0) {
            const float scale = kScaled ? rows.scales[r][(2 * word + lane / 8) >> rows.shift] : 1.0f;
            parts[t][lane] = std::fmaf(static_cast<float>(products[t][lane]), scale, parts[t][lane]);
            products[t][lane] = 0;
          }
          if (last || (word + 1) % kBlock == 0) {
            const float scale = x.scales[t * x.scales_pitch + 16 * (word / kBlock) + lane];
            totals[t][lane] = std::fmaf(parts[t][lane], scale, totals[t][lane]);
            parts[t][lane] = 0;
          }
        }
    }
    for (int t = 0; t < tokens; ++t) {
      for (int half = 8; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) totals[t][lane] += totals[t][lane + half];
      sums[r * tokens + t] = totals[t][0];
    }
  }
}

const Integer kIntegerScalar = {integer_dot<false>, integer_dot<true>, integer_dot<true>, nullptr, nullptr};

using Vector = float;
constexpr int kLanes = 1;
inline Vector zero() { return 0; }
inline Vector load(const float* from) { return *from; }
inline Vector load(const uint16_t* from) { return bf16_to_fp32(*from); }
inline void store(float* to, Vector v) { *to = v; }
inline Vector all(float number) { return number; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline float total(Vector v) { return v; }

#include "attention.h"

}  // namespace

const InstructionSet kScalar = {
    "scalar",
    [] { return true; },
    1,
    {{dot<Bf16>, 1, 1.0f}, {dot<Fp16>, 1, 1.0f}, {dot<Fp32>, 1, 1.0f}, {dot<Int8>, 1, 1.0f}, {nullptr, 1, 1.0f}},
    spread<uint16_t>,
    spread<uint32_t>,
    int4_to_int8,
    int8_to_fp32,
    nullptr,
    &kIntegerScalar,
    kAttend,
    nullptr,
};

}  // namespace sparsellm
