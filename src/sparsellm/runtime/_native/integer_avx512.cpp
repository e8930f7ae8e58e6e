// Integer products with AVX-512 VBMI2 and VNNI: one expand and one product for sixty-four columns.
#include "kernels.h"

#ifdef SPARSELLM_X86
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

#include "expand.h"

using Vector = __m512;
constexpr int kLanes = 16;
constexpr int kRowsOfTwo = 2, kRowsOfFour = 2;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float total(const Vector* v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v[0]), _mm512_extractf32x8_ps(v[0], 1));
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The product takes one operand without a sign: weights have Values::kBias added, those that are not kept too, and the
// sums begin at what that adds.
template <class Values>
struct Activations {
  __m512i codes, start;

  Activations() = default;
  explicit Activations(const int8_t* from) : codes(_mm512_loadu_si512(from)) {
    const __m512i none = _mm512_setzero_si512();
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(Values::kBias));
    start = _mm512_sub_epi32(none, _mm512_dpbusd_epi32(none, bias, codes));
  }
};

inline Vector sums_of_four(__m512i weights, __m512i codes, __m512i start) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, weights, codes));
}

struct Bytes {
  using Place = const uint8_t*;
  using Weights = __m512i;
  static constexpr int kBias = 128, kRowsOfOne = 1;
  static Place begin(const uint8_t* values) { return values; }
  static void prefetch(Place at, int64_t ahead) { __builtin_prefetch(at + ahead); }
  static void expand(uint64_t bits, Place& at, Weights& weights) {
    const __m512i spread =
        _mm512_mask_expand_epi8(zeros(), static_cast<__mmask64>(bits), _mm512_loadu_si512(at));
    weights = _mm512_xor_si512(spread, _mm512_set1_epi8(static_cast<char>(kBias)));
    at += __builtin_popcountll(bits);
  }
  static Vector products(const Weights& weights, const Activations<Bytes>& x, int) {
    return sums_of_four(weights, x.codes, x.start);
  }
};

// Values of int4, plus 128, that the driver has brought to bytes: they are in the cache already.
struct Biased {
  using Place = const uint8_t*;
  using Weights = __m512i;
  static constexpr int kBias = 128, kRowsOfOne = 4;
  static Place begin(const uint8_t* values) { return values; }
  static void prefetch(Place, int64_t) {}
  static void expand(uint64_t bits, Place& at, Weights& weights) {
    weights = _mm512_mask_expand_epi8(_mm512_set1_epi8(static_cast<char>(kBias)), static_cast<__mmask64>(bits), _mm512_loadu_si512(at));
    at += __builtin_popcountll(bits);
  }
  static Vector products(const Weights& weights, const Activations<Biased>& x, int) {
    return sums_of_four(weights, x.codes, x.start);
  }
};

// Sixty-four codes are thirty-two bytes, each brought to sixteen bits and its high nibble to the upper byte. A table of
// four times the sixteen numbers is looked up by six bits of a byte, of which two are those of its neighbour.
void int4_to_bytes(const uint8_t* codes, int64_t count, const int8_t* levels, uint8_t* out) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
  const __m512i table = _mm512_xor_si512(_mm512_broadcast_i32x4(sixteen), _mm512_set1_epi8(static_cast<char>(128)));
  for (int64_t at = 0; at < count; at += 64) {
    const __m512i wide =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at / 2)));
    __builtin_prefetch(codes + at / 2 + kNibblesAhead);
    const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    _mm512_storeu_si512(out + at, _mm512_permutexvar_epi8(both, table));
  }
}

inline Vector own(const float* scales, int) { return _mm512_loadu_ps(scales); }

template <int kScales>
inline Vector of_columns(const Rows& rows, int r, int64_t word, int) {
  const float* scales = rows.scales[r] + (2 * word >> rows.shift);
  const __m512 low = _mm512_set1_ps(scales[0]);
  return kScales == kOfWords ? low : _mm512_mask_blend_ps(0xff00, low, _mm512_set1_ps(scales[1]));
}

#include "integer_rows.h"

}  // namespace

const Integer kIntegerAvx512Vnni = {integer_tokens<Bytes, kOfRows>, integer_scaled<Biased>, int4_to_bytes};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
