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

// out = sum of weights[j] * values[j]
void attention_values(const float* weights, const float* values, int64_t n, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Vector sum = zero();
    for (int64_t j = 0; j < n; ++j) sum = multiply_add(all(weights[j]), load(values + j * size + i), sum);
    store(out + i, sum);
  }
  for (; i < size; ++i) {
    out[i] = 0;
    for (int64_t j = 0; j < n; ++j) out[i] += weights[j] * values[j * size + i];
  }
}
