// Integer products with AVX2: pairs of products in 16 bits (of -128 … 127 with -127 … 127, so none overflows), then sums
// of two pairs in 32.
#include "kernels.h"

#ifdef SPARSELLM_X86
#include "lookup.h"
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx2,fma,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

#include "eight.h"

using Vector = __m256;
constexpr int kLanes = 8;
constexpr int kRowsOfTwo = 1, kRowsOfFour = 1;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(const Vector* v) { return sum_of(_mm256_add_ps(v[0], v[1])); }

inline __m256i pair(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(low)), load16(high), 1);
}

// Where the entry of eight columns of a mask, from column `at` on, stands in a table of sixteen bytes an entry. With BMI2
// a rotation is one instruction, a shift that keeps its operand two.
inline uint64_t offset(uint64_t bits, int at) {
  const int by = (at + 60) % 64;
  return (bits >> by | bits << (64 - by)) & 0xff0;
}

// Thirty-two columns from column kAt on: sixteen from the values at `low`, sixteen from those at `high`, each by one
// shuffle. Its order is that of eight columns, with their count behind it, plus that of the next eight.
template <int kAt>
inline __m256i thirty_two(uint64_t bits, const uint8_t* low, const uint8_t* high) {
  const uint8_t *eight = kLookup.counted[0], *next = kLookup.behind[0];
  const __m256i order = _mm256_add_epi8(pair(eight + offset(bits, kAt), eight + offset(bits, kAt + 16)),
                                        pair(next + offset(bits, kAt + 8), next + offset(bits, kAt + 24)));
  return _mm256_shuffle_epi8(pair(low, high), order);
}

using Sums = __m256i;
using Activations = const int8_t*;

inline Activations activations(const int8_t* codes) { return codes; }
inline Sums start(const int32_t*, int) { return _mm256_setzero_si256(); }

struct Weights {
  __m256i values[2];
};

inline Vector as_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }

// Pairs of products take one operand without a sign: the weights', whose signs go to the activations.
inline void add_products(Sums& sums, const Weights& weights, Activations codes, int v) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * v)), w = weights.values[v];
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

struct Bytes {
  static constexpr int kRowsOfOne = 1;
  static void expand(uint64_t bits, const uint8_t*& at, Weights& weights) {
    if (bits == ~uint64_t{0}) {  // a dense row: every word, and in a sparse one hardly any
      weights.values[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      weights.values[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32));
      at += 64;
      return;
    }
    const uint8_t* middle = at + __builtin_popcount(static_cast<uint32_t>(bits));
    weights.values[0] = thirty_two<0>(bits, at, at + __builtin_popcount(static_cast<uint16_t>(bits)));
    weights.values[1] = thirty_two<32>(bits, middle, at + __builtin_popcountll(bits << 16));
    at += __builtin_popcountll(bits);
  }
};

template <int kScales>
inline Vector of_columns(const float* scales, int shift, int64_t word, int v) {
  return _mm256_set1_ps(scales[column_of<kScales>(word, shift) + (kScales == kOfHalves ? v : 0)]);
}

#include "integer_rows.h"

}  // namespace

const Integer kIntegerAvx2 = {integer_tokens<Bytes, kOfRows>, integer_scaled<Bytes>, integer_scaled<Bytes>, nullptr,
                              nullptr};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
