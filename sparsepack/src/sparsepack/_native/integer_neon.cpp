// Integer products with NEON: pairs of products in 16 bits, then sums in 32.
#include "kernels.h"

#ifdef SPARSELLM_NEON
#include <arm_neon.h>

#include "lookup.h"

namespace sparsellm {
namespace {

// Pairs of products first: four in a lane are columns 4 j … 4 j + 3.
inline int32x4_t add_sixteen(int32x4_t sums, int8x16_t w, int8x16_t x) {
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
  return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}

#include "integer_neon.h"

}  // namespace

const Integer kIntegerNeon = {integer_tokens<Bytes, kOfRows>, integer_scaled<Bytes>, integer_scaled<Bytes>, nullptr,
                              nullptr};

}  // namespace sparsellm
#endif
