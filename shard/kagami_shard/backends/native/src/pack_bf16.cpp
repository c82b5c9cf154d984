// bf16 weights into the order that their kernels read.
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

extern "C" void kg_pack(const kg_bf16* const* weight, int64_t rows, int64_t columns, int gated,
                        void* packed) {
  const int64_t depth = round_up(columns, kDepth), blocks = kg_padded_rows(rows, gated) / kBlock;
  const Source source{weight, rows, columns, gated != 0};
  on_all_cores(blocks, rows * columns * 2,
               [=](int64_t index) { pack_block(source, index * kBlock, depth, packed); });
}
