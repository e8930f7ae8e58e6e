// One query against the keys and values before it. An instruction set includes this inside its own anonymous namespace
// after defining zero(), load(), store(), all(number), multiply_add() and total(v) for a `Vector` of kLanes floats.

// scores[j] = scale * query · keys[j] for n keys of `size` floats.
void attention_scores(const float* query, const float* keys, int64_t n, int64_t size, float scale, float* scores) {
  for (int64_t j = 0; j < n; ++j) {
    const float* key = keys + j * size;
    Vector sum = zero();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sum = multiply_add(load(query + i), load(key + i), sum);
    float rest = 0;
    for (; i < size; ++i) rest += query[i] * key[i];
    scores[j] = (total(sum) + rest) * scale;
  }
}

constexpr int kValuesAtOnce = 4;  // vectors of an output that are summed in one walk over the values

// out[i …] of kCount vectors; a sum waits for none of the others.
template <int kCount>
void attention_part(const float* weights, const float* values, int64_t n, int64_t size, int64_t i, float* out) {
  Vector sums[kCount];
  for (Vector& sum : sums) sum = zero();
  for (int64_t j = 0; j < n; ++j) {
    const Vector weight = all(weights[j]);
    const float* value = values + j * size + i;
    for (int part = 0; part < kCount; ++part)
      sums[part] = multiply_add(weight, load(value + part * kLanes), sums[part]);
  }
  for (int part = 0; part < kCount; ++part) store(out + i + part * kLanes, sums[part]);
}

// out = sum of weights[j] * values[j]
void attention_values(const float* weights, const float* values, int64_t n, int64_t size, float* out) {
  constexpr int64_t kWide = kValuesAtOnce * kLanes;
  int64_t i = 0;
  for (; i + kWide <= size; i += kWide) attention_part<kValuesAtOnce>(weights, values, n, size, i, out);
  for (; i + kLanes <= size; i += kLanes) attention_part<1>(weights, values, n, size, i, out);
  for (; i < size; ++i) {
    out[i] = 0;
    for (int64_t j = 0; j < n; ++j) out[i] += weights[j] * values[j * size + i];
  }
}
