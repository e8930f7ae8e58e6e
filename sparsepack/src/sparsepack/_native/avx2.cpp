// AVX2 with FMA and F16C (Haswell, Zen and later): eight columns at a time through a table of byte shuffles.
#include "kernels.h"
#include "numbers.h"

#ifdef SPARSELLM_X86
#include <cpuid.h>

#include "lookup.h"
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

#include "eight.h"

using Vector = __m256;
constexpr int kLanes = 8;
constexpr int kPrefetchSteps = 4;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector load(const uint16_t* bf16) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
inline Vector all(float number) { return _mm256_set1_ps(number); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(Vector v) { return sum_of(v); }

inline __m128i load8(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }

inline __m128i eight_halves(uint64_t bits, const uint8_t* values) {
  return _mm_shuffle_epi8(load16(values), load16(kLookup.halves[bits & 255]));
}

// Even columns in the low, odd columns in the high half of each 32-bit lane. The lookup's offsets are cut out of the
// mask in place: sixteen bytes an entry, so a byte of the mask is wanted four bits further up.
struct Bf16 {
  static constexpr int kColumns = 16, kRowsOfOne = 1, kRowsOfTwo = 1, kRowsOfFour = 1, kChains = 2, kBytes = 2;
  static const uint8_t* take(uint64_t word, int step, const uint8_t* values, Vector* out) {
    const uint64_t low = (step == 0 ? word << 4 : word >> (16 * step - 4)) & 0xff0;
    const uint64_t high = word >> (16 * step + 4) & 0xff0;
    const uint8_t* second = values + 2 * __builtin_popcountll(low);
    const __m128i halves[2] = {_mm_shuffle_epi8(load16(values), load16(kLookup.halves[0] + low)),
                               _mm_shuffle_epi8(load16(second), load16(kLookup.halves[0] + high))};
    widen(_mm256_inserti128_si256(_mm256_castsi128_si256(halves[0]), halves[1], 1), out);
    return second + 2 * __builtin_popcountll(high);
  }
  static void all(const uint8_t* values, Vector* out) {
    widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), out);
  }
  static void widen(__m256i pairs, Vector* out) {
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

struct Fp16 {
  static constexpr int kColumns = 8, kRowsOfOne = 4, kRowsOfTwo = 2, kRowsOfFour = 2, kChains = 1, kBytes = 2;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    out[0] = _mm256_cvtph_ps(eight_halves(bits, values));
  }
  static void all(const uint8_t* values, Vector* out) { out[0] = _mm256_cvtph_ps(load16(values)); }
};

inline __m256i eight_words(uint64_t bits, const uint8_t* values) {
  // A permutation takes the low three bits of an index; a column without a value has a negative one and is cleared.
  const __m256i order = _mm256_cvtepi8_epi32(load8(kLookup.bytes[bits & 255]));
  const __m256i found =
      _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), order);
  return _mm256_andnot_si256(_mm256_srai_epi32(order, 31), found);
}

struct Fp32 {
  static constexpr int kColumns = 8, kRowsOfOne = 4, kRowsOfTwo = 2, kRowsOfFour = 2, kChains = 1, kBytes = 4;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    out[0] = _mm256_castsi256_ps(eight_words(bits, values));
  }
  static void all(const uint8_t* values, Vector* out) {
    out[0] = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
  }
};

struct Int8 {
  static constexpr int kColumns = 8, kRowsOfOne = 1, kRowsOfTwo = 1, kRowsOfFour = 1, kChains = 2;
  static const uint8_t* take(uint64_t word, int step, const uint8_t* values, Vector* out) {
    const uint64_t some = (step == 0 ? word << 3 : word >> (8 * step - 3)) & 0x7f8;
    const __m128i spread = _mm_shuffle_epi8(load8(values), load8(kLookup.bytes[0] + some));
    out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(spread));
    return values + __builtin_popcountll(some);
  }
};

#include "attention.h"
#include "rows.h"
#include "spread.h"

inline void next_halves(unsigned bits, const uint8_t* values, uint8_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), eight_halves(bits, values));
}

inline void next_words(unsigned bits, const uint8_t* values, uint8_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), eight_words(bits, values));
}

// Sixty-four codes are thirty-two bytes; each sixteen are brought to sixteen bits and the high nibbles to the upper bytes.
void int4_to_int8(const uint8_t* codes, int64_t count, const int8_t* levels, int8_t* out) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  for (int64_t at = 0; at < count; at += 64) {
    __builtin_prefetch(codes + at / 2 + kNibblesAhead);
#pragma GCC unroll 2
    for (int64_t half = at; half < at + 64; half += 32) {
      const __m256i wide = _mm256_cvtepu8_epi16(load16(codes + half / 2));
      const __m256i nibbles = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half), _mm256_shuffle_epi8(table, nibbles));
    }
  }
}

void int8_to_fp32(const int8_t* values, float scale, int64_t count, float* out) {
  for (int64_t at = 0; at < count; at += 8) {
    const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(values + at)));
    _mm256_storeu_ps(out + at, _mm256_mul_ps(wide, _mm256_set1_ps(scale)));
  }
}

// Round to nearest, ties to even; NaN stays NaN.
void fp32_to_bf16(const float* numbers, int64_t count, uint16_t* out) {
  for (int64_t at = 0; at < count; at += 8) {
    const __m256 number = _mm256_loadu_ps(numbers + at);
    const __m256i bits = _mm256_castps_si256(number), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(number, number, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at),
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
}

bool supported() {
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (ecx >> 29 & 1) != 0;
}

}  // namespace

const InstructionSet kAvx2 = {
    "avx2",
    supported,
    kLanes,
    {{dot<Bf16>, 2, 1.0f}, {dot<Fp16>, 1, 1.0f}, {dot<Fp32>, 1, 1.0f}, {dot<Int8>, 1, 1.0f}, {nullptr, 1, 1.0f}},
    spread<2, 8, next_halves>,
    spread<4, 8, next_words>,
    int4_to_int8,
    int8_to_fp32,
    fp32_to_bf16,
    &kIntegerAvx2,
    kAttend,
    nullptr,
};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
