// One query against the keys and values before it, which are fp32 or bf16. An instruction set includes this inside its
// own anonymous namespace after defining zero(), load(numbers), store(), all(number), multiply_add() and total(v) for a
// `Vector` of kLanes floats.

inline float number_of(const float* at) { return *at; }
inline float number_of(const uint16_t* at) { return bf16_to_fp32(*at); }

// scores[j] = scale * query · keys[j] for n keys of `size` numbers.
template <class Number>
void attention_scores(const float* query, const void* all_keys, int64_t n, int64_t size, float scale, float* scores) {
  const Number* keys = static_cast<const Number*>(all_keys);
  for (int64_t j = 0; j < n; ++j) {
    const Number* key = keys + j * size;
    Vector sum = zero();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sum = multiply_add(load(query + i), load(key + i), sum);
    float rest = 0;
    for (; i < size; ++i) rest += query[i] * number_of(key + i);
    scores[j] = (total(sum) + rest) * scale;
  }
}

constexpr int kValuesAtOnce = 4;  // vectors of an output that are summed in one walk over the values

// out[i …] of kCount vectors; a sum waits for none of the others.
template <int kCount, class Number>
void attention_part(const float* weights, const Number* values, int64_t n, int64_t size, int64_t i, float* out) {
  Vector sums[kCount];
  for (Vector& sum : sums) sum = zero();
  for (int64_t j = 0; j < n; ++j) {
    const Vector weight = all(weights[j]);
    const Number* value = values + j * size + i;
    for (int part = 0; part < kCount; ++part)
      sums[part] = multiply_add(weight, load(value + part * kLanes), sums[part]);
  }
  for (int part = 0; part < kCount; ++part) store(out + i + part * kLanes, sums[part]);
}

// out = sum of weights[j] * values[j]
template <class Number>
void attention_values(const float* weights, const void* all_values, int64_t n, int64_t size, float* out) {
  constexpr int64_t kWide = kValuesAtOnce * kLanes;
  const Number* values = static_cast<const Number*>(all_values);
  int64_t i = 0;
  for (; i + kWide <= size; i += kWide) attention_part<kValuesAtOnce>(weights, values, n, size, i, out);
  for (; i + kLanes <= size; i += kLanes) attention_part<1>(weights, values, n, size, i, out);
  for (; i < size; ++i) {
    out[i] = 0;
    for (int64_t j = 0; j < n; ++j) out[i] += weights[j] * number_of(values + j * size + i);
  }
}

constexpr Attend kAttend[kCacheTypes] = {
    {attention_scores<float>, attention_values<float>},
    {attention_scores<uint16_t>, attention_values<uint16_t>},
};
