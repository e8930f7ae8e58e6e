// Integer products with AVX2 and AVX-VNNI (Alder Lake, Zen 5 and later): four products in one instruction.
#include "kernels.h"

#ifdef SPARSELLM_X86
#include <cpuid.h>

#include "lookup.h"
#include "target.h"
SPARSELLM_TARGET_BEGIN("avx2,avxvnni,fma,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

inline __m256i four(__m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), a, b); }

#include "integer_avx2.h"

bool supported() {
  unsigned eax = 0, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}

}  // namespace

const Integer kIntegerAvxVnni = {supported, integer_tokens<Bytes, kOfRows>, integer_scaled<Bytes>, nullptr};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
