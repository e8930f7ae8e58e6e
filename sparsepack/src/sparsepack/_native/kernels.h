// What every instruction set provides, and how the driver calls it. Nothing here knows Python or torch.
//
// A row of a packed weight is `words` mask words of 64 columns (bit j of word w is column 64 w + j) and the values of
// its set bits, one after the other. A kernel walks R rows at once over T tokens: a mask word and the next values are
// expanded to fp32 registers once and multiplied into T accumulators. The order in which one (row, token) sum is
// accumulated does not depend on R, T or the number of threads, so neither do its bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsellm {

enum ValueType : int { kBf16 = 0, kFp16 = 1, kFp32 = 2, kInt8 = 3, kInt4 = 4, kValueTypes = 5 };

// A kernel may read this many bytes past the last value of a row; the driver sees to it that they exist.
constexpr int64_t kSlack = 64;
constexpr int kMaxRows = 4;
constexpr int kMaxTokens = 16;
constexpr int64_t kNibblesAhead = 2048;  // bytes; int4 is prefetched so far ahead, about four rows of 2048 columns
constexpr int8_t kPlainLevels[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr int64_t kShared = 32;  // columns that share a scale, at least
constexpr int64_t kBlock = 4;  // mask words that share the scales of rounded activations

// Up to kMaxRows rows that are walked together.
struct Rows {
  int count;
  int64_t words;                      // mask words in a row
  const uint8_t* mask[kMaxRows];      // words * 8 bytes each
  const uint8_t* values[kMaxRows];    // kSlack readable bytes follow the last value
  int64_t mask_ahead;                 // bytes to where the mask of the next rows will be read, for prefetching
  int64_t values_ahead[kMaxRows];     // the same for the values; 0 for int4, whose values are in the cache
  const float* scales[kMaxRows];      // of columns: one for each kShared << shift of them, and one more that is 0
  int shift;
  int64_t full;                       // words from the first on whose bits are all set, as those of a dense weight are
};

// sums[row * tokens + token]; x holds `tokens` panels of `pitch` floats, each 64 * words long, in the kernel's order.
using Dot = void (*)(const Rows& rows, const float* x, int64_t pitch, int tokens, float* sums);

// The values of one row to their columns, zeros between: `columns` elements are written to out.
using Spread = void (*)(const uint8_t* mask, int64_t columns, const uint8_t* values, uint8_t* out);

struct Multiply {
  Dot dot;         // null: values are first brought to fp32 (int4), then the fp32 kernel is used
  int interleave;  // within blocks of interleave * lanes columns, x is stored as [k][j] for column j * interleave + k
  float factor;    // x is multiplied by this, and so is the sum; a power of two, so exact
};

// Activations rounded to whole numbers: value = code * scale. Sixteen scales belong to kBlock mask words of a token: four
// columns of a word share one, as their products share a lane, with those of the other words.
struct Rounded {
  const int8_t* codes;  // `tokens` panels of `pitch` codes, -127 … 127
  const float* scales;  // `tokens` panels of `scales_pitch`
  int64_t pitch, scales_pitch;
  const int32_t* starts;  // what Integer::starts wrote: `tokens` panels of pitch / 4
};

// Scales of columns: none, or one for half a mask word, for a word, for two, or for four and more.
enum Scales { kOfRows, kOfHalves, kOfWords, kOfPairs, kOfBlocks };

constexpr Scales scales_of(int shift) {
  return shift == 0 ? kOfHalves : shift == 1 ? kOfWords : shift == 2 ? kOfPairs : kOfBlocks;
}

// Words of a block whose products are added as whole numbers.
constexpr int64_t words_of(int scales) {
  return scales == kOfHalves || scales == kOfWords ? 1 : scales == kOfPairs ? 2 : kBlock;
}

// Where the scale of a mask word, or of its first half, stands among those of a row of kShared << shift columns a scale.
template <int kScales>
constexpr int64_t column_of(int64_t word, int shift) {
  return kScales == kOfBlocks ? 2 * word >> shift : kScales == kOfPairs ? word / 2 : kScales == kOfWords ? word : 2 * word;
}

// sums[row * tokens + token]
using IntegerDot = void (*)(const Rows& rows, const Rounded& x, int tokens, float* sums);

// Products of whole numbers. Four columns of a mask word are added in one of sixteen lanes, in 32 bits, exactly, and so
// are those words of a block that share a scale of the weight. These sums become fp32; the first of a block is multiplied
// by its scale, each later one is multiplied and added to it in one rounding. The block is multiplied by the scales of
// its activations and added to its lane in one rounding. The sixteen lanes are added at the end, lane j to lane j + 8,
// then 4, 2, 1. All instruction sets do the same, so all have the same bits.
struct Integer {
  IntegerDot int8;  // values in bytes, scales of rows left to the caller
  IntegerDot int8_grouped;  // values in bytes, scales of columns
  IntegerDot int4;  // the same, of values that int4_to_bytes wrote
  // The numbers of codes as bytes for `int4`; where this is null, int4_to_int8 does it.
  void (*int4_to_bytes)(const uint8_t* codes, int64_t count, const int8_t* levels, uint8_t* out);
  // With what the sixteen lanes of every `unit` words of a token begin; null where that is 0.
  void (*starts)(const int8_t* codes, int64_t words, int unit, int32_t* out);
};

struct Tiles;  // tiles.h

// What the keys and values of a sequence are stored in.
enum CacheType : int { kCacheFp32 = 0, kCacheBf16 = 1, kCacheTypes = 2 };

// A query of `size` floats against n keys, and the sum of n values; see attention.h.
struct Attend {
  void (*scores)(const float* query, const void* keys, int64_t n, int64_t size, float scale, float* scores);
  void (*values)(const float* weights, const void* values, int64_t n, int64_t size, float* out);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  int lanes;
  Multiply multiply[kValueTypes];
  Spread spread16;  // of 16-bit values
  Spread spread32;  // of 32-bit values
  // The numbers of codes of one row or several (low nibble first): levels[code], of sixteen levels. May read and write
  // kSlack bytes past the end.
  void (*int4_to_int8)(const uint8_t* codes, int64_t count, const int8_t* levels, int8_t* out);
  // Whole numbers times a scale, exact in fp32 for a scale in bf16. May read and write kSlack bytes past the end.
  void (*int8_to_fp32)(const int8_t* values, float scale, int64_t count, float* out);
  // As numbers.h rounds; null where that is what is used. May read and write kSlack bytes past the end.
  void (*fp32_to_bf16)(const float* numbers, int64_t count, uint16_t* out);
  const Integer* integer;
  const Attend* attend;  // by CacheType
  const Tiles* tiles;  // for products of many tokens in bf16; null for none
};

extern const InstructionSet kScalar;
#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSELLM_X86 1
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const InstructionSet kAvx512Vbmi2;
extern const Integer kIntegerAvx2;
extern const Integer kIntegerAvx512Vnni;
// Compilers that know AMX.
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define SPARSELLM_TILES 1
extern const InstructionSet kAvx512Amx;
extern const InstructionSet kAvx512Bf16;
extern const Tiles kTilesAmx;
extern const Tiles kTilesAvx512Bf16;
#endif
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define SPARSELLM_NEON 1
extern const InstructionSet kNeon;
extern const Integer kIntegerNeon;
// Compilers that can turn the dot product on for one file, or have it on.
#if defined(__ARM_FEATURE_DOTPROD) || (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 8)
#define SPARSELLM_DOTPROD 1
extern const InstructionSet kNeonDotprod;
extern const Integer kIntegerNeonDotprod;
#endif
#endif

}  // namespace sparsellm
