// Codes of 8 bits into the order that panel_byte.cpp reads.
#include <string.h>

#include "checks.h"
#include "packing.h"
#include "panel_codes.h"

namespace kg {
namespace {

struct Source {  // of a row
  const uint8_t* codes;
  const float *scales, *zeros;
};

// From s eeee mmm to mmm s eeee.
inline uint8_t rotated(uint8_t code) { return (uint8_t)(code << 5 | code >> 3); }
// From 0..255 to what is 128 less, as int8.
inline uint8_t centred(uint8_t code) { return code ^ 128; }

// Where a group's column `place` of output `lane` lies: see quantized.h.
inline int64_t float8_place(int64_t place, int64_t lane) {
  constexpr int kHalf = kPairs / 2;
  const int64_t step = place / kDepth, pair = place % kDepth / 2;
  const int64_t word = (pair % kHalf * kBlock + lane) * 2 + place % 2;
  return step * kBlock * kDepth + word * 2 + pair / kHalf;
}

// Row `lane` of a block, one group after the other.
void pack_row(const kg_linear& layer, const Source& source, int64_t lane, char* block) {
  const bool is_float = layer.kind == KG_FLOAT8;
  const CodeForm& form = *code_form(layer.kind);
  char* to = block + header_bytes_of(layer);
  for (int64_t group = 0; group < num_groups(layer); group++) {
    float* header = (float*)(block + group * form.header_bytes);
    header[lane] = source.scales[group];
    if (form.has_zeros) header[kBlock + lane] = source.zeros[group] - 128.f;
    const int64_t begin = group * layer.group;
    const int64_t end = std::min<int64_t>(layer.columns, begin + layer.group);
    for (int64_t column = begin; column < end; column++) {
      const uint8_t code = source.codes[column];
      const int64_t place = column - begin;
      to[is_float ? float8_place(place, lane) : place * kBlock + lane] =
          (char)(is_float ? rotated(code) : centred(code));
    }
    to += num_steps(layer, group) * form.step_bytes;
  }
}

}  // namespace
}  // namespace kg

using namespace kg;

extern "C" int kg_pack_bytes(const kg_linear* layer, const kg_span* codes, const kg_span* scales,
                             const kg_span* zeros, int gated) {
  if (layer->kind != KG_FLOAT8 && layer->kind != KG_GROUPED8) return 1;
  if (!has_room(*layer, gated)) return 1;
  if (!is_array(*codes, 1, layer->rows, layer->columns)) return 1;
  if (!is_array(*scales, 4, layer->rows, num_groups(*layer))) return 1;
  const bool has_zeros = layer->kind == KG_GROUPED8;
  if (has_zeros && !is_array(*zeros, 4, layer->rows, num_groups(*layer))) return 1;
  const int64_t groups = num_groups(*layer), block_bytes = code_block_bytes(*layer);
  const int64_t num_blocks = kg_padded_rows(layer->rows, gated) / kBlock;
  on_all_cores(num_blocks, num_blocks * block_bytes, [=](int64_t index) {
    char* block = (char*)layer->weight + index * block_bytes;
    memset(block, 0, block_bytes);
    for (int64_t lane = 0; lane < kBlock; lane++) {
      const int64_t row = source_row(index * kBlock + lane, layer->rows, gated != 0);
      if (row < 0) continue;
      const float* of_row = has_zeros ? (const float*)zeros->data + row * groups : nullptr;
      const uint8_t* of_codes = (const uint8_t*)codes->data + row * layer->columns;
      pack_row(*layer, {of_codes, (const float*)scales->data + row * groups, of_row}, lane, block);
    }
  });
  return 0;
}
