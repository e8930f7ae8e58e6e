// Tiles decoded with AVX-512 VBMI2, and multiplied by AMX or by the dot products of AVX-512 BF16.
#include "tiles.h"

#ifdef SPARSELLM_TILES
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "target.h"
SPARSELLM_TARGET_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#include <immintrin.h>

namespace sparsellm {
namespace {

#include "expand.h"

inline void store(uint16_t* to, __m512i numbers) { _mm512_storeu_si512(to, numbers); }

// Two vectors of fp32 as thirty-two numbers in bf16, the first sixteen first.
inline __m512i as_bf16(__m512 first, __m512 second) {
  const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  __m512i bits;
  __builtin_memcpy(&bits, &both, 64);
  return bits;
}

// (numbers & mask) | ones
inline __m512i masked_or(__m512i numbers, __m512i mask, __m512i ones) {
  return _mm512_ternarylogic_epi32(numbers, mask, ones, 0xea);
}

// The next values, spread over the columns of a mask word, zeros between.
inline __m512i spread_bytes(const uint8_t* mask, int64_t word, const uint8_t*& values) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask + 8 * word, 8);
  const __m512i spread = _mm512_mask_expand_epi8(zeros(), static_cast<__mmask64>(bits), _mm512_loadu_si512(values));
  values += __builtin_popcountll(bits);
  return spread;
}

// Each class says with column(i) which column of a mask word is number i of its two tiles.

struct TilesOfBf16 {
  static constexpr int column(int i) { return i; }

  static void decode(const TileRow& row, uint16_t* out) {
    const uint8_t* values = row.values;
    for (int64_t step = 0; step < 2 * row.words; ++step) {
      uint32_t bits;
      __builtin_memcpy(&bits, row.mask + 4 * step, 4);
      store(out + kTile * step, _mm512_mask_expand_epi16(zeros(), bits, _mm512_loadu_si512(values)));
      values += 2 * __builtin_popcount(bits);
    }
  }
};

// Four columns stand in each 32-bit lane, so columns 0, 4, 8, … become one vector.
struct TilesOfInt8 {
  static constexpr int column(int i) { return 4 * (i % 16) + i / 16; }

  // Byte k of each lane as fp32. A byte without a sign is the mantissa of 2^23 + byte; the subtraction is exact.
  template <int k>
  static __m512 byte(__m512i unsigned_bytes) {
    const __m512i moved = _mm512_srli_epi32(unsigned_bytes, 8 * k);
    const __m512i number = masked_or(moved, _mm512_set1_epi32(255), _mm512_set1_epi32(0x4b000000));
    return _mm512_sub_ps(_mm512_castsi512_ps(number), _mm512_set1_ps(0x1p23f + 128));
  }

  static __m512 scales(const TileRow& row, int64_t word) {
    if (row.shift > 0) return _mm512_set1_ps(row.scales[2 * word >> row.shift]);
    const __m512 first = _mm512_set1_ps(row.scales[2 * word]), second = _mm512_set1_ps(row.scales[2 * word + 1]);
    return _mm512_mask_blend_ps(0xff00, first, second);
  }

  template <bool kScaled>
  static void decode_as(const TileRow& row, uint16_t* out) {
    const uint8_t* values = row.values;
    for (int64_t word = 0; word < row.words; ++word, out += 2 * kTile) {
      const __m512i bytes = _mm512_xor_si512(spread_bytes(row.mask, word, values), _mm512_set1_epi8(-128));
      __m512 numbers[4] = {byte<0>(bytes), byte<1>(bytes), byte<2>(bytes), byte<3>(bytes)};
      if (kScaled) {
        const __m512 scale = scales(row, word);
        for (__m512& number : numbers) number = _mm512_mul_ps(number, scale);
      }
      store(out, as_bf16(numbers[0], numbers[1]));
      store(out + kTile, as_bf16(numbers[2], numbers[3]));
    }
  }

  static void decode(const TileRow& row, uint16_t* out) {
    (row.scales != nullptr ? decode_as<true> : decode_as<false>)(row, out);
  }
};

// A code is looked up in a table of the sixteen levels times the scale of its columns. Kept codes have sixteen added, as
// the levels follow sixteen zeros. A lookup of 16-bit lanes looks at five bits, so it needs no room of their own for
// even columns, and odd ones are only moved down.
struct TilesOfInt4 {
  static constexpr int column(int i) { return 2 * (i % 32) + i / 32; }

  static void codes_to_bytes(const uint8_t* codes, int64_t count, uint8_t* out) {
    for (int64_t at = 0; at < count; at += 64) {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at / 2)));
      const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
      _mm512_storeu_si512(out + at, masked_or(both, _mm512_set1_epi8(15), _mm512_set1_epi8(16)));
    }
  }

  template <bool kHalves>
  static void decode_as(const TileRow& row, uint16_t* out) {
    codes_to_bytes(row.values, row.count, row.memory);
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.levels));
    const __m512 levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
    const auto table = [&](int64_t scale) {
      const __m512 products = _mm512_mul_ps(levels, _mm512_set1_ps(row.scales[scale]));
      return as_bf16(_mm512_setzero_ps(), products);
    };
    const __mmask32 later = 0xffff0000u;  // columns 32 … 63
    const uint8_t* values = row.memory;
    const int64_t words_of_scale = kHalves ? 1 : int64_t{1} << (row.shift - 1);
    int64_t left = 0, next = 0;
    __m512i first{}, second{};
    for (int64_t word = 0; word < row.words; ++word, out += 2 * kTile) {
      if (left == 0) {
        left = words_of_scale;
        first = table(next++);
        if (kHalves) second = table(next++);
      }
      --left;
      const __m512i even = spread_bytes(row.mask, word, values), odd = _mm512_srli_epi16(even, 8);
      __m512i of_even = _mm512_permutexvar_epi16(even, first), of_odd = _mm512_permutexvar_epi16(odd, first);
      if (kHalves) {
        of_even = _mm512_mask_permutexvar_epi16(of_even, later, even, second);
        of_odd = _mm512_mask_permutexvar_epi16(of_odd, later, odd, second);
      }
      store(out, of_even);
      store(out + kTile, of_odd);
    }
  }

  static void decode(const TileRow& row, uint16_t* out) {
    (row.shift == 0 ? decode_as<true> : decode_as<false>)(row, out);
  }
};

// Sixteen rows of sixteen 32-bit numbers become columns: within four numbers, then among the four parts of a vector.
inline void transpose(__m512i* rows) {
  __m512i twos[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m512i first = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x44);
    const __m512i second = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xee);
    const __m512i third = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x44);
    const __m512i fourth = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xee);
    rows[i] = _mm512_shuffle_i32x4(first, third, 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(first, third, 0xdd);
    rows[i + 8] = _mm512_shuffle_i32x4(second, fourth, 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(second, fourth, 0xdd);
  }
}

struct Order {
  alignas(64) uint16_t columns[64];
};

template <class Decoder>
constexpr Order order_of() {
  Order order{};
  for (int i = 0; i < 64; ++i) order.columns[i] = static_cast<uint16_t>(Decoder::column(i));
  return order;
}

constexpr Order kOrderOfBf16 = order_of<TilesOfBf16>();
constexpr Order kOrderOfInt8 = order_of<TilesOfInt8>();
constexpr Order kOrderOfInt4 = order_of<TilesOfInt4>();

__mmask32 first_of(int64_t count) {
  if (count >= 32) return 0xffffffffu;
  return count <= 0 ? 0 : (1u << count) - 1;
}

void lay_out(ValueType type, const uint16_t* x, int64_t columns, int tokens, uint16_t* out) {
  const Order& order = type == kInt8 ? kOrderOfInt8 : type == kInt4 ? kOrderOfInt4 : kOrderOfBf16;
  const __m512i of_first = _mm512_load_si512(order.columns), of_second = _mm512_load_si512(order.columns + 32);
  for (int64_t column = 0; column < columns; column += 64, out += 2 * kTile) {
    const __mmask32 low = first_of(columns - column), high = first_of(columns - column - 32);
    __m512i first[16], second[16];
    for (int t = 0; t < 16; ++t) {
      first[t] = second[t] = _mm512_setzero_si512();
      if (t >= tokens) continue;
      const uint16_t* from = x + t * columns + column;
      const __m512i a = _mm512_maskz_loadu_epi16(low, from), b = _mm512_maskz_loadu_epi16(high, from + 32);
      first[t] = _mm512_permutex2var_epi16(a, of_first, b);
      second[t] = _mm512_permutex2var_epi16(a, of_second, b);
    }
    transpose(first);
    transpose(second);
    for (int pair = 0; pair < 16; ++pair) {
      store(out + 32 * pair, first[pair]);
      store(out + kTile + 32 * pair, second[pair]);
    }
  }
}

void write(const float* sums, const float* scales, int rows, int tokens, int64_t pitch, uint16_t* y) {
  __m512i numbers[16];
  for (int r = 0; r < 16; ++r) {
    const __m512 scale = _mm512_set1_ps(scales == nullptr || r >= rows ? 1.0f : scales[r]);
    numbers[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(sums + 16 * r), scale));
  }
  transpose(numbers);
  const __mmask16 kept = static_cast<__mmask16>(first_of(rows));
  for (int t = 0; t < tokens; ++t) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_castsi512_ps(numbers[t]));
    __m256i bits;
    __builtin_memcpy(&bits, &rounded, 32);
    _mm256_mask_storeu_epi16(y + t * pitch, kept, bits);
  }
}

// A pair of columns of a row, for sixteen tokens, in one instruction.
void multiply_bf16(const TileProduct& product) {
  float* sums = product.sums;
  for (int row_tile = 0; row_tile < product.row_tiles; ++row_tile)
    for (int token_tile = 0; token_tile < product.token_tiles; ++token_tile, sums += 256) {
      const uint16_t* rows = product.weights + row_tile * product.steps * kTile;
      const uint16_t* pairs = product.x + token_tile * product.steps * kTile;
      __m512 totals[16];
      for (__m512& total : totals) total = _mm512_setzero_ps();
      for (int64_t step = 0; step < product.steps; ++step, rows += kTile, pairs += kTile)
        for (int pair = 0; pair < 16; ++pair) {
          const __m512bh of_x = (__m512bh)_mm512_loadu_si512(pairs + 32 * pair);
#pragma GCC unroll 16
          for (int r = 0; r < 16; ++r) {
            int32_t both;
            __builtin_memcpy(&both, rows + 32 * r + 2 * pair, 4);
            totals[r] = _mm512_dpbf16_ps(totals[r], (__m512bh)_mm512_set1_epi32(both), of_x);
          }
        }
      for (int r = 0; r < 16; ++r) _mm512_storeu_ps(sums + 16 * r, totals[r]);
    }
}

void nothing(uint8_t*) {}
void nothing(const uint8_t*) {}

// A bit of what CPUID says about leaf 7.
bool has(unsigned leaf, int word, int bit) {
  unsigned registers[4];
  return __get_cpuid_count(7, leaf, &registers[0], &registers[1], &registers[2], &registers[3]) != 0 &&
         (registers[word] >> bit & 1) != 0;
}

bool has_bf16() { return has(1, 0, 5); }

}  // namespace
}  // namespace sparsellm
SPARSELLM_TARGET_END

// The header was included with the features above, and its functions are only for callers that have them too.
SPARSELLM_TARGET_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,"
    "amx-tile,amx-bf16")
namespace sparsellm {
namespace {

// Tiles 0 … 3 are sums, 4 and 5 weights, 6 and 7 activations: four products for four loads.
template <int kRows, int kTokens>
void multiply_as(const TileProduct& product) {
  const uint16_t *weights = product.weights, *x = product.x;
  float* sums = product.sums;
  const int64_t next = product.steps * kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < product.steps; ++step, weights += kTile, x += kTile) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTokens == 2) {
      _tile_loadd(7, x + next, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows == 2) {
      _tile_loadd(5, weights + next, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (kTokens == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if (kTokens == 2) _tile_stored(1, sums + 256, 64);
  if (kRows == 2) {
    _tile_stored(2, sums + 256 * kTokens, 64);
    if (kTokens == 2) _tile_stored(3, sums + 256 * 3, 64);
  }
}

void multiply_amx(const TileProduct& product) {
  if (product.row_tiles == 2) {
    (product.token_tiles == 2 ? multiply_as<2, 2> : multiply_as<2, 1>)(product);
  } else {
    (product.token_tiles == 2 ? multiply_as<1, 2> : multiply_as<1, 1>)(product);
  }
}

// Another library may count on the configuration that it left on this thread.
void begin_amx(uint8_t* saved) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  static_assert(sizeof configuration == kTileConfiguration, "as the processor reads it");
  _tile_storeconfig(saved);
  _tile_loadconfig(&configuration);
}

void end_amx(const uint8_t* saved) { _tile_loadconfig(saved); }

// Linux gives a process the room for tiles when it asks.
bool has_amx() {
  const bool known = has_bf16() && has(0, 3, 22) && has(0, 3, 24);
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return known && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false && known;
#endif
}

}  // namespace

const Tiles kTilesAvx512Bf16 = {
    has_bf16,
    17,
    nothing,
    nothing,
    {TilesOfBf16::decode, nullptr, nullptr, TilesOfInt8::decode, TilesOfInt4::decode},
    lay_out,
    multiply_bf16,
    write,
};

const Tiles kTilesAmx = {
    has_amx,
    10,
    begin_amx,
    end_amx,
    {TilesOfBf16::decode, nullptr, nullptr, TilesOfInt8::decode, TilesOfInt4::decode},
    lay_out,
    multiply_amx,
    write,
};

}  // namespace sparsellm
SPARSELLM_TARGET_END
#endif
