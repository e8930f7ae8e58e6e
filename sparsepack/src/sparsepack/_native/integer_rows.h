// The loop of the integer kernels. An instruction set includes this inside its own anonymous namespace (and its own
// target attributes) after defining, for its vector type `Vector` of kLanes floats:
//   zero(), load(floats), multiply(a, b), multiply_add(a, b, c) = a * b + c
//   total(v[16 / kLanes])  the sum of sixteen lanes, as struct Integer says
//   Sums  kLanes sums in 32 bits, start(starts, v) without products, as_floats(sums);  v stands for lanes v * kLanes …
//   Activations, activations(codes)  sixty-four rounded activations
//   Weights  as many values in bytes, zeros where none is kept
//   add_products(sums, weights, activations, v)  adds the products of four columns to each lane
//   of_columns<kScales>(scales, shift, word, v)  the scales of a row, lane by lane
// and one class for each kind of values with
//   expand(bits, at, weights)  the next popcount(bits) of them, `at` moves on;  kRowsOfOne  rows at once for one token

// What a walk reads: for each row where its mask and its next values are, for each token its activations.
template <int R, int T>
struct Walk {
  const uint8_t *mask[R], *at[R];
  const float* scales[R];
  const int8_t* codes[T];
  const int32_t* starts[T];
  const float* own[T];
};

// One block of words, `words` of them, which is a constant but at the end of a row.
template <class Values, int kScales, int R, int T, class Totals>
inline __attribute__((always_inline)) void integer_block(const Rows& rows, int first, Walk<R, T>& walk, int64_t block,
                                                         int words, Totals& totals) {
  constexpr int kVectors = 16 / kLanes, kUnit = static_cast<int>(words_of(kScales));
  if (words < 1) __builtin_unreachable();
  Vector parts[R][T][kVectors];
#pragma GCC unroll 4
  for (int unit = 0; unit < words; unit += kUnit) {
    Sums sums[R][T][kVectors];
    for (int of_unit = 0; of_unit < kUnit && unit + of_unit < words; ++of_unit) {
      const int64_t word = block + unit + of_unit;
      Activations columns[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) columns[t] = activations(walk.codes[t] + 64 * word);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        uint64_t bits;
        __builtin_memcpy(&bits, walk.mask[r] + 8 * word, 8);
        // Values of int4 have been brought to bytes: they are in the cache, and the distance is 0.
        __builtin_prefetch(walk.at[r] + rows.values_ahead[first + r]);
        Weights weights;
        Values::expand(bits, walk.at[r], weights);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) {
            Sums& sum = sums[r][t][v];
            if (of_unit == 0) sum = start(walk.starts[t] + 16 * (block / kBlock * (kBlock / kUnit) + unit / kUnit), v);
            add_products(sum, weights, columns[t], v);
          }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          Vector& part = parts[r][t][v];
          const Vector numbers = as_floats(sums[r][t][v]);
          if (kScales == kOfRows) {
            part = numbers;
            continue;
          }
          const Vector scale = of_columns<kScales>(walk.scales[r], rows.shift, block + unit, v);
          part = unit == 0 ? multiply(numbers, scale) : multiply_add(numbers, scale, part);
        }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Vector scale = load(walk.own[t] + 16 * (block / kBlock) + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) totals[r][t][v] = multiply_add(parts[r][t][v], scale, totals[r][t][v]);
    }
}

template <class Values, int kScales, int R, int T>
inline __attribute__((always_inline)) void integer_walk(const Rows& rows, int first, const Rounded& x, int token,
                                                        int tokens, float* sums) {
  constexpr int kVectors = 16 / kLanes;
  Vector totals[R][T][kVectors];
  Walk<R, T> walk;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    walk.codes[t] = x.codes + (token + t) * x.pitch;
    walk.starts[t] = x.starts + (token + t) * (x.pitch / 4);
    walk.own[t] = x.scales + (token + t) * x.scales_pitch;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    walk.at[r] = rows.values[first + r];
    walk.mask[r] = rows.mask[first + r];
    if (kScales != kOfRows) walk.scales[r] = rows.scales[first + r];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) totals[r][t][v] = zero();
  }
  int64_t block = 0;
  for (; block + kBlock <= rows.words; block += kBlock) {
    if (block % 8 == 0)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(walk.mask[r] + 8 * block + rows.mask_ahead);
    integer_block<Values, kScales, R, T>(rows, first, walk, block, kBlock, totals);
  }
  if (block < rows.words)
    integer_block<Values, kScales, R, T>(rows, first, walk, block, static_cast<int>(rows.words - block), totals);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[(first + r) * tokens + token + t] = total(totals[r][t]);
}

template <class Values, int kScales, int R, int T>
void integer_rows(const Rows& rows, const Rounded& x, int token, int tokens, float* sums) {
  int row = 0;
  for (; row + R <= rows.count; row += R) integer_walk<Values, kScales, R, T>(rows, row, x, token, tokens, sums);
  if (R > 1)
    for (; row < rows.count; ++row) integer_walk<Values, kScales, 1, T>(rows, row, x, token, tokens, sums);
}

template <class Values, int kScales>
void integer_tokens(const Rows& rows, const Rounded& x, int tokens, float* sums) {
  int token = 0;
  for (; token + 4 <= tokens; token += 4)
    integer_rows<Values, kScales, kRowsOfFour, 4>(rows, x, token, tokens, sums);
  for (; token + 2 <= tokens; token += 2)
    integer_rows<Values, kScales, kRowsOfTwo, 2>(rows, x, token, tokens, sums);
  for (; token < tokens; ++token) integer_rows<Values, kScales, Values::kRowsOfOne, 1>(rows, x, token, tokens, sums);
}

template <class Values>
void integer_scaled(const Rows& rows, const Rounded& x, int tokens, float* sums) {
  switch (scales_of(rows.shift)) {
    case kOfHalves: return integer_tokens<Values, kOfHalves>(rows, x, tokens, sums);
    case kOfWords: return integer_tokens<Values, kOfWords>(rows, x, tokens, sums);
    case kOfPairs: return integer_tokens<Values, kOfPairs>(rows, x, tokens, sums);
    default: return integer_tokens<Values, kOfBlocks>(rows, x, tokens, sums);
  }
}
