// Rounding the values of some inputs of a weight to a grid, one input after another.
#pragma once

#include "kernels.h"

namespace sparsellm {

constexpr int64_t kMaxInputs = 64;  // of a panel

// Matrices are (inputs, out), row by row.
struct RoundPanel {
  int64_t inputs, out;
  const float* state;   // half the slopes of the error; the values to be rounded where `first`
  float* columns;       // the rounded values, changed
  const float* scales;
  const float* free;    // 1 where a value may move, else 0
  const float* inner;   // (inputs, inputs): the matrix of the error; its factor where `first`
  float* moves;         // written: how far values moved; their errors where `first`
  float* gains;         // (out,), written: how far the error fell
  const float* table;   // the number of the grid for each whole number from the lowest on; null: the same
  float lowest, highest;
  bool zero;            // 0 is a number or not like any other
  bool first;
  ValueType stored;     // kFp32, kBf16 or kFp16: what a value is rounded to once more
};

// Each value moves to the number of the grid that is best for it with all others held; where `first`, it is rounded
// there, and later inputs make up for its error. Outputs are independent, so the number of threads changes no bit.
void round_panel(const RoundPanel& panel, int threads);

}  // namespace sparsellm
