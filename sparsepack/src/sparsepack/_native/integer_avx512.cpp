// Integer products with AVX-512 VBMI2 and VNNI: one expand and one product for sixty-four columns.
#include "kernels.h"

#ifdef SPARSELLM_X86
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

#include "eight.h"
#include "expand.h"

constexpr int kRowsOfTwo = 2, kRowsOfFour = 2;

inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline float total(const Vector* v) {
  return sum_of(_mm256_add_ps(_mm512_castps512_ps256(v[0]), _mm512_extractf32x8_ps(v[0], 1)));
}

using Weights = __m512i;

// The product takes one operand without a sign: weights have kBias added, those that are not kept too, and the sums
// begin at what that adds.
constexpr int kBias = 128;

using Sums = __m512i;
using Activations = __m512i;

inline Activations activations(const int8_t* codes) { return _mm512_loadu_si512(codes); }
inline Sums start(const int32_t* starts, int) { return _mm512_loadu_si512(starts); }
inline void add_products(Sums& sums, const Weights& weights, Activations codes, int) {
  sums = _mm512_dpbusd_epi32(sums, weights, codes);
}
inline Vector as_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }

struct Bytes {
  static constexpr int kRowsOfOne = 1;
  static void expand(uint64_t bits, const uint8_t*& at, Weights& weights) {
    const __m512i spread =
        _mm512_mask_expand_epi8(zeros(), static_cast<__mmask64>(bits), _mm512_loadu_si512(at));
    weights = _mm512_xor_si512(spread, _mm512_set1_epi8(static_cast<char>(kBias)));
    at += __builtin_popcountll(bits);
  }
};

// Values of int4, plus kBias, that the driver has brought to bytes.
struct Biased {
  static constexpr int kRowsOfOne = 4;
  static void expand(uint64_t bits, const uint8_t*& at, Weights& weights) {
    weights = _mm512_mask_expand_epi8(_mm512_set1_epi8(static_cast<char>(kBias)), static_cast<__mmask64>(bits), _mm512_loadu_si512(at));
    at += __builtin_popcountll(bits);
  }
};

// Sixty-four codes are thirty-two bytes, each brought to sixteen bits and its high nibble to the upper byte. A table of
// four times the sixteen numbers is looked up by six bits of a byte, of which two are those of its neighbour.
void int4_to_bytes(const uint8_t* codes, int64_t count, const int8_t* levels, uint8_t* out) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
  const __m512i table = _mm512_xor_si512(_mm512_broadcast_i32x4(sixteen), _mm512_set1_epi8(static_cast<char>(kBias)));
  for (int64_t at = 0; at < count; at += 64) {
    const __m512i wide =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at / 2)));
    __builtin_prefetch(codes + at / 2 + kNibblesAhead);
    const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    _mm512_storeu_si512(out + at, _mm512_permutexvar_epi8(both, table));
  }
}

template <int kScales>
inline Vector of_columns(const float* scales, int shift, int64_t word, int) {
  scales += column_of<kScales>(word, shift);
  const __m512 low = _mm512_set1_ps(scales[0]);
  return kScales != kOfHalves ? low : _mm512_mask_blend_ps(0xff00, low, _mm512_set1_ps(scales[1]));
}

void starts(const int8_t* codes, int64_t words, int unit, int32_t* out) {
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(kBias)), none = _mm512_setzero_si512();
  for (int64_t word = 0; word < words; out += 16) {
    __m512i sums = none;
    for (int64_t end = word + unit < words ? word + unit : words; word < end; ++word)
      sums = _mm512_dpbusd_epi32(sums, bias, _mm512_loadu_si512(codes + 64 * word));
    _mm512_storeu_si512(out, _mm512_sub_epi32(none, sums));
  }
}

#include "integer_rows.h"

}  // namespace

const Integer kIntegerAvx512Vnni = {integer_tokens<Bytes, kOfRows>, integer_scaled<Bytes>, integer_scaled<Biased>,
                                    int4_to_bytes, starts};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
