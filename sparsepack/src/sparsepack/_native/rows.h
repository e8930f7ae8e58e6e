// The loop that all vector kernels share. An instruction set includes this inside its own anonymous namespace (and its
// own target attributes) after defining, for its vector type `Vector` of kLanes floats:
//   zero(), load(const float*), add(a, b), multiply_add(a, b, c) = a * b + c, total(v)
// and one class for each value type with
//   kColumns  columns expanded at once (a divisor of 64), as kColumns / kLanes vectors
//   expand(bits, values, out)  the next popcount(bits) values spread over the columns whose bits are set
//   kBytes  storage of a value
//   kChains  accumulators of a sum, which take turns: with few rows at once, a single one would wait for itself
// or, where the bits are better cut out of the mask word in its own way,
//   take(word, step, values, out)  the same for step `step` of the word; returns where the values after these begin
// and, where that is less work,
//   all(values, out)  the same as expand where all bits are set

template <class Values>
inline __attribute__((always_inline)) auto next(uint64_t word, int step, const uint8_t* values, Vector* out, int)
    -> decltype(Values::take(word, step, values, out)) {
  return Values::take(word, step, values, out);
}

template <class Values>
inline __attribute__((always_inline)) const uint8_t* next(uint64_t word, int step, const uint8_t* values, Vector* out,
                                                          long) {
  constexpr uint64_t kAll = ~uint64_t{0} >> (64 - Values::kColumns);
  const uint64_t some = (word >> (step * Values::kColumns)) & kAll;
  Values::expand(some, values, out);
  return values + int64_t{Values::kBytes} * __builtin_popcountll(some);
}

// The same where all bits of the word are set.
template <class Values>
inline __attribute__((always_inline)) auto next_full(int, const uint8_t* values, Vector* out, int)
    -> decltype(Values::all(values, out), values + 0) {
  Values::all(values, out);
  return values + Values::kBytes * Values::kColumns;
}

template <class Values>
inline __attribute__((always_inline)) const uint8_t* next_full(int step, const uint8_t* values, Vector* out, long) {
  return next<Values>(~uint64_t{0}, step, values, out, 0);
}

// Words first to last of R rows for T tokens; with kFull, all of their bits are set.
template <class Values, int R, int T, bool kFull>
inline __attribute__((always_inline)) void walk_words(const Rows& rows, int64_t first, int64_t last, const float* x,
                                                      int64_t pitch, const uint8_t** values,
                                                      Vector (&accumulators)[R][T][Values::kChains]) {
  constexpr int kVectors = Values::kColumns / kLanes;
  constexpr int kSteps = 64 / Values::kColumns;
  for (int64_t word = first; word < last; ++word) {
    uint64_t bits[R];
#pragma GCC unroll 16
    for (int r = 0; r < R && !kFull; ++r) {
      __builtin_memcpy(&bits[r], rows.mask[r] + 8 * word, 8);
      if (word % 8 == 0) __builtin_prefetch(rows.mask[r] + 8 * word + rows.mask_ahead);
    }
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      Vector weights[R][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if (kFull || step % kPrefetchSteps == 0) __builtin_prefetch(values[r] + rows.values_ahead[r]);
        values[r] = kFull ? next_full<Values>(step, values[r], weights[r], 0)
                          : next<Values>(bits[r], step, values[r], weights[r], 0);
      }
      const float* at = x + 64 * word + step * Values::kColumns;
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const Vector activation = load(at + t * pitch + v * kLanes);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            Vector& accumulator = accumulators[r][t][(step * kVectors + v) % Values::kChains];
            accumulator = multiply_add(weights[r][v], activation, accumulator);
          }
        }
      }
    }
  }
}

template <class Values, int R, int T, bool kDense>
inline __attribute__((always_inline)) void walk(const Rows& rows, const float* x, int64_t pitch, int tokens,
                                                float* sums) {
  Vector accumulators[R][T][Values::kChains];
  const uint8_t* values[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    values[r] = rows.values[r];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int chain = 0; chain < Values::kChains; ++chain) accumulators[r][t][chain] = zero();
  }
  if (kDense) walk_words<Values, R, T, true>(rows, 0, rows.full, x, pitch, values, accumulators);
  walk_words<Values, R, T, false>(rows, kDense ? rows.full : 0, rows.words, x, pitch, values, accumulators);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      Vector sum = accumulators[r][t][0];
      if (Values::kChains == 2) sum = add(sum, accumulators[r][t][Values::kChains - 1]);
      sums[r * tokens + t] = total(sum);
    }
  }
}

// R rows at a time for T tokens; what is left of the rows one at a time.
template <class Values, int R, int T, bool kDense>
void walk_all(const Rows& rows, const float* x, int64_t pitch, int tokens, float* sums) {
  int done = 0;
  Rows part = rows;
  for (; done + R <= rows.count; done += R) {
    for (int r = 0; r < R; ++r) {
      part.mask[r] = rows.mask[done + r];
      part.values[r] = rows.values[done + r];
      part.values_ahead[r] = rows.values_ahead[done + r];
    }
    walk<Values, R, T, kDense>(part, x, pitch, tokens, sums + done * tokens);
  }
  if (R > 1) {
    for (; done < rows.count; ++done) {
      part.mask[0] = rows.mask[done];
      part.values[0] = rows.values[done];
      part.values_ahead[0] = rows.values_ahead[done];
      walk<Values, 1, T, kDense>(part, x, pitch, tokens, sums + done * tokens);
    }
  }
}

// Tokens in groups of up to four, so that the accumulators fit into the registers; after the first group, the rows are
// in the cache. Eight tokens of two rows took longer: they read twice as many activations for each weight. A dense weight
// has code of its own, so that it costs a sparse one nothing.
template <class Values, bool kDense>
void dot_rows(const Rows& rows, const float* x, int64_t pitch, int tokens, float* sums) {
  for (int first = 0; first < tokens;) {
    const float* at = x + first * pitch;
    float* to = sums + first;
    const int left = tokens - first;
    if (left >= 4) {
      walk_all<Values, Values::kRowsOfFour, 4, kDense>(rows, at, pitch, tokens, to), first += 4;
    } else if (left >= 2) {
      walk_all<Values, Values::kRowsOfTwo, 2, kDense>(rows, at, pitch, tokens, to), first += 2;
    } else {
      walk_all<Values, Values::kRowsOfOne, 1, kDense>(rows, at, pitch, tokens, to), first += 1;
    }
  }
}

template <class Values>
void dot(const Rows& rows, const float* x, int64_t pitch, int tokens, float* sums) {
  (rows.full > 0 ? dot_rows<Values, true> : dot_rows<Values, false>)(rows, x, pitch, tokens, sums);
}
