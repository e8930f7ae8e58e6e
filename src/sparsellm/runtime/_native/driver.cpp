#include "driver.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "numbers.h"
#include "pool.h"

#ifdef SPARSELLM_X86
#include <xmmintrin.h>
#endif

namespace sparsellm {
namespace {

constexpr int64_t kGroup = 32;           // int4 codes that share a scale
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

void convert(ValueType type, const void* from, ValueType kind, int64_t count, void* to) {
  if (type == kFp32) {
    const float* numbers = static_cast<const float*>(from);
    convert([=](int64_t i) { return numbers[i]; }, kind, count, to);
  } else if (type == kBf16) {
    const uint16_t* numbers = static_cast<const uint16_t*>(from);
    convert([=](int64_t i) { return bf16_to_fp32(numbers[i]); }, kind, count, to);
  } else {
    const uint16_t* numbers = static_cast<const uint16_t*>(from);
    convert([=](int64_t i) { return fp16_to_fp32(numbers[i]); }, kind, count, to);
  }
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
  const float factor = how.factor;
  if (kind == kFp32) {
    const float* from = static_cast<const float*>(x);
    lay_out([=](int64_t i) { return from[i] * factor; }, columns, lanes, how.interleave, panel);
  } else if (kind == kBf16) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    lay_out([=](int64_t i) { return bf16_to_fp32(from[i]) * factor; }, columns, lanes, how.interleave, panel);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    lay_out([=](int64_t i) { return fp16_to_fp32(from[i]) * factor; }, columns, lanes, how.interleave, panel);
  }
}

// Rows cut into pieces of about equal work: a piece is rows [starts[i], starts[i + 1]).
struct Pieces {
  std::vector<int64_t> starts;
  std::vector<int64_t> groups;  // int4: index of the first scale of each piece
  int threads;

  Pieces(const Packed& weight, int64_t first, int64_t last, int wanted) {
    const auto work = [&](int64_t row) {  // kept values are read, the columns' bits are expanded
      return weight.offsets[row] - weight.offsets[first] + (row - first) * weight.columns;
    };
    const int64_t total = work(last);
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, total / kLeastPiece)));
    const int64_t count = threads == 1 ? 1 : threads * kPiecesPerThread;
    starts.push_back(first);
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
    if (weight.type != kInt4) return;
    int64_t group = 0;
    size_t piece = 0;
    for (int64_t row = 0; row < last; ++row) {
      if (row == starts[piece]) groups.push_back(group), ++piece;
      group += (weight.offsets[row + 1] - weight.offsets[row] + kGroup - 1) / kGroup;
    }
    groups.resize(starts.size(), group);
  }

  size_t size() const { return starts.size() - 1; }
};

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

// Calls use(first, last, group) for every piece, on several threads.
template <class Use>
void for_each_piece(const Pieces& pieces, const Use& use) {
  struct Shared {
    const Pieces& pieces;
    const Use& use;
    std::atomic<size_t> next{0};
  } shared{pieces, use};
  run_parallel(
      pieces.threads,
      [](void* data) {
        [[maybe_unused]] const ExactSubnormals exact;
        Shared& mine = *static_cast<Shared*>(data);
        for (size_t i; (i = mine.next.fetch_add(1)) < mine.pieces.size();)
          mine.use(mine.pieces.starts[i], mine.pieces.starts[i + 1],
                   mine.pieces.groups.empty() ? 0 : mine.pieces.groups[i]);
      },
      &shared);
}

// Memory that a thread keeps from call to call; it holds nothing between them.
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

// Where a kernel may read the values of a row: in place, or, for the last rows, in a copy with room behind it.
const uint8_t* readable(const Packed& weight, int64_t row, uint8_t* copy) {
  const int64_t end = bytes_of(weight.type, weight.offsets[weight.out]);
  const int64_t from = bytes_of(weight.type, weight.offsets[row]);
  const int64_t to = bytes_of(weight.type, weight.offsets[row + 1]);
  if (to + kSlack <= end) return weight.values + from;
  std::memcpy(copy, weight.values + from, static_cast<size_t>(to - from));
  return copy;
}

size_t row_bytes(const Packed& weight) { return static_cast<size_t>(4 * weight.stride * 8 + 4 * kSlack); }

}  // namespace

void multiply(const InstructionSet& set, const Packed& weight, int tokens, ValueType kind, const void* x, void* y,
              int threads) {
  const int64_t words = weight.stride / 8, pitch = 64 * words;
  const bool decode = weight.type == kInt4;
  const Multiply& how = set.multiply[decode ? kFp32 : weight.type];

  // Not the per-thread scratch memory: this thread uses that too while it computes.
  std::unique_ptr<float[]> memory(new float[static_cast<size_t>(tokens * pitch + 16)]());
  float* panels = memory.get();
  panels += (64 - reinterpret_cast<uintptr_t>(panels) % 64) % 64 / 4;
  const int64_t x_bytes = bytes_of(kind, weight.columns);
  for (int t = 0; t < tokens; ++t)
    lay_out(kind, static_cast<const uint8_t*>(x) + t * x_bytes, weight.columns, set.lanes, how, panels + t * pitch);

  const float* row_scales = weight.type == kInt8 ? static_cast<const float*>(weight.scales) : nullptr;
  const size_t row_size = row_bytes(weight);
  for_each_piece(Pieces(weight, 0, weight.out, threads), [&](int64_t first, int64_t last, int64_t group) {
    uint8_t* buffers = scratch((kMaxRows + 1) * row_size);
    uint8_t* codes = buffers + kMaxRows * row_size;
    float sums[kMaxRows * kMaxTokens];
    for (int64_t row = first; row < last; row += kMaxRows) {
      Rows rows;
      rows.count = static_cast<int>(std::min<int64_t>(kMaxRows, last - row));
      rows.words = words;
      rows.mask_ahead = rows.count * weight.stride;
      for (int r = 0; r < rows.count; ++r) {
        const int64_t at = row + r, later = std::min(at + kMaxRows, weight.out);
        uint8_t* buffer = buffers + r * row_size;
        rows.mask[r] = weight.mask + at * weight.stride;
        rows.values_ahead[r] = 0;
        if (decode) {
          const int64_t count = weight.offsets[at + 1] - weight.offsets[at];
          set.int4_to_fp32(readable(weight, at, codes), static_cast<const uint16_t*>(weight.scales) + group, count,
                           reinterpret_cast<float*>(buffer));
          group += (count + kGroup - 1) / kGroup;
          rows.values[r] = buffer;
        } else {
          rows.values[r] = readable(weight, at, buffer);
          rows.values_ahead[r] = bytes_of(weight.type, weight.offsets[later] - weight.offsets[at]);
        }
      }
      how.dot(rows, panels, pitch, tokens, sums);
      for (int r = 0; r < rows.count; ++r)
        for (int t = 0; t < tokens; ++t) {
          float sum = sums[r * tokens + t] * how.factor;
          if (row_scales != nullptr) sum *= row_scales[row + r];
          write_number(kind, y, t * weight.out + row + r, sum);
        }
    }
  });
}

void unpack_rows(const InstructionSet& set, const Packed& weight, int64_t first, int64_t last, ValueType kind,
                 void* out, int threads) {
  if (first == last) return;
  const size_t row_size = row_bytes(weight);
  const Spread spread = kind == kFp32 ? set.spread32 : set.spread16;
  for_each_piece(Pieces(weight, first, last, threads), [&](int64_t from, int64_t to, int64_t group) {
    uint8_t* values = scratch(3 * row_size);
    uint8_t* decoded = values + row_size;
    uint8_t* codes = decoded + row_size;
    for (int64_t row = from; row < to; ++row) {
      const uint8_t* source = nullptr;
      const int64_t count = weight.offsets[row + 1] - weight.offsets[row];
      if (weight.type == kind) {
        source = readable(weight, row, values);
      } else {
        const void* numbers = weight.values + bytes_of(weight.type, weight.offsets[row]);
        ValueType type = weight.type;
        if (type == kInt4) {
          set.int4_to_fp32(readable(weight, row, codes), static_cast<const uint16_t*>(weight.scales) + group, count,
                           reinterpret_cast<float*>(decoded));
          group += (count + kGroup - 1) / kGroup;
          numbers = decoded;
          type = kFp32;
        } else if (type == kInt8) {
          const float scale = static_cast<const float*>(weight.scales)[row];
          for (int64_t i = 0; i < count; ++i)
            reinterpret_cast<float*>(decoded)[i] = static_cast<const int8_t*>(numbers)[i] * scale;
          numbers = decoded;
          type = kFp32;
        }
        source = decoded;
        if (type != kind) {
          convert(type, numbers, kind, count, values);
          source = values;
        }
      }
      uint8_t* to_row = static_cast<uint8_t*>(out) + (row - first) * bytes_of(kind, weight.columns);
      spread(weight.mask + row * weight.stride, weight.columns, source, to_row);
    }
  });
}

}  // namespace sparsellm
