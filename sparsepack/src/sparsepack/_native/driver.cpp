#include "driver.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "numbers.h"
#include "pool.h"
#include "tiles.h"

#ifdef SPARSELLM_X86
#include <xmmintrin.h>
#endif

namespace sparsellm {
namespace {

constexpr int64_t kPiecesPerThread = 8;  // so that a thread that was interrupted does not keep the others waiting
constexpr int64_t kLeastPiece = 1 << 15;  // weights; less is not worth handing to another thread

int64_t bytes_of(ValueType type, int64_t values) {
  switch (type) {
    case kFp32: return 4 * values;
    case kInt8: return values;
    case kInt4: return values / 2;
    default: return 2 * values;
  }
}

void write_number(ValueType kind, void* to, int64_t index, float value) {
  if (kind == kFp32) {
    static_cast<float*>(to)[index] = value;
  } else {
    static_cast<uint16_t*>(to)[index] = kind == kBf16 ? fp32_to_bf16(value) : fp32_to_fp16(value);
  }
}

// Numbers of one floating type to another. The types are looked at once, so that the loops can be vectorised.
template <class Read>
void convert(const Read& read, ValueType kind, int64_t count, void* to) {
  if (kind == kFp32) {
    float* out = static_cast<float*>(to);
    for (int64_t i = 0; i < count; ++i) out[i] = read(i);
  } else {
    uint16_t* out = static_cast<uint16_t*>(to);
    if (kind == kBf16) {
      for (int64_t i = 0; i < count; ++i) out[i] = fp32_to_bf16(read(i));
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = fp32_to_fp16(read(i));
    }
  }
}

// Calls use(read), where read(i) is number i in fp32, with code of its own for each type.
template <class Use>
void with_reader(ValueType type, const void* from, const Use& use) {
  const float* wide = static_cast<const float*>(from);
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  if (type == kFp32) {
    use([=](int64_t i) { return wide[i]; });
  } else if (type == kBf16) {
    use([=](int64_t i) { return bf16_to_fp32(halves[i]); });
  } else {
    use([=](int64_t i) { return fp16_to_fp32(halves[i]); });
  }
}

void convert(ValueType type, const void* from, ValueType kind, int64_t count, void* to) {
  with_reader(type, from, [=](const auto& read) { convert(read, kind, count, to); });
}

// x in the kernel's order: within blocks of interleave * lanes columns, column j * interleave + k stands at [k][j].
template <class Read>
void lay_out(const Read& read, int64_t columns, int lanes, int interleave, float* panel) {
  const int64_t block = static_cast<int64_t>(lanes) * interleave;
  const int64_t whole = columns / block * block;
  for (int64_t start = 0; start < whole; start += block)
    for (int k = 0; k < interleave; ++k)
      for (int j = 0; j < lanes; ++j) panel[start + k * lanes + j] = read(start + j * interleave + k);
  for (int64_t column = whole; column < columns; ++column) {
    const int64_t within = column - whole;
    panel[whole + within % interleave * lanes + within / interleave] = read(column);
  }
}

void lay_out(ValueType kind, const void* x, int64_t columns, int lanes, const Multiply& how, float* panel) {
  with_reader(kind, x, [=](const auto& read) {
    lay_out([=](int64_t i) { return read(i) * how.factor; }, columns, lanes, how.interleave, panel);
  });
}

// Subnormal numbers count on every thread, whatever torch.set_flush_denormal did to the calling one.
class ExactSubnormals {
#ifdef SPARSELLM_X86
 public:
  ExactSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~ExactSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Calls use(from, to) for pieces of the rows [first, last) that are about equal work, on up to `wanted` threads.
template <class Use>
void for_each_piece(const Packed& weight, int64_t first, int64_t last, int wanted, const Use& use) {
  const auto work = [&](int64_t row) {  // kept values are read, the columns' bits are expanded
    return weight.offsets[row] - weight.offsets[first] + (row - first) * weight.columns;
  };
  const int64_t total = work(last);
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, total / kLeastPiece)));
  const int64_t count = threads == 1 ? 1 : threads * kPiecesPerThread;
  std::vector<int64_t> starts{first};
  for (int64_t piece = 1; piece < count; ++piece) {
    int64_t low = starts.back(), high = last;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (work(middle) * count < total * piece) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const int64_t row = std::min(last, first + (low - first + kMaxRows - 1) / kMaxRows * kMaxRows);
    if (row > starts.back() && row < last) starts.push_back(row);
  }
  starts.push_back(last);
  for_each(threads, static_cast<int64_t>(starts.size()) - 1, [&](int64_t i) {
    [[maybe_unused]] const ExactSubnormals exact;
    use(starts[i], starts[i + 1]);
  });
}

// Memory that a thread keeps from call to call; it holds nothing between them. The caller's panels of activations are
// another piece (1) than what a thread needs for its rows (0): the caller computes rows too.
template <int kWhich>
uint8_t* scratch(size_t bytes) {
  static thread_local std::unique_ptr<uint8_t[]> memory;
  static thread_local size_t held = 0;
  if (held < bytes) {
    memory.reset(new uint8_t[bytes + 64]);
    held = bytes;
  }
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (64 - start % 64) % 64;
}

// 2^exponent, exactly; exponents are far from the limits of fp32.
float power_of_two(int exponent) { return from_bits(static_cast<uint32_t>(127 + exponent) << 23); }

// Activations as the columns of a weight take them: those with exponents become fp32 and are multiplied by the powers
// of two, in memory that the caller of the products keeps (2).
const void* scaled(const Packed& weight, int tokens, const void* x, ValueType* kind) {
  if (weight.exponents == nullptr) return x;
  const int64_t columns = weight.columns;
  float* out = reinterpret_cast<float*>(scratch<2>(static_cast<size_t>(4 * tokens * columns)));
  convert(*kind, x, kFp32, tokens * columns, out);
  for (int t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < columns; ++i) out[t * columns + i] *= power_of_two(weight.exponents[i]);
  *kind = kFp32;
  return out;
}

// Where a kernel may read the values of rows: in place, or, for the last rows, in a copy with room behind it.
const uint8_t* readable(const Packed& weight, int64_t row, uint8_t* copy, int count = 1) {
  const int64_t end = bytes_of(weight.type, weight.offsets[weight.out]);
  const int64_t from = bytes_of(weight.type, weight.offsets[row]);
  const int64_t to = bytes_of(weight.type, weight.offsets[row + count]);
  if (to + kSlack <= end) return weight.values + from;
  if (to > from) std::memcpy(copy, weight.values + from, static_cast<size_t>(to - from));  // an empty one may be null
  return copy;
}

// Room for one row of any type, what a kernel may write past its end included.
size_t row_bytes(const Packed& weight) { return static_cast<size_t>(4 * weight.stride * 8 + 4 * kSlack); }

int64_t bits_set(uint32_t word) {
  word -= (word >> 1) & 0x55555555u;
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  return ((word + (word >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
}

// The scales of a row whose columns have them.
const uint16_t* group_scales(const Packed& weight, int64_t row) {
  return static_cast<const uint16_t*>(weight.scales) + row * ((weight.columns + weight.group - 1) / weight.group);
}

// kShared << shift columns share a scale.
int shift_of(const Packed& weight) {
  int shift = 0;
  while (kShared << shift < weight.group) ++shift;
  return shift;
}

// A row whose columns have scales in fp32, by way of whole numbers; all memories have row_bytes.
const uint8_t* grouped_in_fp32(const InstructionSet& set, const Packed& weight, int64_t row, uint8_t* copy,
                               uint8_t* whole, uint8_t* out) {
  const int8_t* numbers = reinterpret_cast<const int8_t*>(readable(weight, row, copy));
  if (weight.type == kInt4) {
    const int64_t count = weight.offsets[row + 1] - weight.offsets[row];
    set.int4_to_int8(reinterpret_cast<const uint8_t*>(numbers), count, weight.levels, reinterpret_cast<int8_t*>(whole));
    numbers = reinterpret_cast<const int8_t*>(whole);
  }
  const uint16_t* scale = group_scales(weight, row);
  int64_t done = 0;
  for (int64_t column = 0; column < weight.columns; column += weight.group) {
    const int64_t end = std::min(column + weight.group, weight.stride * 8);
    int64_t count = 0;
    for (int64_t at = column; at < end; at += kShared) {
      uint32_t bits;
      std::memcpy(&bits, weight.mask + row * weight.mask_step + at / 8, 4);
      count += bits_set(bits);
    }
    set.int8_to_fp32(numbers + done, bf16_to_fp32(*scale++), count, reinterpret_cast<float*>(out) + done);
    done += count;
  }
  return out;
}

// Calls dot(rows, sums) for every few rows, on several threads, and writes y. get(row, rows, memory) finds the values of
// rows.count rows, with memory of 3 * kMaxRows row_bytes to keep them in.
template <class Get, class Dot>
void for_rows(const Packed& weight, int tokens, ValueType kind, void* y, float factor, int threads, const Get& get,
              const Dot& dot) {
  const bool of_rows = weight.type == kInt8 && weight.group == 0;
  const float* row_scales = of_rows ? static_cast<const float*>(weight.scales) : nullptr;
  const size_t row_size = row_bytes(weight);
  const int64_t groups = weight.group > 0 ? (weight.columns + weight.group - 1) / weight.group : 0;
  const int shift = shift_of(weight);
  for_each_piece(weight, 0, weight.out, threads, [&](int64_t first, int64_t last) {
    uint8_t* buffers = scratch<0>(3 * kMaxRows * row_size);
    float* scales = reinterpret_cast<float*>(scratch<2>(static_cast<size_t>(4 * kMaxRows * (groups + 1))));
    float sums[kMaxRows * kMaxTokens];
    for (int64_t row = first; row < last; row += kMaxRows) {
      Rows rows;
      rows.count = static_cast<int>(std::min<int64_t>(kMaxRows, last - row));
      rows.words = weight.stride / 8;
      rows.full = weight.mask_step == 0 ? weight.columns / 64 : 0;
      rows.mask_ahead = rows.count * weight.mask_step;
      rows.shift = shift;
      for (int r = 0; r < rows.count; ++r) {
        const int64_t at = row + r, later = std::min(at + kMaxRows, weight.out);
        rows.mask[r] = weight.mask + at * weight.mask_step;
        // int4 has been brought to other memory, which is in the cache.
        rows.values_ahead[r] =
            weight.type == kInt4 ? 0 : bytes_of(weight.type, weight.offsets[later] - weight.offsets[at]);
        if (weight.group > 0) {
          float* of_row = scales + r * (groups + 1);
          const uint16_t* from = group_scales(weight, at);
          for (int64_t i = 0; i < groups; ++i) of_row[i] = bf16_to_fp32(from[i]);
          of_row[groups] = 0;
          rows.scales[r] = of_row;
        }
      }
      get(row, rows, buffers);
      dot(rows, sums);
      for (int r = 0; r < rows.count; ++r)
        for (int t = 0; t < tokens; ++t) {
          float sum = sums[r * tokens + t] * factor;
          if (row_scales != nullptr) sum *= row_scales[row + r];
          write_number(kind, y, t * weight.out + row + r, sum);
        }
    }
  });
}

// Activations to whole numbers -127 … 127 and sixteen scales for every block of mask words. A scale is NaN where an
// activation is not finite, so that every product is; activations that share a scale and are all below 2^-100 count as
// zero.
template <class Read>
void round_token(const Read& read, int64_t columns, int64_t words, int8_t* codes, float* scales) {
  for (int64_t block = 0; block < words; block += kBlock, codes += 64 * kBlock, scales += 16) {
    const int64_t first = 64 * block, size = 64 * std::min(kBlock, words - block);
    const int64_t count = std::min(size, columns - first);
    float numbers[64 * kBlock], factors[64];
    int32_t largest[64] = {};
    for (int64_t i = 0; i < count; ++i) numbers[i] = read(first + i);
    for (int64_t i = count; i < size; ++i) numbers[i] = 0;
    for (int64_t at = 0; at < size; at += 64)
      for (int i = 0; i < 64; ++i)
        largest[i] = std::max(largest[i], static_cast<int32_t>(to_bits(numbers[at + i]) & 0x7fffffffu));
    for (int lane = 0; lane < 16; ++lane) {
      const int32_t* four = largest + 4 * lane;
      const float most = from_bits(static_cast<uint32_t>(std::max(std::max(four[0], four[1]), std::max(four[2], four[3]))));
      const bool finite = most <= std::numeric_limits<float>::max();
      const bool some = finite && most >= 0x1p-100f;
      scales[lane] = some ? most / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      std::fill_n(factors + 4 * lane, 4, some ? 127.0f / most : 0.0f);
    }
    for (int64_t at = 0; at < size; at += 64)
      for (int i = 0; i < 64; ++i) {  // adding 1.5 * 2^23 rounds to a whole number, ties to even
        const float product = factors[i] == 0 ? 0.0f : numbers[at + i] * factors[i];
        codes[at + i] = static_cast<int8_t>(to_bits(product + 0x1.8p23f));
      }
  }
}

void round_token(ValueType kind, const void* x, int64_t columns, int64_t words, int8_t* codes, float* scales) {
  with_reader(kind, x, [=](const auto& read) { round_token(read, columns, words, codes, scales); });
}

}  // namespace

void multiply(const InstructionSet& set, const Packed& weight, int tokens, ValueType kind, const void* x, void* y,
              int threads) {
  const int64_t words = weight.stride / 8, pitch = 64 * words;
  const bool grouped = weight.group > 0;
  const Multiply& how = set.multiply[grouped ? kFp32 : weight.type];
  float* panels = reinterpret_cast<float*>(scratch<1>(static_cast<size_t>(4 * tokens * pitch)));
  ValueType of_x = kind;
  x = scaled(weight, tokens, x, &of_x);
  const int64_t x_bytes = bytes_of(of_x, weight.columns);
  for (int t = 0; t < tokens; ++t) {
    std::fill(panels + t * pitch + pitch - 64, panels + (t + 1) * pitch, 0.0f);
    lay_out(of_x, static_cast<const uint8_t*>(x) + t * x_bytes, weight.columns, set.lanes, how, panels + t * pitch);
  }
  const size_t row_size = row_bytes(weight);
  for_rows(
      weight, tokens, kind, y, how.factor, threads,
      [&](int64_t row, Rows& rows, uint8_t* memory) {
        for (int r = 0; r < rows.count; ++r, memory += 3 * row_size)
          rows.values[r] = grouped
                               ? grouped_in_fp32(set, weight, row + r, memory, memory + row_size, memory + 2 * row_size)
                               : readable(weight, row + r, memory);
      },
      [&](const Rows& rows, float* sums) { how.dot(rows, panels, pitch, tokens, sums); });
}

void multiply_rounded(const InstructionSet& set, const Packed& weight, int tokens, ValueType kind, const void* x,
                      void* y, int threads) {
  const Integer& how = *set.integer;
  const int64_t words = weight.stride / 8, pitch = 64 * words, scales_pitch = (words + kBlock - 1) / kBlock * 16;
  uint8_t* memory = scratch<1>(static_cast<size_t>(tokens * (2 * pitch + 4 * scales_pitch)));
  int8_t* codes = reinterpret_cast<int8_t*>(memory);
  int32_t* starts = reinterpret_cast<int32_t*>(memory + tokens * pitch);
  float* scales = reinterpret_cast<float*>(memory + 2 * tokens * pitch);
  const bool decode = weight.type == kInt4;
  const bool grouped = weight.group > 0;
  const int unit = static_cast<int>(words_of(grouped ? scales_of(shift_of(weight)) : kOfRows));
  ValueType of_x = kind;
  x = scaled(weight, tokens, x, &of_x);
  const int64_t x_bytes = bytes_of(of_x, weight.columns);
  for (int t = 0; t < tokens; ++t) {
    round_token(of_x, static_cast<const uint8_t*>(x) + t * x_bytes, weight.columns, words, codes + t * pitch,
                scales + t * scales_pitch);
    if (how.starts != nullptr) how.starts(codes + t * pitch, words, unit, starts + t * (pitch / 4));
  }
  const Rounded rounded{codes, scales, pitch, scales_pitch, starts};
  const IntegerDot dot = decode ? how.int4 : grouped ? how.int8_grouped : how.int8;
  const size_t row_size = row_bytes(weight);
  for_rows(
      weight, tokens, kind, y, 1.0f, threads,
      [&](int64_t row, Rows& rows, uint8_t* memory) {
        if (!decode) {
          for (int r = 0; r < rows.count; ++r) rows.values[r] = readable(weight, row + r, memory + r * row_size);
          return;
        }
        // Rows follow each other without a gap. One loop for all of them has one end that is hard to predict.
        const int64_t* offsets = weight.offsets + row;
        const int64_t count = offsets[rows.count] - offsets[0];
        const uint8_t* from = readable(weight, row, memory, rows.count);
        uint8_t* bytes = memory + kMaxRows * row_size;
        if (how.int4_to_bytes != nullptr) {
          how.int4_to_bytes(from, count, weight.levels, bytes);
        } else {
          set.int4_to_int8(from, count, weight.levels, reinterpret_cast<int8_t*>(bytes));
        }
        for (int r = 0; r < rows.count; ++r) rows.values[r] = bytes + (offsets[r] - offsets[0]);
      },
      [&](const Rows& rows, float* sums) { dot(rows, rounded, tokens, sums); });
}

namespace {

constexpr int64_t kDecoded = 1 << 19;    // numbers in bf16 that a second-level cache holds
constexpr int64_t kLargestRows = 128;

// Rows that a thread decodes before it multiplies them: a multiple of 32 that the second-level cache holds together with
// some activations, and few enough to keep all threads at work.
int64_t rows_at_once(const Packed& weight, int threads) {
  constexpr int64_t kStep = 2 * kSide;
  const int64_t fitting = std::min(kDecoded / (weight.stride * 8), kLargestRows);
  const int64_t shared = weight.out / (threads * kPiecesPerThread);
  return std::max<int64_t>(1, std::min(fitting, threads == 1 ? fitting : shared) / kStep) * kStep;
}

// The memory of a thread that multiplies tiles: rows in bf16, a copy of a row's values, its codes as bytes, its scales.
struct TileMemory {
  uint16_t* rows;
  uint8_t *copy, *bytes;
  float* scales;

  TileMemory(const Packed& weight, int64_t rows_held, int64_t groups) {
    const size_t decoded = static_cast<size_t>(2 * rows_held * weight.stride * 8);
    const size_t row_size = row_bytes(weight);
    uint8_t* memory = scratch<0>(decoded + 2 * row_size + static_cast<size_t>(4 * (groups + 1)));
    rows = reinterpret_cast<uint16_t*>(memory);
    copy = memory + decoded;
    bytes = copy + row_size;
    scales = reinterpret_cast<float*>(bytes + row_size);
  }
};

// Rows [first, last) to tiles, those that fill the last sixteen as zeros.
void decode_rows(const Tiles& tiles, const Packed& weight, int64_t first, int64_t last, const TileMemory& memory) {
  const int64_t steps = weight.stride / 4;
  const int64_t groups = weight.group > 0 ? (weight.columns + weight.group - 1) / weight.group : 0;
  const int shift = shift_of(weight);
  for (int64_t row = first; row < last; ++row) {
    const int64_t index = row - first;
    TileRow from;
    from.mask = weight.mask + row * weight.mask_step;
    from.values = readable(weight, row, memory.copy);
    from.words = weight.stride / 8;
    from.count = weight.offsets[row + 1] - weight.offsets[row];
    from.scales = nullptr;
    from.shift = shift;
    from.levels = weight.levels;
    from.memory = memory.bytes;
    if (groups > 0) {
      const uint16_t* scales = group_scales(weight, row);
      for (int64_t i = 0; i < groups; ++i) memory.scales[i] = bf16_to_fp32(scales[i]);
      memory.scales[groups] = 0;
      from.scales = memory.scales;
    }
    tiles.decode[weight.type](from, memory.rows + index / kSide * steps * kTile + index % kSide * 32);
  }
  for (int64_t index = last - first; index % kSide != 0; ++index)
    for (int64_t step = 0; step < steps; ++step)
      std::fill_n(memory.rows + (index / kSide * steps + step) * kTile + index % kSide * 32, 32, uint16_t{0});
}

// Products of rows [first, last), which are decoded, with all tokens.
void multiply_rows(const Tiles& tiles, const Packed& weight, int64_t first, int64_t last, int64_t tokens,
                   const TileMemory& memory, const uint16_t* x, uint16_t* y) {
  const int64_t steps = weight.stride / 4;
  const bool of_rows = weight.type == kInt8 && weight.group == 0;
  const float* row_scales = of_rows ? static_cast<const float*>(weight.scales) : nullptr;
  const auto tiles_left = [](int64_t count) { return static_cast<int>(std::min<int64_t>(2, (count + kSide - 1) / kSide)); };
  alignas(64) float sums[4 * kSide * kSide];
  for (int64_t token = 0; token < tokens; token += 2 * kSide)
    for (int64_t row = first; row < last; row += 2 * kSide) {
      const int row_tiles = tiles_left(last - row), token_tiles = tiles_left(tokens - token);
      tiles.multiply({memory.rows + (row - first) / kSide * steps * kTile, x + token / kSide * steps * kTile, row_tiles,
                      token_tiles, steps, sums});
      for (int i = 0; i < row_tiles; ++i)
        for (int j = 0; j < token_tiles; ++j) {
          const int64_t to_row = row + i * kSide, to_token = token + j * kSide;
          tiles.write(sums + (i * token_tiles + j) * kSide * kSide,
                      row_scales == nullptr ? nullptr : row_scales + to_row,
                      static_cast<int>(std::min(kSide, last - to_row)),
                      static_cast<int>(std::min(kSide, tokens - to_token)), weight.out,
                      y + to_token * weight.out + to_row);
        }
    }
}

}  // namespace

void multiply_tiles(const InstructionSet& set, const Packed& weight, int64_t tokens, const uint16_t* x, uint16_t* y,
                    int threads) {
  const Tiles& tiles = *set.tiles;
  const int64_t steps = weight.stride / 4, groups = weight.group > 0 ? (weight.columns + weight.group - 1) / weight.group : 0;
  const int64_t at_once = rows_at_once(weight, threads);
  for (int64_t first = 0; first < tokens; first += kLargestTokens) {
    const int64_t count = std::min(kLargestTokens, tokens - first), token_tiles = (count + kSide - 1) / kSide;
    const uint16_t* some = x + first * weight.columns;
    uint16_t* panels = reinterpret_cast<uint16_t*>(scratch<1>(static_cast<size_t>(2 * token_tiles * steps * kTile)));
    for_each(threads, token_tiles, [&](int64_t i) {
      tiles.lay_out(weight.type, some + i * kSide * weight.columns, weight.columns,
                    static_cast<int>(std::min(kSide, count - i * kSide)), panels + i * steps * kTile);
    });
    for_each(threads, (weight.out + at_once - 1) / at_once, [&](int64_t i) {
      [[maybe_unused]] const ExactSubnormals exact;
      const TileMemory memory(weight, at_once, groups);
      uint8_t saved[kTileConfiguration];
      tiles.begin(saved);
      const int64_t row = i * at_once, last = std::min(weight.out, row + at_once);
      decode_rows(tiles, weight, row, last, memory);
      multiply_rows(tiles, weight, row, last, count, memory, panels, y + first * weight.out);
      tiles.end(saved);
    });
  }
}

void unpack_rows(const InstructionSet& set, const Packed& weight, int64_t first, int64_t last, ValueType kind,
                 void* out, int threads) {
  if (first == last) return;
  const size_t row_size = row_bytes(weight);
  const Spread spread = kind == kFp32 ? set.spread32 : set.spread16;
  for_each_piece(weight, first, last, threads, [&](int64_t from, int64_t to) {
    uint8_t* values = scratch<0>(4 * row_size);
    uint8_t* decoded = values + row_size;
    for (int64_t row = from; row < to; ++row) {
      const int64_t count = weight.offsets[row + 1] - weight.offsets[row];
      const uint8_t* source = readable(weight, row, values);
      ValueType type = weight.type;
      if (weight.group > 0) {
        source = grouped_in_fp32(set, weight, row, values, decoded + row_size, decoded);
        type = kFp32;
      } else if (type == kInt8) {
        set.int8_to_fp32(reinterpret_cast<const int8_t*>(source), static_cast<const float*>(weight.scales)[row],
                         count, reinterpret_cast<float*>(decoded));
        source = decoded;
        type = kFp32;
      }
      const auto converted = [&](const uint8_t* numbers, int64_t size, uint8_t* to) {  // may write past the last one
        if (type == kind) return numbers;
        if (type == kFp32 && kind == kBf16 && set.fp32_to_bf16 != nullptr) {
          set.fp32_to_bf16(reinterpret_cast<const float*>(numbers), size, reinterpret_cast<uint16_t*>(to));
        } else {
          convert(type, numbers, kind, size, to);
        }
        return static_cast<const uint8_t*>(to);
      };
      uint8_t* to_row = static_cast<uint8_t*>(out) + (row - first) * bytes_of(kind, weight.columns);
      const uint8_t* mask = weight.mask + row * weight.mask_step;
      if (weight.exponents != nullptr) {  // columns are multiplied where they stand, then rounded once
        float* numbers = reinterpret_cast<float*>(decoded + 2 * row_size);
        set.spread32(mask, weight.columns, source, decoded + 2 * row_size);
        for (int64_t i = 0; i < weight.columns; ++i) numbers[i] *= power_of_two(weight.exponents[i]);
        const uint8_t* row_of_kind = converted(reinterpret_cast<const uint8_t*>(numbers), weight.columns, decoded);
        std::memcpy(to_row, row_of_kind, static_cast<size_t>(bytes_of(kind, weight.columns)));
      } else {
        spread(mask, weight.columns, converted(source, count, decoded + row_size), to_row);
      }
    }
  });
}

}  // namespace sparsellm
