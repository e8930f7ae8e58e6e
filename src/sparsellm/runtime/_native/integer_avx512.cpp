// Integer products with AVX-512 VBMI2 and VNNI: one expand and one product for sixty-four columns.
#include "kernels.h"

#ifdef SPARSELLM_X86
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

using Vector = __m512;
constexpr int kLanes = 16;
constexpr int kRowsOfOne = 1, kRowsOfTwo = 2, kRowsOfFour = 2;

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
  static constexpr int kBias = 128;
  static Place begin(const uint8_t* values) { return values; }
  static void prefetch(Place at, int64_t ahead) { __builtin_prefetch(at + ahead); }
  static void expand(uint64_t bits, Place& at, Weights& weights) {
    const __m512i spread = _mm512_maskz_expand_epi8(static_cast<__mmask64>(bits), _mm512_loadu_si512(at));
    weights = _mm512_xor_si512(spread, _mm512_set1_epi8(static_cast<char>(kBias)));
    at += __builtin_popcountll(bits);
  }
  static Vector products(const Weights& weights, const Activations<Bytes>& x, int) {
    return sums_of_four(weights, x.codes, x.start);
  }
};

// A word's values may begin in the middle of a byte. Every eight bytes are given the four that hold their nibbles and
// the one after; a shift of their own brings each nibble to its byte.
struct Nibbles {
  struct Place {
    const uint8_t* values;
    int64_t next;  // nibble
  };
  using Weights = __m512i;
  static constexpr int kBias = 8;
  static Place begin(const uint8_t* values) { return {values, 0}; }
  static void prefetch(Place at, int64_t ahead) { __builtin_prefetch(at.values + at.next / 2 + ahead); }
  static void expand(uint64_t bits, Place& at, Weights& weights) {
    const __m512i sources = _mm512_set_epi64(0x232221201f1e1d1cll, 0x1f1e1d1c1b1a1918ll, 0x1b1a191817161514ll,
                                             0x1716151413121110ll, 0x131211100f0e0d0cll, 0x0f0e0d0c0b0a0908ll,
                                             0x0b0a090807060504ll, 0x0706050403020100ll);
    const __m512i shifts = _mm512_set1_epi64(at.next % 2 == 0 ? 0x1c1814100c080400ll : 0x201c1814100c0804ll);
    const __m512i bytes = _mm512_permutexvar_epi8(sources, _mm512_loadu_si512(at.values + at.next / 2));
    const __m512i codes = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, bytes), _mm512_set1_epi8(15));
    weights = _mm512_mask_expand_epi8(_mm512_set1_epi8(kBias), static_cast<__mmask64>(bits), codes);
    at.next += __builtin_popcountll(bits);
  }
  static Vector products(const Weights& weights, const Activations<Nibbles>& x, int) {
    return sums_of_four(weights, x.codes, x.start);
  }
};

inline Vector own(const float* scales, int) { return _mm512_loadu_ps(scales); }

template <int kScales>
inline Vector of_columns(const Rows& rows, int r, int64_t word, int) {
  const uint16_t* scales = rows.scales[r];
  if (kScales == 1) {
    const short scale = static_cast<short>(scales[2 * word >> rows.shift]);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(scale), 16));
  }
  const __m512 low = _mm512_castsi512_ps(_mm512_set1_epi32(scales[2 * word] << 16));
  const __m512 high = _mm512_castsi512_ps(_mm512_set1_epi32(scales[2 * word + (2 * word < rows.last_scale)] << 16));
  return _mm512_mask_blend_ps(0xff00, low, high);
}

#include "integer_rows.h"

bool supported() { return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
          __builtin_cpu_supports("avx512vnni"); }

}  // namespace

const Integer kIntegerAvx512Vnni = {supported, integer_tokens<Bytes, kOfRows>, integer_scaled<Nibbles>, true};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
