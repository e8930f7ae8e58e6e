// Byte shuffles for instruction sets that cannot expand: for each byte of a mask, where in the next eight values each of
// its eight columns finds its own. 0x80 stands for a column without a value; the shuffles turn it into zero.
#pragma once

#include <cstdint>

namespace sparsellm {

struct Lookup {
  alignas(64) uint8_t bytes[256][8];    // of values of one byte
  alignas(64) uint8_t upper[256][8];    // the same where the values stand in bytes 8 to 15
  alignas(64) uint8_t halves[256][16];  // of values of two
  alignas(64) uint8_t words[16][16];    // of values of four, for four columns

  constexpr Lookup() : bytes(), upper(), halves(), words() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int column = 0; column < 8; ++column) {
        const bool kept = (mask >> column) & 1;
        bytes[mask][column] = kept ? static_cast<uint8_t>(next) : 0x80;
        upper[mask][column] = kept ? static_cast<uint8_t>(8 + next) : 0x80;
        halves[mask][2 * column] = kept ? static_cast<uint8_t>(2 * next) : 0x80;
        halves[mask][2 * column + 1] = kept ? static_cast<uint8_t>(2 * next + 1) : 0x80;
        if (mask < 16 && column < 4)
          for (int byte = 0; byte < 4; ++byte)
            words[mask][4 * column + byte] = kept ? static_cast<uint8_t>(4 * next + byte) : 0x80;
        next += kept;
      }
    }
  }
};

static constexpr Lookup kLookup{};

}  // namespace sparsellm
