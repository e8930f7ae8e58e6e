// Included inside the anonymous namespace of the two AVX-512 files.

#include "expand.h"

constexpr int kPrefetchSteps = 2;

inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
inline Vector load(const uint16_t* bf16) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Vector all(float number) { return _mm512_set1_ps(number); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }

inline bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

struct Fp32 {
  static constexpr int kColumns = 16, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 4;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    out[0] = _mm512_mask_expand_ps(_mm512_castsi512_ps(zeros()), static_cast<__mmask16>(bits), _mm512_loadu_ps(values));
  }
  static void all(const uint8_t* values, Vector* out) { out[0] = _mm512_loadu_ps(values); }
};

void spread32(const uint8_t* mask, int64_t columns, const uint8_t* values, uint8_t* out) {
  for (int64_t column = 0; column < columns; column += 16) {
    uint16_t bits;
    __builtin_memcpy(&bits, mask + column / 8, 2);
    const __m512 spread = _mm512_mask_expand_ps(_mm512_castsi512_ps(zeros()), bits, _mm512_loadu_ps(values));
    values += 4 * __builtin_popcount(bits);
    const int64_t left = columns - column;
    _mm512_mask_storeu_ps(out + 4 * column, left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1), spread);
  }
}

// Sixty-four codes are thirty-two bytes, each brought to sixteen bits and its high nibble to the upper byte.
void int4_to_int8(const uint8_t* codes, int64_t count, const int8_t* levels, int8_t* out) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  for (int64_t at = 0; at < count; at += 64) {
    const __m512i wide =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at / 2)));
    const __m512i nibbles =
        _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    _mm512_storeu_si512(out + at, _mm512_shuffle_epi8(table, nibbles));
  }
}

void int8_to_fp32(const int8_t* values, float scale, int64_t count, float* out) {
  for (int64_t at = 0; at < count; at += 16) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + at)));
    _mm512_storeu_ps(out + at, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(scale)));
  }
}

// Round to nearest, ties to even; NaN stays NaN.
void fp32_to_bf16(const float* numbers, int64_t count, uint16_t* out) {
  for (int64_t at = 0; at < count; at += 16) {
    const __m512 number = _mm512_loadu_ps(numbers + at);
    const __m512i bits = _mm512_castps_si512(number), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(number, number, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), _mm512_cvtepi32_epi16(rounded));
  }
}

#include "attention.h"
