// Included inside the anonymous namespaces of the AVX-512 files.

using Vector = __m512;
constexpr int kLanes = 16;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

// What an expand is merged into. Zen 4 makes an expand that zeroes the other lanes wait for the register that it writes,
// which takes five cycles; it does not wait for a copy of another register, and a copy costs nothing. The compiler must
// not know that these are zeros, or it would choose the first form.
inline __m512i zeros() {
  __m512i none = _mm512_setzero_si512();
  asm("" : "+v"(none));
  return none;
}
