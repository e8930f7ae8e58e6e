// Included inside the anonymous namespaces of instruction sets that spread kStep values of kSize bytes at once: kNext
// writes the next popcount(bits) values to the columns whose bits are set, and zeros between.

// As `Spread` in kernels.h says. The last columns, fewer than kStep, go through a full-width copy.
template <int kSize, int kStep, void (*kNext)(unsigned bits, const uint8_t* values, uint8_t* out)>
void spread(const uint8_t* mask, int64_t columns, const uint8_t* values, uint8_t* out) {
  for (int64_t column = 0; column < columns; column += kStep) {
    const unsigned bits = mask[column / 8] >> column % 8 & ((1u << kStep) - 1);
    if (column + kStep <= columns) {
      kNext(bits, values, out + kSize * column);
    } else {
      uint8_t last[kSize * kStep];
      kNext(bits, values, last);
      __builtin_memcpy(out + kSize * column, last, kSize * static_cast<size_t>(columns - column));
    }
    values += kSize * __builtin_popcount(bits);
  }
}
