// Included inside the anonymous namespaces of the files with 256 bits, and of those that end with them.

// The sum of eight lanes: lane j and lane j + 4, then 2, 1.
inline float sum_of(__m256 eight) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline __m128i load16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
