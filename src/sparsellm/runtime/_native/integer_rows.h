// The loop of the integer kernels. An instruction set includes this inside its own anonymous namespace (and its own
// target attributes) after defining, for its vector type `Vector` of kLanes floats:
//   zero(), multiply(a, b), multiply_add(a, b, c) = a * b + c, total(v[16 / kLanes]), added as struct Integer says
//   Activations(codes)  sixty-four rounded activations;  Weights  as many values in bytes, zeros where none is kept
//   products(weights, activations, v)  as fp32: lanes v * kLanes … of the sixteen sums of four products
//   own(scales, v), of_columns<kScales>(rows, r, word, v)  scales of activations and of weights, lane by lane
// and one class for each kind of values with
//   expand(bits, at, weights)  the next popcount(bits) of them, `at` moves on;  kRowsOfOne  rows at once for one token

template <class Values, int kScales, int R, int T>
inline __attribute__((always_inline)) void integer_walk(const Rows& rows, int first, const Rounded& x, int token,
                                                        int tokens, float* sums) {
  constexpr int kVectors = 16 / kLanes;
  Vector accumulators[R][T][kVectors];
  const uint8_t* at[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    at[r] = rows.values[first + r];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) accumulators[r][t][v] = zero();
  }
  for (int64_t word = 0; word < rows.words; ++word) {
    Activations activations[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) activations[t] = Activations(x.codes + (token + t) * x.pitch + 64 * word);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint64_t bits;
      __builtin_memcpy(&bits, rows.mask[first + r] + 8 * word, 8);
      if (word % 8 == 0) __builtin_prefetch(rows.mask[first + r] + 8 * word + rows.mask_ahead);
      // Values with scales of columns have been brought to bytes: they are in the cache.
      if (kScales == kOfRows) __builtin_prefetch(at[r] + rows.values_ahead[first + r]);
      Weights weights;
      Values::expand(bits, at[r], weights);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const float* scales = x.scales + (token + t) * x.pitch / kLaneColumns + 16 * word;
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          Vector scale = own(scales, v);
          if (kScales != kOfRows)
            scale = multiply(scale, of_columns<kScales>(rows, first + r, word, v));
          Vector& sum = accumulators[r][t][v];
          sum = multiply_add(products(weights, activations[t], v), scale, sum);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[(first + r) * tokens + token + t] = total(accumulators[r][t]);
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
  if (rows.shift > 0) {
    integer_tokens<Values, kOfWords>(rows, x, tokens, sums);
  } else {
    integer_tokens<Values, kOfHalves>(rows, x, tokens, sums);
  }
}
