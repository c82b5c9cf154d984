// bf16 weights into the order that their kernels read.
#include "checks.h"
#include "packing.h"
#include "quantized.h"
#include "simd.h"

using namespace kg;

namespace {

struct Source {  // of a packed weight
  const kg_bf16* const* weight;
  int64_t rows, columns;
  bool gated;
};

void pack_block(const Source& source, int64_t block, int64_t depth, void* packed) {
  const kg_bf16* rows[kBlock];
  for (int64_t i = 0; i < kBlock; i++) {
    const int64_t row = source_row(block + i, source.rows, source.gated);
    rows[i] = row < 0 ? nullptr : source.weight[row];
  }
  kg_bf16* to = (kg_bf16*)packed + block * depth;
  for (int64_t column = 0; column < depth; column += kDepth, to += kBlock * kDepth) {
    const int64_t left = std::max<int64_t>(source.columns - column, 0);
    const __mmask32 mask = left >= kDepth ? 0xffffffffu : (__mmask32)((1ull << left) - 1);
    __m512i values[kBlock];
    for (int64_t i = 0; i < kBlock; i++)
      values[i] = rows[i] ? _mm512_maskz_loadu_epi16(mask, rows[i] + column)
                          : _mm512_setzero_si512();
    transpose(values);
    for (int64_t i = 0; i < kBlock; i++) _mm512_storeu_si512(to + i * 32, values[i]);
  }
}

}  // namespace

extern "C" int kg_pack(const kg_linear* layer, const kg_rows* parts, int num_parts, int gated) {
  if (layer->kind != KG_BF16 || !has_room(*layer, gated)) return 1;
  if (!are_rows_of(*layer, parts, num_parts)) return 1;
  std::vector<const kg_bf16*> weight;
  weight.reserve(layer->rows);
  for (int part = 0; part < num_parts; part++)
    for (int64_t row = 0; row < parts[part].rows; row++)
      weight.push_back(parts[part].first + row * parts[part].stride);
  const int64_t depth = depth_of(*layer), blocks = kg_padded_rows(layer->rows, gated) / kBlock;
  const Source source{weight.data(), layer->rows, layer->columns, gated != 0};
  void* packed = (void*)layer->weight;
  on_all_cores(blocks, (int64_t)layer->rows * layer->columns * 2,
               [=](int64_t index) { pack_block(source, index * kBlock, depth, packed); });
  return 0;
}
