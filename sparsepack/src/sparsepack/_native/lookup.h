// Byte shuffles for instruction sets that cannot expand: for each byte of a mask, where in the next eight values each of
// its eight columns finds its own. 0x80 stands for a column without a value; the shuffles turn it into zero.
#pragma once

#include <cstdint>

namespace sparsellm {

struct Lookup {
  alignas(64) uint8_t bytes[256][8];     // of values of one byte
  alignas(64) uint8_t counted[256][16];  // the same, then the number of the mask's values eight times
  alignas(64) uint8_t behind[256][16];   // eight times 0, then the same
  alignas(64) uint8_t halves[256][16];   // of values of two
  alignas(64) uint8_t words[16][16];     // of values of four, for four columns

  constexpr Lookup() : bytes(), counted(), behind(), halves(), words() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int column = 0; column < 8; ++column) {
        const bool kept = (mask >> column) & 1;
        bytes[mask][column] = kept ? static_cast<uint8_t>(count) : 0x80;
        counted[mask][column] = behind[mask][8 + column] = bytes[mask][column];
        halves[mask][2 * column] = kept ? static_cast<uint8_t>(2 * count) : 0x80;
        halves[mask][2 * column + 1] = kept ? static_cast<uint8_t>(2 * count + 1) : 0x80;
        if (mask < 16 && column < 4)
          for (int byte = 0; byte < 4; ++byte)
            words[mask][4 * column + byte] = kept ? static_cast<uint8_t>(4 * count + byte) : 0x80;
        count += kept;
      }
      for (int byte = 8; byte < 16; ++byte) counted[mask][byte] = static_cast<uint8_t>(count);
    }
  }
};

static constexpr Lookup kLookup{};

}  // namespace sparsellm
