// Weights in 8 and 4 bits into the order that their kernels read.
#include <string.h>

#include "quantized.h"
#include "rows.h"
#include "simd.h"

using namespace kg;

namespace kg {

int64_t depth_of(const kg_linear& weight) {
  switch (weight.kind) {
    case KG_INT8:
      return round_up(weight.columns, kDepth8);
    default:
      return round_up(weight.columns, kDepth);
  }
}

int64_t panel_bytes_of(const kg_linear& weight) {
  switch (weight.kind) {
    case KG_INT8:
      return kPanel * (depth_of(weight) + 8);
    case KG_BF16:
      return kPanel * depth_of(weight) * 2;
    default:
      return kPanel / kBlock * code_block_bytes(weight);
  }
}

namespace {

void pack_int8_panel(const kg_linear& layer, const int8_t* values, const float* scales, bool gated,
                     int64_t index, char* panel) {
  const int64_t depth = depth_of(layer), columns = layer.columns;
  memset(panel, 0, panel_bytes_of(layer));
  float* panel_scales = (float*)(panel + kPanel * depth);
  int32_t* offsets = (int32_t*)(panel_scales + kPanel);
  for (int64_t i = 0; i < kPanel; i++) {
    const int64_t source = source_row(index * kPanel + i, layer.rows, gated);
    if (source < 0) continue;
    const int8_t* row = values + source * columns;
    char* to = panel + i / kBlock * kBlock * depth + i % kBlock * 4;
    int32_t sum = 0;
    for (int64_t column = 0; column < columns; column++) {
      to[column / 4 * 4 * kBlock + column % 4] = row[column];
      sum += row[column];
    }
    panel_scales[i] = scales[source];
    offsets[i] = -128 * sum;
  }
}

}  // namespace
}  // namespace kg

extern "C" void kg_pack_int8(const kg_linear* layer, const int8_t* values, const float* scales,
                             int gated, void* packed) {
  const int64_t num_panels = kg_padded_rows(layer->rows, gated) / kPanel;
  const int64_t bytes = (int64_t)layer->rows * layer->columns;
  on_all_cores(num_panels, bytes, [=](int64_t index) {
    pack_int8_panel(*layer, values, scales, gated != 0, index,
                    (char*)packed + index * panel_bytes_of(*layer));
  });
}

extern "C" void kg_pack_int4(const kg_linear* layer, const uint8_t* codes, const uint16_t* scales,
                             const uint16_t* zeros, int gated, void* packed) {
  const int64_t groups = num_groups(*layer), columns = layer->columns;
  const int64_t block_bytes = code_block_bytes(*layer);
  const int64_t num_blocks = kg_padded_rows(layer->rows, gated) / kBlock;
  const CodeForm& form = *code_form(KG_INT4);
  on_all_cores(num_blocks, num_blocks * block_bytes, [=, &form](int64_t index) {
    char* block = (char*)packed + index * block_bytes;
    for (int64_t group = 0; group < groups; group++) {
      const int64_t bytes = form.header_bytes + num_steps(*layer, group) * form.step_bytes;
      memset(block, 0, bytes);
      for (int64_t i = 0; i < kBlock; i++) {
        const int64_t source = source_row(index * kBlock + i, layer->rows, gated != 0);
        if (source < 0) continue;
        ((uint16_t*)block)[i] = scales[source * groups + group];
        ((uint16_t*)block)[kBlock + i] = zeros[source * groups + group];
        const int64_t begin = group * layer->group;
        const int64_t end = std::min(columns, begin + layer->group);
        for (int64_t column = begin; column < end; column++) {
          const int64_t place = column - begin, pair = place % kDepth / 2;
          uint8_t code = codes[source * ((columns + 1) / 2) + column / 2];
          code = column % 2 ? code >> 4 : code & 15;
          char* step = block + form.header_bytes + place / kDepth * form.step_bytes;
          char* byte = step + pair % (kDepth / 4) * 32 + i * 2 + column % 2;
          *byte = (char)(*byte | (pair >= kDepth / 4 ? code << 4 : code));
        }
      }
      block += bytes;
    }
  });
}
