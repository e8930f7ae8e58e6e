// Products with a packed weight and dense rows of it, for any instruction set.
#pragma once

#include "kernels.h"

namespace sparsellm {

struct Packed {
  int64_t out, columns, stride;  // stride: bytes of a row of the mask, a multiple of 8
  const uint8_t* mask;
  const uint8_t* values;
  const int64_t* offsets;  // out + 1, counted in values
  const void* scales;      // integers: bf16 (out, columns / group) with a group, else float (out,); else null
  ValueType type;
  int64_t group;      // int4, and int8 whose columns have scales: columns that share one, a multiple of 32; else 0
  int64_t mask_step;  // bytes from a row's mask to the next one's: stride, or 0 where all rows share one mask
  const int8_t* exponents;  // int8 and int4: column j is multiplied by 2^exponents[j]; null for none
  const int8_t* levels;     // int4: the number of each of the sixteen codes
};

template <class T>
T* at_address(int64_t number) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(number));
}

// The weight that these numbers describe, in the order of `addresses` in sparsepack/native.py.
constexpr int kWeightNumbers = 12;
inline Packed weight_of(const int64_t* n) {
  return {n[1], n[2], n[3], at_address<const uint8_t>(n[4]), at_address<const uint8_t>(n[5]),
          at_address<const int64_t>(n[6]), at_address<const void>(n[7]), static_cast<ValueType>(n[0]), n[8], n[9],
          at_address<const int8_t>(n[10]), n[11] != 0 ? at_address<const int8_t>(n[11]) : kPlainLevels};
}

// y (tokens, out) = x (tokens, columns) W^T, both of type kFp32, kBf16 or kFp16; at most kMaxTokens tokens.
void multiply(const InstructionSet& set, const Packed& weight, int tokens, ValueType kind, const void* x, void* y,
              int threads);

// The same with activations rounded to int8, for weights of kInt8 or kInt4.
void multiply_rounded(const InstructionSet& set, const Packed& weight, int tokens, ValueType kind, const void* x,
                      void* y, int threads);

// The same for any number of tokens in bf16, x and y both, with an instruction set and a type of weight that have tiles.
// Exponents are left to the caller.
void multiply_tiles(const InstructionSet& set, const Packed& weight, int64_t tokens, const uint16_t* x, uint16_t* y,
                    int threads);

// Rows [first, last) of W as (last - first, columns) of type kFp32, kBf16 or kFp16.
void unpack_rows(const InstructionSet& set, const Packed& weight, int64_t first, int64_t last, ValueType kind,
                 void* out, int threads);

// One token each of up to kMaxTokens sequences through a decoder of the Llama kind, in fp32: embedding, blocks of
// normalised attention with rotary angles and a gated feed-forward unit, norm, head. `plan` is an array of numbers and
// addresses, written by sparsepack/decode.py in the order in which decode.cpp reads it. `steps` has kStepNumbers for
// each sequence: token, position, capacity and address of its cache. The other sequences change no bit of a result.
constexpr int kStepNumbers = 4;
void decode(const InstructionSet& set, const int64_t* plan, const int64_t* steps, int tokens, int threads);

}  // namespace sparsellm
