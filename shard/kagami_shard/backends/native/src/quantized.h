// Weights in 8 and 4 bits: how they lie in memory, and the kernels that read them.
//
// As with bf16 a panel is two blocks of 16 outputs, one behind the other in the order of use.
//
//   KG_INT8   [depth / 4][16][4] int8 of either block, then 32 float scales, then 32 times
//             -128 * the sum of an output's values, int32. What `vpdpbusd` multiplies with four
//             activations at once, and what an AMX B tile (16 rows of 4) wants.
//   KG_INT4   of either block, for each group of columns: 16 scales, float16, and 16 zeros, a byte
//             each, in fifteenths; behind those of all groups, from the next border of 64 bytes on,
//             for each 32 columns 4 times [16][2] words, as a bf16 panel has its values: pair p of
//             columns in the lowest four bits, then pairs p + 4, p + 8 and p + 12.
//   KG_FLOAT8   the same with 16 float scales and no zeros; then 8 times 64 bytes of e4m3, pair p
//               in the low bytes of [16][2] words and pair p + 8 in the high ones, each code rotated
//               by three bits: mmm s eeee, where the checkpoint has s eeee mmm.
//   KG_GROUPED8 the same with 16 float scales and 16 float zeros; then [32][16] int8. Codes and
//               zeros are 128 less than in the checkpoint.
#pragma once
#include "simd.h"
#include "step.h"

namespace kg {

// Columns of an int8 panel are padded to this: an AMX tile's depth. Rows of int8 activations: u8 (128
// more than the value) padded to this, then a float scale.
constexpr int kDepth8 = 64;

inline int64_t num_groups(const kg_linear& weight) {
  return (weight.columns + weight.group - 1) / weight.group;
}
inline int64_t num_steps(const kg_linear& weight) { return (weight.columns + kDepth - 1) / kDepth; }
// Of one group; the last may be short.
inline int64_t num_steps(const kg_linear& weight, int64_t group) {
  const int64_t whole = weight.group / kDepth;
  return std::min(whole, num_steps(weight) - group * whole);
}

constexpr int64_t kMostRows = 1 << 28;  // and columns: products of two stay far from 2^63
bool is_weight(const kg_linear&);          // kind, rows, columns and group are such as can be packed
int64_t depth_of(const kg_linear&);        // columns of its panels, padded
int64_t panel_bytes_of(const kg_linear&);  // a panel with all that belongs to it

struct Int8Panel {
  const char* weight;
  const uint8_t* x;  // rows of int8 activations
  int64_t x_stride;
  int rows;
  int64_t depth;
  float* out;  // [rows][kPanel]
  const char* next;
  int64_t next_lines;
};

constexpr int kInt8Rows = 8;
void panel_int8(const Int8Panel&);
void panel_int8_amx(const Int8Panel&);
// `sums` [rows][kPanel] of products, which do not know yet that activations are 128 too large.
void finish_int8(const Int8Panel&, const int32_t* sums);

constexpr int kZeroParts = 15;  // of 1, in which the zeros of KG_INT4 are stored
constexpr int kCodeRows = 8;

struct CodePanel {
  const kg_linear* layer;
  const char* weight;
  const kg_bf16* x;
  int64_t x_stride;
  int rows;
  const float* sums;  // [rows][num_groups], of each group's activations; where there are zeros
  float* out;         // [rows][kPanel]
  const char* next;
};

struct CodeForm {  // how one kind of codes is stored and multiplied; panel_codes.h
  int64_t header_bytes, step_bytes;  // of a group, and of 32 columns, of a block
  bool has_zeros;
  // Up to so many rows the vector unit multiplies codes as they are; for more they are made
  // bf16 first, and beside AMX for more than kCodeRows.
  int64_t max_rows;
  void (*multiply)(const CodePanel&);
  void (*unpack)(const kg_linear&, const char* packed, Part steps, kg_bf16* panel);

  bool multiplies(int64_t rows, bool use_amx) const {
    return rows <= (use_amx ? (int64_t)kCodeRows : max_rows);
  }
};
const CodeForm* code_form(int kind);  // null: no codes
void sum_groups(const kg_linear&, const kg_bf16* x, int64_t x_stride, int rows, float* sums);

// Of all groups of a block.
inline int64_t header_bytes_of(const kg_linear& weight) {
  return round_up(num_groups(weight) * code_form(weight.kind)->header_bytes, 64);
}

inline int64_t code_block_bytes(const kg_linear& weight) {
  return header_bytes_of(weight) + num_steps(weight) * code_form(weight.kind)->step_bytes;
}

bool quantize(const Step&, const kg_op&, int thread);  // KG_QUANTIZE

}  // namespace kg
