// Products of many tokens: sixteen rows of a weight are decoded to bf16 and used for all tokens while they are in the
// cache. A tile is 1 KB. One of weights has sixteen rows of thirty-two columns; one of activations has sixteen pairs of
// columns of sixteen tokens, the two of a pair next to each other. A decoder writes the sixty-four columns of a mask
// word into two tiles in the order that costs it least, and activations are laid out in the same order.
#pragma once

#include "kernels.h"

namespace sparsellm {

constexpr int64_t kSide = 16;                   // rows, or tokens, of a tile
constexpr int64_t kTile = kSide * 32;           // numbers of a tile
constexpr int64_t kLargestTokens = 512;         // for which a weight is decoded once
constexpr int64_t kTileConfiguration = 64;      // bytes

struct TileRow {
  const uint8_t* mask;
  const uint8_t* values;  // kSlack readable bytes follow the last one
  int64_t words;
  int64_t count;          // of values, for int4
  // one for each kShared << shift columns, and one more that is 0; null if the scales are those of rows
  const float* scales;
  int shift;
  const int8_t* levels;
  uint8_t* memory;        // for int4: `count` bytes and kSlack more
};

// Products of one or two tiles of rows with one or two of tokens: sums[row tile][token tile][16 rows][16 tokens]. `steps`
// tiles follow each other, then those of the second rows, or tokens.
struct TileProduct {
  const uint16_t *weights, *x;
  int row_tiles, token_tiles;
  int64_t steps;
  float* sums;
};

struct Tiles {
  bool (*supported)();
  int least_tokens;  // with fewer, products with packed rows are faster
  // A thread that multiplies says so before and after; `saved` is kTileConfiguration bytes.
  void (*begin)(uint8_t* saved);
  void (*end)(const uint8_t* saved);
  // Row r of sixteen goes to out + 32 r of the row's first tile, and of the 2 * words - 1 that follow. Null for a type
  // without tiles. Values of int8 whose scale is the row's become whole numbers, others are rounded to bf16 once.
  void (*decode[kValueTypes])(const TileRow& row, uint16_t* out);
  // Up to sixteen tokens of x (tokens, columns) to 2 * words tiles, in the order of this type's decoder.
  void (*lay_out)(ValueType type, const uint16_t* x, int64_t columns, int tokens, uint16_t* out);
  void (*multiply)(const TileProduct& product);
  // sums[16 rows][16 tokens], times the scale of each row if there are any, to y (…, pitch).
  void (*write)(const float* sums, const float* scales, int rows, int tokens, int64_t pitch, uint16_t* y);
};

}  // namespace sparsellm
