// Linear layers over packed weights, and the packing.
#include <string.h>

#include "simd.h"
#include "step.h"

namespace kg {
namespace {

int64_t padded_depth(int64_t columns) { return round_up(columns, kDepth); }

// The row of the weight that lies at row `packed` of the panels; -1: padding.
int64_t source_row(int64_t packed, int64_t rows, bool gated) {
  if (!gated) return packed < rows ? packed : -1;
  const int64_t panel = packed / kPanel, lane = packed % kPanel;
  const int64_t index = panel * kBlock + lane % kBlock;
  if (index >= rows / 2) return -1;
  return lane < kBlock ? index : rows / 2 + index;
}

kg_bf16* packed_pair(const void* packed, int64_t row, int64_t column, int64_t depth) {
  const int64_t block = row / kBlock * kBlock * depth;
  return (kg_bf16*)packed + block + column / 2 * 2 * kBlock + row % kBlock * 2;
}

struct Tile {  // of the output: up to 32 columns of some rows, still float32 sums
  float* sums;
  int64_t first_row, rows, first_column;
};

__m512 finished(const kg_linear& weight, const float* sums, int64_t column) {
  const __m512 y = _mm512_loadu_ps(sums);
  return weight.bias ? _mm512_add_ps(y, _mm512_loadu_ps(weight.bias + column)) : y;
}

void store_gated(const kg_op& op, const kg_linear& weight, const Tile& tile, kg_bf16* out,
                 int64_t stride) {
  const int64_t column = tile.first_column / 2;
  const __mmask16 mask = lanes(weight.rows / 2 - column);
  for (int64_t r = 0; r < tile.rows; r++) {
    const float* sums = tile.sums + r * kPanel;
    const __m512 gate = finished(weight, sums, tile.first_column);
    const __m512 up = finished(weight, sums + kBlock, tile.first_column + kBlock);
    const __m512 value = _mm512_mul_ps(activate(op.activation, gate, op.bound), up);
    store_bf16(out + (tile.first_row + r) * stride + column, mask, value);
  }
}

template <class Store>
void store_each(const kg_linear& weight, const Tile& tile, Store store) {
  for (int64_t half = 0; half < kPanel; half += kBlock) {
    const int64_t column = tile.first_column + half;
    const __mmask16 mask = lanes(weight.rows - column);
    if (!mask) return;
    for (int64_t r = 0; r < tile.rows; r++)
      store(tile.first_row + r, column, mask,
            finished(weight, tile.sums + r * kPanel + half, column));
  }
}

void store(const kg_op& op, const kg_linear& weight, const Tile& tile, void* out,
           int64_t row_bytes) {
  const __m512 alpha = _mm512_set1_ps(op.alpha);
  const int64_t floats = row_bytes / 4;
  float* to_float = (float*)out;
  switch (op.epilogue) {
    case KG_GATED:
      return store_gated(op, weight, tile, (kg_bf16*)out, row_bytes / 2);
    case KG_STORE_BF16:
      return store_each(weight, tile, [&](int64_t row, int64_t column, __mmask16 mask, __m512 y) {
        kg_bf16* p = (kg_bf16*)((char*)out + row * row_bytes) + column;
        store_bf16(p, mask, activate(op.activation, y, op.bound));
      });
    case KG_ADD:
      return store_each(weight, tile, [&](int64_t row, int64_t column, __mmask16 mask, __m512 y) {
        float* p = to_float + row * floats + column;
        const __m512 old = _mm512_maskz_loadu_ps(mask, p);
        _mm512_mask_storeu_ps(p, mask, _mm512_fmadd_ps(alpha, y, old));
      });
    default:
      return store_each(weight, tile, [&](int64_t row, int64_t column, __mmask16 mask, __m512 y) {
        const __m512 value = activate(op.activation, _mm512_mul_ps(alpha, y), op.bound);
        _mm512_mask_storeu_ps(to_float + row * floats + column, mask, value);
      });
  }
}

int64_t num_panels(const kg_linear& weight, bool gated) {
  return kg_padded_rows(weight.rows, gated) / kPanel;
}

}  // namespace

// Panels are dealt to the threads in runs, each run one forward stream; all rows of the step go
// through a panel while it is in the cache, and the next panel is fetched meanwhile.
bool linear(const Step& step, const kg_op& op, const kg_op* next_op, int thread) {
  const kg_linear& weight = *(const kg_linear*)op.params;
  const Buffer& in = step.buffer(op.in);
  const bool is_logits = op.out == KG_LOGITS;
  // Only the head reads rows; its input has as many.
  const int64_t rows = is_logits ? step.batch->num_rows : step.batch->num_tokens;
  if (!rows) return false;  // a chunk in the middle of a prompt wants no logits
  void* out = is_logits ? (void*)step.batch->logits : step.buffer(op.out).base;
  const int64_t out_bytes = is_logits ? weight.rows * 4 : step.buffer(op.out).row_bytes;
  const int64_t depth = padded_depth(weight.columns), panel_size = kPanel * depth;
  const int num_threads = step.pool->num_threads;
  const Part panels = part_of(num_panels(weight, op.epilogue == KG_GATED), thread, num_threads);
  const Kernel kernel = kernel_for(rows, step.pool->use_amx);
  const int64_t passes = (rows + kernel.max_rows - 1) / kernel.max_rows;
  const int64_t fetching = std::min<int64_t>(passes, 2), lines = panel_size / 32 / fetching;
  const kg_bf16* x = step.row<kg_bf16>(in, 0, rows, thread);
  const int64_t x_stride = in.row_bytes / 2;

  const char* after = nullptr;  // this thread's first panel of the next linear layer
  if (next_op) {
    const kg_linear& next = *(const kg_linear*)next_op->params;
    const int64_t count = num_panels(next, next_op->epilogue == KG_GATED);
    const int64_t first = part_of(count, thread, num_threads).begin;
    after = (const char*)next.weight + first * kPanel * padded_depth(next.columns) * 2;
  }
  // Others may still make their copies of x from the rows that this is about to add to.
  if (op.epilogue == KG_ADD && step.replicates(in, rows)) step.pool->barrier();
  alignas(64) float sums[kAmxRows * kPanel];
  for (int64_t index = panels.begin; index < panels.end; index++) {
    const kg_bf16* packed = (const kg_bf16*)weight.weight + index * panel_size;
    const char* next = index + 1 < panels.end ? (const char*)(packed + panel_size) : after;
    for (int64_t pass = 0; pass < passes; pass++) {
      const Part part = part_of(rows, pass, passes);
      Panel panel{packed,
                  kBlock * depth,
                  x + part.begin * x_stride,
                  x_stride,
                  (int)(part.end - part.begin),
                  depth,
                  sums,
                  next && pass < fetching ? next + pass * lines * 64 : nullptr,
                  lines};
      kernel.run(panel);
      store(op, weight, {sums, part.begin, part.end - part.begin, index * kPanel}, out, out_bytes);
    }
  }
  return true;
}

}  // namespace kg

using namespace kg;

extern "C" int64_t kg_padded_rows(int64_t rows, int gated) {
  return gated ? 2 * round_up(rows / 2, kBlock) : round_up(rows, kPanel);
}

extern "C" int64_t kg_packed_bytes(int, int64_t rows, int64_t columns) {
  // Gate and up are padded apart from one another, which may take a block more.
  return round_up(rows + kPanel, kPanel) * padded_depth(columns) * 2;
}

extern "C" void kg_pack(int, const kg_bf16* weight, int64_t rows, int64_t columns, int gated,
                        void* packed) {
  const int64_t depth = padded_depth(columns);
  for (int64_t block = 0; block < kg_padded_rows(rows, gated); block += kBlock) {
    int64_t sources[kBlock];
    for (int64_t i = 0; i < kBlock; i++) sources[i] = source_row(block + i, rows, gated != 0);
    kg_bf16* to = packed_pair(packed, block, 0, depth);
    for (int64_t column = 0; column < depth; column += kDepth, to += kBlock * kDepth) {
      const __mmask32 mask = columns - column >= kDepth
                                 ? 0xffffffffu
                                 : (__mmask32)((1ull << std::max<int64_t>(columns - column, 0)) - 1);
      __m512i values[kBlock];
      for (int64_t i = 0; i < kBlock; i++)
        values[i] = sources[i] < 0 ? _mm512_setzero_si512()
                                   : _mm512_maskz_loadu_epi16(
                                         mask, weight + sources[i] * columns + column);
      transpose(values);
      for (int64_t i = 0; i < kBlock; i++) _mm512_storeu_si512(to + i * 32, values[i]);
    }
  }
}

extern "C" void kg_unpack(int, const void* packed, int64_t rows, int64_t columns, int gated,
                          kg_bf16* weight) {
  const int64_t depth = padded_depth(columns);
  for (int64_t row = 0; row < kg_padded_rows(rows, gated); row++) {
    const int64_t source = source_row(row, rows, gated != 0);
    for (int64_t column = 0; source >= 0 && column < columns; column++)
      weight[source * columns + column] = packed_pair(packed, row, column, depth)[column % 2];
  }
}
