// A token through a whole decoder without Python in between: every product is one of the driver's.
#include <algorithm>
#include <cmath>

#include "driver.h"
#include "numbers.h"
#include "pool.h"

namespace sparsellm {
namespace {

// Takes numbers and addresses off the plan, in order.
struct Plan {
  const int64_t* at;

  int64_t number() { return *at++; }
  template <class T>
  T* address() {
    return at_address<T>(*at++);
  }
};

struct Linear {
  Packed weight;
  bool rounded;
  const float* bias;  // or null

  explicit Linear(Plan& plan) : weight(weight_of(plan.at)) {
    plan.at += kWeightNumbers;
    rounded = plan.number() != 0;
    bias = plan.address<const float>();
  }

  void operator()(const InstructionSet& set, const float* x, float* y, int threads) const {
    (rounded ? multiply_rounded : multiply)(set, weight, 1, kFp32, x, y, threads);
    for (int64_t i = 0; bias != nullptr && i < weight.out; ++i) y[i] += bias[i];
  }
};

// Eight sums at once, so that an addition need not wait for the one before it.
void normalise(const float* x, const float* weight, int64_t size, float epsilon, float* out) {
  float sums[8] = {};
  for (int64_t i = 0; i < size; ++i) sums[i % 8] += x[i] * x[i];
  float sum = 0;
  for (const float part : sums) sum += part;
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + epsilon);
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(float* head, const float* cos, const float* sin, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    head[i] = first * cos[i] - second * sin[i];
    head[i + half] = second * cos[i + half] + first * sin[i + half];
  }
}

struct Attention {
  const InstructionSet& set;
  int64_t heads, kv_heads, size, capacity, tokens;
  const float *query, *keys, *values;  // (heads, size), (kv_heads, capacity, size)
  float scale;
  float *scores, *out;  // (heads, capacity), (heads, size)

  void head(int64_t index) const {
    const int64_t group = index / (heads / kv_heads);
    float* mine = scores + index * capacity;
    set.attention_scores(query + index * size, keys + group * capacity * size, tokens, size, scale, mine);
    const float largest = *std::max_element(mine, mine + tokens);
    float sum = 0;
    for (int64_t j = 0; j < tokens; ++j) sum += mine[j] = std::exp(mine[j] - largest);
    for (int64_t j = 0; j < tokens; ++j) mine[j] /= sum;
    set.attention_values(mine, values + group * capacity * size, tokens, size, out + index * size);
  }
};

}  // namespace

void decode(const InstructionSet& set, const int64_t* numbers, int64_t token, int64_t position, int threads) {
  Plan plan{numbers};
  const int64_t layers = plan.number(), hidden = plan.number(), heads = plan.number(), kv_heads = plan.number();
  const int64_t size = plan.number(), inner = plan.number(), capacity = plan.number();
  const float* cos = plan.address<const float>() + position * size;
  const float* sin = plan.address<const float>() + position * size;
  const float* settings = plan.address<const float>();  // epsilon of the norms, scale of the scores
  float* x = plan.address<float>();                     // hidden; the rest of the memory follows
  float* logits = plan.address<float>();
  const float* last_norm = plan.address<const float>();
  const Linear embedding(plan), head(plan);
  float *normed = x + hidden, *query = normed + hidden, *mixed = query + heads * size;
  float *added = mixed + heads * size, *gate = added + hidden, *up = gate + inner, *scores = up + inner;

  unpack_rows(set, embedding.weight, token, token + 1, kFp32, x, 1);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const float *first_norm = plan.address<const float>(), *second_norm = plan.address<const float>();
    float *keys = plan.address<float>(), *values = plan.address<float>();
    const Linear q(plan), k(plan), v(plan), o(plan), gates(plan), ups(plan), down(plan);
    normalise(x, first_norm, hidden, settings[0], normed);
    q(set, normed, query, threads);
    k(set, normed, gate, threads);
    v(set, normed, up, threads);
    for (int64_t index = 0; index < heads; ++index) rotate(query + index * size, cos, sin, size);
    for (int64_t index = 0; index < kv_heads; ++index) {
      rotate(gate + index * size, cos, sin, size);
      const int64_t place = (index * capacity + position) * size;
      std::copy_n(gate + index * size, size, keys + place);
      std::copy_n(up + index * size, size, values + place);
    }
    const Attention attention{set, heads, kv_heads, size, capacity, position + 1, query, keys, values, settings[1],
                              scores, mixed};
    const int sharers = heads * size * position < 1 << 15 ? 1 : threads;
    for_each(sharers, heads, [&](int64_t index) { attention.head(index); });
    o(set, mixed, added, threads);
    for (int64_t i = 0; i < hidden; ++i) x[i] += added[i];
    normalise(x, second_norm, hidden, settings[0], normed);
    gates(set, normed, gate, threads);
    ups(set, normed, up, threads);
    for (int64_t i = 0; i < inner; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    down(set, gate, added, threads);
    for (int64_t i = 0; i < hidden; ++i) x[i] += added[i];
  }
  normalise(x, last_norm, hidden, settings[0], normed);
  head(set, normed, logits, threads);
}

}  // namespace sparsellm
