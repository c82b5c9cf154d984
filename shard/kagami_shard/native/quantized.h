// Weights in 8 and 4 bits: how they lie in memory, and the kernels that read them.
//
// As with bf16 a panel is two blocks of 16 outputs, one behind the other in the order of use.
//
//   KG_INT8   [depth / 4][16][4] int8 of either block, then 32 float scales, then 32 times
//             -128 * the sum of an output's values, int32. What `vpdpbusd` multiplies with four
//             activations at once, and what an AMX B tile (16 rows of 4) wants.
//   KG_INT4   of either block, for each group of columns: 16 scales and 16 zeros, float16; then for
//             each 32 columns 8 times 32 bytes, pair p of columns in the low halves and pair p + 8
//             in the high ones: [16][2] codes each, as a bf16 panel has its values.
#pragma once
#include "simd.h"
#include "step.h"

namespace kg {

constexpr int kDepth8 = 64;  // columns of an int8 panel are padded to this: an AMX tile's depth
constexpr int kStepBytes = 256;  // of 32 columns of an int4 block
constexpr int kGroupHeader = 64;

// Rows of int8 activations: u8 (128 more than the value) padded to kDepth8, then a float scale.
inline int64_t activation_columns(int64_t columns) { return round_up(columns, kDepth8) + 64; }

inline int64_t num_groups(const kg_linear& weight) {
  return (weight.columns + weight.group - 1) / weight.group;
}
inline int64_t num_steps(const kg_linear& weight) { return (weight.columns + kDepth - 1) / kDepth; }
// Of one group; the last may be short.
inline int64_t num_steps(const kg_linear& weight, int64_t group) {
  const int64_t whole = weight.group / kDepth;
  return std::min(whole, num_steps(weight) - group * whole);
}
inline int64_t int4_block_bytes(const kg_linear& weight) {
  return num_groups(weight) * kGroupHeader + num_steps(weight) * kStepBytes;
}

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

constexpr int kInt8Rows = 8, kInt8AmxRows = 16;
void panel_int8(const Int8Panel&);
void panel_int8_amx(const Int8Panel&);
// `sums` [rows][kPanel] of products, which do not know yet that activations are 128 too large.
void finish_int8(const Int8Panel&, const int32_t* sums);

constexpr int kInt4Rows = 8;
// Up to so many rows codes are multiplied as they are; for more the panel is made bf16 first, which
// takes as long as 24 rows do on the vector unit and longer than tiles take for 32.
inline int64_t max_code_rows(bool use_amx) { return use_amx ? kInt4Rows : 4 * kInt4Rows; }
struct Int4Panel {
  const kg_linear* layer;
  const char* weight;
  const kg_bf16* x;
  int64_t x_stride;
  int rows;
  const float* sums;  // [rows][num_groups], of each group's activations
  float* out;         // [rows][kPanel]
  const char* next;
  int64_t next_lines;
};
void panel_int4(const Int4Panel&);
void sum_groups(const kg_linear&, const kg_bf16* x, int64_t x_stride, int rows, float* sums);
void unpack_int4(const kg_linear&, const char* packed, kg_bf16* panel);

bool quantize(const Step&, const kg_op&, int thread);  // KG_QUANTIZE

}  // namespace kg
