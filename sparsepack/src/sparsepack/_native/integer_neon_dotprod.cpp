// Integer products with the dot product of ARMv8.2 (Graviton 2, Cortex-A76, Apple A13 and later): one instruction for
// sixteen columns.
#include "kernels.h"

#ifdef SPARSELLM_DOTPROD
#include <arm_neon.h>

#include "lookup.h"
#include "target.h"
SPARSELLM_TARGET_BEGIN("arch=armv8.2-a+dotprod")  // GCC before 13 takes no less

namespace sparsellm {
namespace {

inline int32x4_t add_sixteen(int32x4_t sums, int8x16_t w, int8x16_t x) { return vdotq_s32(sums, w, x); }

#include "integer_neon.h"

}  // namespace

const Integer kIntegerNeonDotprod = {integer_tokens<Bytes, kOfRows>, integer_scaled<Bytes>, integer_scaled<Bytes>, nullptr,
                                     nullptr};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
