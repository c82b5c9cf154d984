// Weights in 8 and 4 bits into the order that their kernels read.
#include <math.h>
#include <string.h>

#include "checks.h"
#include "packing.h"
#include "quantized.h"
#include "simd.h"

using namespace kg;

namespace kg {

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

extern "C" int kg_pack_int8(const kg_linear* layer, const kg_span* values, const kg_span* scales,
                            int gated) {
  if (layer->kind != KG_INT8 || !has_room(*layer, gated)) return 1;
  if (!is_array(*values, 1, layer->rows, layer->columns)) return 1;
  if (!is_array(*scales, 4, layer->rows, 1)) return 1;
  const int64_t num_panels = kg_padded_rows(layer->rows, gated) / kPanel;
  const int64_t bytes = (int64_t)layer->rows * layer->columns;
  on_all_cores(num_panels, bytes, [=](int64_t index) {
    pack_int8_panel(*layer, (const int8_t*)values->data, (const float*)scales->data, gated != 0,
                    index, (char*)layer->weight + index * panel_bytes_of(*layer));
  });
  return 0;
}

namespace {

struct Int4Source {
  const uint8_t* codes;
  const uint16_t *scales, *zeros;  // float16
};

float from_half(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

// Output `lane` of a block of zeros; see quantized.h.
void pack_int4_row(const kg_linear& layer, const Int4Source& source, int64_t row, int64_t lane,
                   char* block) {
  constexpr int kApart = kDepth / 8;  // pairs of columns that one load brings
  const CodeForm& form = *code_form(KG_INT4);
  const int64_t groups = num_groups(layer), columns = layer.columns;
  const uint8_t* codes = source.codes + row * ((columns + 1) / 2);
  char* step = block + header_bytes_of(layer);
  for (int64_t group = 0; group < groups; group++) {
    char* header = block + group * form.header_bytes;
    ((uint16_t*)header)[lane] = source.scales[row * groups + group];
    const float zero = from_half(source.zeros[row * groups + group]) * kZeroParts;
    header[2 * kBlock + lane] = (char)(uint8_t)lrintf(zero);
    const int64_t begin = group * layer.group;
    const int64_t end = std::min<int64_t>(columns, begin + layer.group);
    for (int64_t column = begin; column < end; column++) {
      const int64_t place = column - begin, pair = place % kDepth / 2;
      const int code = column % 2 ? codes[column / 2] >> 4 : codes[column / 2] & 15;
      uint16_t* words = (uint16_t*)(step + place / kDepth * form.step_bytes);
      words += pair % kApart * 2 * kBlock + lane * 2 + column % 2;
      *words = (uint16_t)(*words | code << pair / kApart * 4);
    }
    step += num_steps(layer, group) * form.step_bytes;
  }
}

}  // namespace

extern "C" int kg_pack_int4(const kg_linear* layer, const kg_span* codes, const kg_span* scales,
                            const kg_span* zeros, int gated) {
  if (layer->kind != KG_INT4 || !has_room(*layer, gated)) return 1;
  if (!is_array(*codes, 1, layer->rows, (layer->columns + 1) / 2)) return 1;
  if (!is_array(*scales, 2, layer->rows, num_groups(*layer))) return 1;
  if (!is_array(*zeros, 2, layer->rows, num_groups(*layer))) return 1;
  const int64_t block_bytes = code_block_bytes(*layer);
  const int64_t num_blocks = kg_padded_rows(layer->rows, gated) / kBlock;
  const Int4Source source{(const uint8_t*)codes->data, (const uint16_t*)scales->data,
                          (const uint16_t*)zeros->data};
  on_all_cores(num_blocks, num_blocks * block_bytes, [=](int64_t index) {
    char* block = (char*)layer->weight + index * block_bytes;
    memset(block, 0, block_bytes);
    for (int64_t lane = 0; lane < kBlock; lane++) {
      const int64_t row = source_row(index * kBlock + lane, layer->rows, gated != 0);
      if (row >= 0) pack_int4_row(*layer, source, row, lane, block);
    }
  });
  return 0;
}
