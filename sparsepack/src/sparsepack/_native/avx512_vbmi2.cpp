// AVX-512 with VBMI2 (Ice Lake, Sapphire Rapids, Zen 4 and later): bytes and halves are spread by one expand.
#include "numbers.h"
#include "tiles.h"

#ifdef SPARSELLM_X86
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

#include "avx512_common.h"

// Expanded halves: even columns in the low half of each 32-bit lane, odd columns in the high half.
template <class Values>
struct Halves {
  static constexpr int kColumns = 32, kRowsOfOne = 4, kRowsOfTwo = 4, kRowsOfFour = 4, kChains = 1, kBytes = 2;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    Values::widen(_mm512_mask_expand_epi16(zeros(), static_cast<__mmask32>(bits), _mm512_loadu_si512(values)), out);
  }
  static void all(const uint8_t* values, Vector* out) { Values::widen(_mm512_loadu_si512(values), out); }
};

// bf16 is fp32 without its low half, so a shift and a mask make two vectors of fp32, with no use of the port that
// expands.
struct Bf16 : Halves<Bf16> {
  static void widen(__m512i pairs, Vector* out) {
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

// The exponent and mantissa of a half, moved into those of an fp32, are the number times 2^-112 (subnormals too). The
// factor is made up for by 2^56 on x and 2^56 on the sum: cheaper than converting, which needs the expanding port.
struct Fp16 : Halves<Fp16> {
  static void widen(__m512i pairs, Vector* out) {
    const __m512i keep = _mm512_set1_epi32(static_cast<int>(0x8fffe000u));
    out[0] = finished(_mm512_and_si512(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 3), keep));
    out[1] = finished(_mm512_and_si512(_mm512_srai_epi32(pairs, 3), keep));
  }
  static Vector finished(__m512i moved) {  // the highest exponent stands for infinity and NaN in fp32 too
    const __m512i top = _mm512_set1_epi32(0x0f800000);
    const __mmask16 special = _mm512_cmpeq_epi32_mask(_mm512_and_si512(moved, top), top);
    return _mm512_castsi512_ps(_mm512_mask_or_epi32(moved, special, moved, _mm512_set1_epi32(0x7f800000)));
  }
};

// Four columns in each 32-bit lane, taken out by shifts.
struct Int8 {
  static constexpr int kColumns = 64, kRowsOfOne = 4, kRowsOfTwo = 2, kRowsOfFour = 2, kChains = 1, kBytes = 1;
  static void expand(uint64_t bits, const uint8_t* values, Vector* out) {
    const __m512i four = _mm512_mask_expand_epi8(zeros(), static_cast<__mmask64>(bits), _mm512_loadu_si512(values));
    out[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 24), 24));
    out[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 16), 24));
    out[2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 8), 24));
    out[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(four, 24));
  }
};

#include "rows.h"

void spread16(const uint8_t* mask, int64_t columns, const uint8_t* values, uint8_t* out) {
  for (int64_t column = 0; column < columns; column += 32) {
    uint32_t bits;
    __builtin_memcpy(&bits, mask + column / 8, 4);
    const __m512i spread = _mm512_mask_expand_epi16(zeros(), bits, _mm512_loadu_si512(values));
    values += 2 * __builtin_popcount(bits);
    const int64_t left = columns - column;
    _mm512_mask_storeu_epi16(out + 2 * column, left >= 32 ? 0xffffffffu : (1u << left) - 1, spread);
  }
}

// Every CPU with VBMI2 has what the integer products need, too; a hypervisor may hide it.
bool supported() {
  return cpu_has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni");
}

constexpr InstructionSet with(const char* name, bool (*is_supported)(), const Tiles* tiles) {
  return {
      name,
      is_supported,
      kLanes,
      {{dot<Bf16>, 2, 1.0f}, {dot<Fp16>, 2, 0x1p56f}, {dot<Fp32>, 1, 1.0f}, {dot<Int8>, 4, 1.0f}, {nullptr, 1, 1.0f}},
      spread16,
      spread32,
      int4_to_int8,
      int8_to_fp32,
      fp32_to_bf16,
      &kIntegerAvx512Vnni,
      kAttend,
      tiles,
  };
}

}  // namespace

const InstructionSet kAvx512Vbmi2 = with("avx512vbmi2", supported, nullptr);
#ifdef SPARSELLM_TILES
const InstructionSet kAvx512Bf16 =
    with("avx512bf16", [] { return supported() && kTilesAvx512Bf16.supported(); }, &kTilesAvx512Bf16);
const InstructionSet kAvx512Amx =
    with("avx512amx", [] { return supported() && kTilesAmx.supported(); }, &kTilesAmx);
#endif

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
