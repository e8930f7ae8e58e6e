// Included inside the anonymous namespaces of the two integer files for 256 bits, which define
//   four(a, b)  32-bit sums of four products each, of bytes without a sign with bytes with one

using Vector = __m256;
constexpr int kLanes = 8;
constexpr int kRowsOfTwo = 1, kRowsOfFour = 1;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(const Vector* v) {
  const __m256 eight = _mm256_add_ps(v[0], v[1]);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline __m128i two_halves(const void* low, const void* high) {
  const __m128i first = _mm_loadl_epi64(static_cast<const __m128i*>(low));
  return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(first), static_cast<const double*>(high)));
}

// Sixteen columns by one shuffle: eight bytes for each byte of the mask. The offsets into the table, eight bytes an
// entry, are cut out of the mask in place.
inline __m128i sixteen(uint64_t low, uint64_t high, const uint8_t*& values) {
  const uint8_t* second = values + __builtin_popcountll(low);
  const __m128i order = two_halves(kLookup.bytes[0] + low, kLookup.upper[0] + high);
  const __m128i spread = _mm_shuffle_epi8(two_halves(values, second), order);
  values = second + __builtin_popcountll(high);
  return spread;
}

template <class Values>
struct Activations {
  const int8_t* codes;

  Activations() = default;
  explicit Activations(const int8_t* from) : codes(from) {}
};

// The product takes one operand without a sign: the weights', whose signs go to the activations.
struct Bytes {
  static constexpr int kRowsOfOne = 1;
  using Place = const uint8_t*;
  struct Weights {
    __m256i values[2];
  };
  static Place begin(const uint8_t* values) { return values; }
  static void prefetch(Place at, int64_t ahead) { __builtin_prefetch(at + ahead); }
  static void expand(uint64_t bits, Place& at, Weights& weights) {
    if (bits == ~uint64_t{0}) {  // a dense row: every word, and in a sparse one hardly any
      weights.values[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      weights.values[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32));
      at += 64;
      return;
    }
    const __m128i a = sixteen(bits << 3 & 0x7f8, bits >> 5 & 0x7f8, at);
    const __m128i b = sixteen(bits >> 13 & 0x7f8, bits >> 21 & 0x7f8, at);
    const __m128i c = sixteen(bits >> 29 & 0x7f8, bits >> 37 & 0x7f8, at);
    const __m128i d = sixteen(bits >> 45 & 0x7f8, bits >> 53 & 0x7f8, at);
    weights.values[0] = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    weights.values[1] = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
  }
  static Vector products(const Weights& weights, const Activations<Bytes>& x, int v) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.codes + 32 * v));
    const __m256i some = weights.values[v];
    return _mm256_cvtepi32_ps(four(_mm256_abs_epi8(some), _mm256_sign_epi8(codes, some)));
  }
};

inline Vector own(const float* scales, int v) { return _mm256_loadu_ps(scales + 8 * v); }

template <int kScales>
inline Vector of_columns(const Rows& rows, int r, int64_t word, int v) {
  return _mm256_set1_ps(rows.scales[r][kScales == kOfWords ? 2 * word >> rows.shift : 2 * word + v]);
}

#include "integer_rows.h"
