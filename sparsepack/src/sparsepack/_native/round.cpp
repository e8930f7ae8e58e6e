// In plain loops over outputs, which compilers turn into vectors of the oldest machine; all machines have the same bits.
#include "round.h"

#include "numbers.h"
#include "pool.h"

#ifdef _MSC_VER
#define SPARSELLM_ALONE __restrict  // no other pointer leads there
#else
#define SPARSELLM_ALONE __restrict__
#endif

namespace sparsellm {
namespace {

constexpr int64_t kWidth = 64;  // outputs that go through a panel together: their state stays in the nearest cache

struct AsFp32 {
  static float round(float value) { return value; }
};
struct AsBf16 {
  static float round(float value) {  // as fp32_to_bf16 for what is finite, without a branch
    const uint32_t bits = to_bits(value);
    return from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  }
};
struct AsFp16 {
  static float round(float value) { return fp16_to_fp32(fp32_to_fp16(value)); }
};

struct Numbers {
  const float* table;
  float lowest, highest;
  bool zero;

  // The nearest number of the grid: with `zero`, 0 is one or not like any other; else it is that of 0 alone. Half to
  // even by 1.5 * 2^23.
  template <bool kTable>
  float nearest(float units) const {
    const float above = units > lowest ? units : lowest;
    const float whole = (above < highest ? above : highest) + 12582912.0f - 12582912.0f;
    const float sign = (units > 0 ? 1.0f : 0.0f) - (units < 0 ? 1.0f : 0.0f);
    if (kTable) {
      const float number = table[static_cast<int>(whole - lowest)];
      return zero ? number : number * sign * sign;
    }
    return (whole == 0) & !zero ? sign : whole;
  }
};

template <class Stored, bool kTable, bool kFirst>
void round_outputs(const RoundPanel& panel, int64_t start, int64_t count) {
  float state[kMaxInputs][kWidth] = {};
  const Numbers numbers{panel.table, panel.lowest, panel.highest, panel.zero};
  float changes[kWidth] = {}, gained[kWidth] = {};
  for (int64_t j = 0; j < panel.inputs; ++j)
    for (int64_t o = 0; o < count; ++o) state[j][o] = panel.state[j * panel.out + start + o];
  for (int64_t j = 0; j < panel.inputs; ++j) {
    const float* row = panel.inner + j * panel.inputs;
    const float pivot = row[j];
    const int64_t at = j * panel.out + start;
    float* const SPARSELLM_ALONE columns = panel.columns + at;
    float* const SPARSELLM_ALONE moves = panel.moves + at;
    const float* const SPARSELLM_ALONE scales = panel.scales + at;
    const float* const SPARSELLM_ALONE free = panel.free + at;
    const float inverse = 1 / pivot;
    for (int64_t o = 0; o < count; ++o) {
      const float own = state[j][o], old = columns[o];
      const float units = (kFirst ? own : old - own * inverse) / scales[o];  // any where the scale is 0
      const float value = Stored::round(numbers.nearest<kTable>(units) * scales[o]) + 0.0f;  // 0 for -0
      if (kFirst) {
        columns[o] = old + value * free[o];  // anchors and zeros are what they are
        moves[o] = (own - columns[o]) / pivot;
        changes[o] = -moves[o];
      } else {
        const float move = (value - old) * free[o];
        const float gain = (2 * own + pivot * move) * move;  // negative where the error falls
        const float better = gain < 0 ? 1.0f : 0.0f;
        columns[o] = better != 0 ? value : old;  // adding the move may miss the grid by an ulp
        moves[o] = changes[o] = move * better;
        gained[o] -= gain * better;
      }
    }
    for (int64_t later = j + 1; later < panel.inputs; ++later)
      for (int64_t o = 0; o < kWidth; ++o) state[later][o] += row[later] * changes[o];
  }
  for (int64_t o = 0; o < count; ++o) panel.gains[start + o] = gained[o];
}

using Outputs = void (*)(const RoundPanel&, int64_t, int64_t);

template <class Stored>
Outputs outputs_of(const RoundPanel& panel) {
  if (panel.table != nullptr) return panel.first ? round_outputs<Stored, true, true> : round_outputs<Stored, true, false>;
  return panel.first ? round_outputs<Stored, false, true> : round_outputs<Stored, false, false>;
}

}  // namespace

void round_panel(const RoundPanel& panel, int threads) {
  const Outputs outputs = panel.stored == kBf16   ? outputs_of<AsBf16>(panel)
                          : panel.stored == kFp16 ? outputs_of<AsFp16>(panel)
                                                  : outputs_of<AsFp32>(panel);
  for_each(threads, (panel.out + kWidth - 1) / kWidth, [&](int64_t index) {
    const int64_t start = kWidth * index, left = panel.out - start;
    outputs(panel, start, left < kWidth ? left : kWidth);
  });
}

}  // namespace sparsellm
