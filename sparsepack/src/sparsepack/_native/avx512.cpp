// AVX-512 without VBMI2 (Skylake-X, Cascade Lake, Cooper Lake): values become 32 bits wide first, then are expanded.
#include "kernels.h"
#include "numbers.h"

#ifdef SPARSELLM_X86
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

#include "avx512_common.h"

inline __m256i sixteen_halves(const uint8_t* values) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
}

struct Bf16 {
  static constexpr int kColumns = 16, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 2;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    const __m512i wide = _mm512_cvtepu16_epi32(sixteen_halves(values));
    const __m512i spread = _mm512_mask_expand_epi32(zeros(), static_cast<__mmask16>(bits), wide);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(spread, 16));
  }
  static void all(const uint8_t* values, Vector* out) {
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen_halves(values)), 16));
  }
};

struct Fp16 {
  static constexpr int kColumns = 16, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 2;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    out[0] = _mm512_mask_expand_ps(_mm512_castsi512_ps(zeros()), static_cast<__mmask16>(bits), _mm512_cvtph_ps(sixteen_halves(values)));
  }
  static void all(const uint8_t* values, Vector* out) { out[0] = _mm512_cvtph_ps(sixteen_halves(values)); }
};

struct Int8 {
  static constexpr int kColumns = 16, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 1;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    out[0] = _mm512_cvtepi32_ps(_mm512_mask_expand_epi32(zeros(), static_cast<__mmask16>(bits), wide));
  }
};

#include "rows.h"

void spread16(const uint8_t* mask, int64_t columns, const uint8_t* values, uint8_t* out) {
  for (int64_t column = 0; column < columns; column += 16) {
    uint16_t bits;
    __builtin_memcpy(&bits, mask + column / 8, 2);
    const __m512i spread = _mm512_mask_expand_epi32(zeros(), bits, _mm512_cvtepu16_epi32(sixteen_halves(values)));
    values += 2 * __builtin_popcount(bits);
    const int64_t left = columns - column;
    _mm256_mask_storeu_epi16(out + 2 * column, left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1),
                             _mm512_cvtepi32_epi16(spread));
  }
}

}  // namespace

const InstructionSet kAvx512 = {
    "avx512",
    cpu_has_avx512,
    kLanes,
    {{dot<Bf16>, 1, 1.0f}, {dot<Fp16>, 1, 1.0f}, {dot<Fp32>, 1, 1.0f}, {dot<Int8>, 1, 1.0f}, {nullptr, 1, 1.0f}},
    spread16,
    spread32,
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
