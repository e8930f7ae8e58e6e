// NEON (every 64-bit ARM): eight columns at a time through a table of byte shuffles.
#include "kernels.h"
#include "numbers.h"

#ifdef SPARSELLM_NEON
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

#include "lookup.h"

namespace sparsellm {
namespace {

using Vector = float32x4_t;
constexpr int kLanes = 4;
constexpr int kPrefetchSteps = 4;

inline Vector zero() { return vdupq_n_f32(0); }
inline Vector load(const float* from) { return vld1q_f32(from); }
inline Vector load(const uint16_t* bf16) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(bf16), 16)); }
inline void store(float* to, Vector v) { vst1q_f32(to, v); }
inline Vector all(float number) { return vdupq_n_f32(number); }
inline Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline float total(Vector v) { return vaddvq_f32(v); }

// An index out of range, such as 0x80, gives zero.
inline uint16x8_t eight_halves(uint64_t bits, const uint8_t* values) {
  return vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kLookup.halves[bits & 255])));
}

inline uint32x4_t four_words(uint64_t bits, const uint8_t* values) {
  return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kLookup.words[bits & 15])));
}

template <class Values>
struct Halves {
  static constexpr int kColumns = 8, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 2;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    Values::widen(eight_halves(bits, values), out);
  }
  static void all(const uint8_t* values, Vector* out) { Values::widen(vreinterpretq_u16_u8(vld1q_u8(values)), out); }
};

struct Bf16 : Halves<Bf16> {
  static void widen(uint16x8_t halves, Vector* out) {
    out[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
    out[1] = vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16));
  }
};

struct Fp16 : Halves<Fp16> {
  static void widen(uint16x8_t bits, Vector* out) {
    const float16x8_t halves = vreinterpretq_f16_u16(bits);
    out[0] = vcvt_f32_f16(vget_low_f16(halves));
    out[1] = vcvt_high_f32_f16(halves);
  }
};

struct Fp32 {
  static constexpr int kColumns = 4, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 4;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    out[0] = vreinterpretq_f32_u32(four_words(bits, values));
  }
  static void all(const uint8_t* values, Vector* out) {
    out[0] = vreinterpretq_f32_u32(vreinterpretq_u32_u8(vld1q_u8(values)));
  }
};

struct Int8 {
  static constexpr int kColumns = 8, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 1;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    const uint8x8_t spread = vtbl1_u8(vld1_u8(values), vld1_u8(kLookup.bytes[bits & 255]));
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(spread));
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    out[1] = vcvtq_f32_s32(vmovl_high_s16(wide));
  }
};

#include "attention.h"
#include "rows.h"
#include "spread.h"

inline void next_halves(unsigned bits, const uint8_t* values, uint8_t* out) {
  vst1q_u8(out, vreinterpretq_u8_u16(eight_halves(bits, values)));
}

inline void next_words(unsigned bits, const uint8_t* values, uint8_t* out) {
  vst1q_u8(out, vreinterpretq_u8_u32(four_words(bits, values)));
}

// Sixteen codes are eight bytes.
void int4_to_int8(const uint8_t* codes, int64_t count, const int8_t* levels, int8_t* out) {
  const int8x16_t table = vld1q_s8(levels);
  for (int64_t at = 0; at < count; at += 16) {
    const uint8x8_t bytes = vld1_u8(codes + at / 2);
    const uint8x8x2_t nibbles = vzip_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
    for (int half = 0; half < 2; ++half) vst1_s8(out + at + 8 * half, vqtbl1_s8(table, nibbles.val[half]));
  }
}

void int8_to_fp32(const int8_t* values, float scale, int64_t count, float* out) {
  for (int64_t at = 0; at < count; at += 8) {
    const int16x8_t wide = vmovl_s8(vld1_s8(values + at));
    vst1q_f32(out + at, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), scale));
    vst1q_f32(out + at + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(wide)), scale));
  }
}

constexpr InstructionSet with(const char* name, bool (*supported)(), const Integer* integer) {
  return {
      name,
      supported,
      kLanes,
      {{dot<Bf16>, 1, 1.0f}, {dot<Fp16>, 1, 1.0f}, {dot<Fp32>, 1, 1.0f}, {dot<Int8>, 1, 1.0f}, {nullptr, 1, 1.0f}},
      spread<2, 8, next_halves>,
      spread<4, 4, next_words>,
      int4_to_int8,
      int8_to_fp32,
      nullptr,
      integer,
      kAttend,
      nullptr,
  };
}

#ifdef SPARSELLM_DOTPROD
bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)
  return true;
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & 1 << 20) != 0;  // HWCAP_ASIMDDP, which old headers lack
#else
  return false;
#endif
}
#endif

}  // namespace

const InstructionSet kNeon = with("neon", [] { return true; }, &kIntegerNeon);
#ifdef SPARSELLM_DOTPROD
const InstructionSet kNeonDotprod = with("neon_dotprod", has_dotprod, &kIntegerNeonDotprod);
#endif

}  // namespace sparsellm
#endif
