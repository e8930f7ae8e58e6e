// The integer kernels of 64-bit ARM. A file includes this inside its own anonymous namespace after defining
//   add_sixteen(sums, w, x)  adds to each of four sums the products of its four columns

using Vector = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRowsOfTwo = 1, kRowsOfFour = 1;

inline Vector zero() { return vdupq_n_f32(0); }
inline Vector load(const float* from) { return vld1q_f32(from); }
inline Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline float total(const Vector* v) {
  const float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

using Sums = int32x4_t;
using Activations = const int8_t*;

inline Activations activations(const int8_t* codes) { return codes; }
inline Sums start(const int32_t*, int) { return vdupq_n_s32(0); }

struct Weights {
  int8x16_t values[4];
};

inline Vector as_floats(Sums sums) { return vcvtq_f32_s32(sums); }

inline void add_products(Sums& sums, const Weights& weights, Activations codes, int v) {
  sums = add_sixteen(sums, weights.values[v], vld1q_s8(codes + 16 * v));
}

struct Bytes {
  static constexpr int kRowsOfOne = 2;
  static void expand(uint64_t bits, const uint8_t*& at, Weights& weights) {
    for (int v = 0; v < 4; ++v) {
      const uint64_t low = bits >> 16 * v & 255, high = bits >> (16 * v + 8) & 255;
      const uint8x8_t first = vtbl1_u8(vld1_u8(at), vld1_u8(kLookup.bytes[low]));
      at += __builtin_popcountll(low);
      const uint8x8_t second = vtbl1_u8(vld1_u8(at), vld1_u8(kLookup.bytes[high]));
      at += __builtin_popcountll(high);
      weights.values[v] = vreinterpretq_s8_u8(vcombine_u8(first, second));
    }
  }
};

template <int kScales>
inline Vector of_columns(const float* scales, int shift, int64_t word, int v) {
  return vdupq_n_f32(scales[column_of<kScales>(word, shift) + (kScales == kOfHalves ? v / 2 : 0)]);
}

#include "integer_rows.h"
