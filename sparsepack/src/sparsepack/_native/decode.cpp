// Tokens through a whole decoder without Python in between: every product is one of the driver's.
#include <algorithm>
#include <cmath>
#include <cstring>

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

  // y (tokens, out) of x (tokens, columns)
  void operator()(const InstructionSet& set, int tokens, const float* x, float* y, int threads) const {
    (rounded ? multiply_rounded : multiply)(set, weight, tokens, kFp32, x, y, threads);
    if (bias == nullptr) return;
    for (int token = 0; token < tokens; ++token) {
      float* row = y + token * weight.out;
      for (int64_t i = 0; i < weight.out; ++i) row[i] += bias[i];
    }
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

int64_t bytes_of(CacheType type) { return type == kCacheBf16 ? 2 : 4; }

// A token, and the cache of keys and values of its sequence: (layers, 2, kv_heads, capacity, size).
struct Step {
  int64_t token, position, capacity;
  uint8_t* cache;

  // `cached`: the bytes of a position, of all heads
  uint8_t* keys(int64_t layer, int64_t cached) const { return cache + 2 * layer * cached * capacity; }
  uint8_t* values(int64_t layer, int64_t cached) const { return cache + (2 * layer + 1) * cached * capacity; }
};

Step step_of(const int64_t* n) { return {n[0], n[1], n[2], at_address<uint8_t>(n[3])}; }

// Numbers into a cache.
void keep(CacheType type, const float* numbers, int64_t count, uint8_t* to) {
  if (type == kCacheFp32) {
    std::memcpy(to, numbers, 4 * count);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t number = fp32_to_bf16(numbers[i]);
    std::memcpy(to + 2 * i, &number, 2);
  }
}

struct Attention {
  const Attend& attend;
  int64_t heads, kv_heads, size, tokens;
  const float* query;            // (heads, size)
  const uint8_t *keys, *values;  // (kv_heads, capacity, size)
  int64_t next;                  // bytes from one of the kv_heads to the next
  float scale;
  float* out;  // (heads, size)

  // `mine` has room for the scores of all tokens.
  void head(int64_t index, float* mine) const {
    const int64_t group = index / (heads / kv_heads);
    attend.scores(query + index * size, keys + group * next, tokens, size, scale, mine);
    const float largest = *std::max_element(mine, mine + tokens);
    float sum = 0;
    for (int64_t j = 0; j < tokens; ++j) sum += mine[j] = std::exp(mine[j] - largest);
    for (int64_t j = 0; j < tokens; ++j) mine[j] /= sum;
    attend.values(mine, values + group * next, tokens, size, out + index * size);
  }
};

}  // namespace

void decode(const InstructionSet& set, const int64_t* numbers, const int64_t* steps, int tokens, int threads) {
  Plan plan{numbers};
  const int64_t layers = plan.number(), hidden = plan.number(), heads = plan.number(), kv_heads = plan.number();
  const int64_t size = plan.number(), inner = plan.number(), positions = plan.number();
  const CacheType type = static_cast<CacheType>(plan.number());
  const float *cos = plan.address<const float>(), *sin = plan.address<const float>();
  const float* settings = plan.address<const float>();  // epsilon of the norms, scale of the scores
  float* x = plan.address<float>();                     // (tokens, hidden); the rest of the memory follows
  float* logits = plan.address<float>();
  const float* last_norm = plan.address<const float>();
  const Linear embedding(plan), head(plan);
  const int64_t mixed_size = heads * size, kv_size = kv_heads * size, hiddens = tokens * hidden;
  const int64_t head_bytes = size * bytes_of(type), cached = kv_heads * head_bytes;
  float *normed = x + hiddens, *query = normed + hiddens, *mixed = query + tokens * mixed_size;
  float *added = mixed + tokens * mixed_size, *gate = added + hiddens, *up = gate + tokens * inner;
  float* scores = up + tokens * inner;

  const auto step = [&](int token) { return step_of(steps + token * kStepNumbers); };
  const auto normalise_all = [&](const float* weight) {
    for (int64_t t = 0; t < tokens; ++t) normalise(x + t * hidden, weight, hidden, settings[0], normed + t * hidden);
  };
  const auto add_all = [&] {
    for (int64_t i = 0; i < hiddens; ++i) x[i] += added[i];
  };
  int64_t products = 0;  // of the attention
  for (int t = 0; t < tokens; ++t) {
    unpack_rows(set, embedding.weight, step(t).token, step(t).token + 1, kFp32, x + t * hidden, 1);
    products += mixed_size * step(t).position;
  }
  const int sharers = products < 1 << 15 ? 1 : threads;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const float *first_norm = plan.address<const float>(), *second_norm = plan.address<const float>();
    const Linear q(plan), k(plan), v(plan), o(plan), gates(plan), ups(plan), down(plan);
    normalise_all(first_norm);
    q(set, tokens, normed, query, threads);
    k(set, tokens, normed, gate, threads);
    v(set, tokens, normed, up, threads);
    for (int t = 0; t < tokens; ++t) {
      const Step mine = step(t);
      const int64_t angle = mine.position * size;
      for (int64_t index = 0; index < heads; ++index)
        rotate(query + t * mixed_size + index * size, cos + angle, sin + angle, size);
      for (int64_t index = 0; index < kv_heads; ++index) {
        float *key = gate + t * kv_size + index * size, *value = up + t * kv_size + index * size;
        rotate(key, cos + angle, sin + angle, size);
        const int64_t place = (index * mine.capacity + mine.position) * head_bytes;
        keep(type, key, size, mine.keys(layer, cached) + place);
        keep(type, value, size, mine.values(layer, cached) + place);
      }
    }
    for_each(sharers, tokens * heads, [&](int64_t index) {
      const int64_t t = index / heads;
      const Step mine = step(static_cast<int>(t));
      const Attention attention{set.attend[type],
                                heads,
                                kv_heads,
                                size,
                                mine.position + 1,
                                query + t * mixed_size,
                                mine.keys(layer, cached),
                                mine.values(layer, cached),
                                mine.capacity * head_bytes,
                                settings[1],
                                mixed + t * mixed_size};
      attention.head(index % heads, scores + index * positions);
    });
    o(set, tokens, mixed, added, threads);
    add_all();
    normalise_all(second_norm);
    gates(set, tokens, normed, gate, threads);
    ups(set, tokens, normed, up, threads);
    const int64_t gated = tokens * gates.weight.out;
    for (int64_t i = 0; i < gated; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    down(set, tokens, gate, added, threads);
    add_all();
  }
  normalise_all(last_norm);
  head(set, tokens, normed, logits, threads);
}

}  // namespace sparsellm
