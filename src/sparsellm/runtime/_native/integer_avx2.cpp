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

inline __m256i four(__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)); }

#include "integer_avx2.h"

}  // namespace

const Integer kIntegerAvx2 = {[] { return true; }, integer_tokens<Bytes, kOfRows>, integer_scaled<Bytes>, nullptr};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
