// Linear layers over packed weights, and the packing.
#include <string.h>

#include "quantized.h"
#include "rows.h"
#include "simd.h"
#include "step.h"

namespace kg {
namespace {

int64_t padded_depth(int64_t columns) { return round_up(columns, kDepth); }

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

// What a thread keeps from step to step, as large as the largest layer so far.
struct Spare {
  std::vector<char> memory;
  char* take(int64_t bytes) {
    if ((int64_t)memory.size() < bytes + 64) memory.resize(bytes + 64);
    return (char*)round_up((int64_t)memory.data(), 64);
  }
};
thread_local Spare spare;

struct Layer {  // what all panels of a linear layer have in common
  const kg_linear& weight;
  Kernel kernel;  // of bf16 panels
  bool use_amx;
  int64_t depth, rows;
  const char* x;
  int64_t x_bytes;  // from row to row
  const CodeForm* codes = nullptr;  // if they are multiplied as they are
  float* sums = nullptr;            // then of groups of x, else of products, [rows][kPanel]
  kg_bf16* unpacked = nullptr;      // some columns of a panel

  bool on_tiles() const { return use_amx && rows > kFewRows && !codes; }
};

// Up to how many rows go through a panel at once.
int max_rows(const Layer& layer) {
  if (layer.on_tiles()) return kAmxRows;
  if (layer.weight.kind == KG_INT8) return kInt8Rows;
  if (layer.codes) return kCodeRows;
  return layer.kernel.max_rows;
}

void compute(const Layer& layer, const char* packed, Part rows, const char* next, int64_t lines,
             float* out) {
  const char* x = layer.x + rows.begin * layer.x_bytes;
  const int count = (int)(rows.end - rows.begin);
  if (layer.weight.kind == KG_INT8) {
    const Int8Panel panel{packed, (const uint8_t*)x, layer.x_bytes, count, layer.depth, out, next,
                          lines};
    return layer.on_tiles() ? panel_int8_amx(panel) : panel_int8(panel);
  }
  const kg_bf16* halves = (const kg_bf16*)x;
  if (layer.codes) {
    const float* sums =
        layer.sums ? layer.sums + rows.begin * num_groups(layer.weight) : nullptr;
    const CodePanel panel{&layer.weight, packed, halves, layer.x_bytes / 2, count, sums, out, next};
    return layer.codes->multiply(panel);
  }
  const Panel panel{(const kg_bf16*)packed, kBlock * layer.depth, halves, layer.x_bytes / 2, count,
                    layer.depth, out, kPanel, false, next, lines};
  layer.kernel.run(panel);
}

// Rows that go through a panel together, and the first of them that those before left out. Tiles are
// set up for a number of rows, which takes as long as a dozen products: all passes have as many, and
// some may compute the last rows of the one before again.
struct Pass {
  Part rows;
  int64_t first_new;
};

Pass pass_of(const Layer& layer, int64_t index, int64_t count) {
  if (!layer.on_tiles()) {
    const Part part = part_of(layer.rows, index, count);
    return {part, part.begin};
  }
  const int64_t size = (layer.rows + count - 1) / count, first = index * size;
  const int64_t end = std::min(first + size, layer.rows);
  return {{end - size, end}, first};
}

// How many columns of a panel of codes are made bf16 at a time, so that they stay in a near cache
// while the rows go through. All of them for tiles, which may compute rows twice: see pass_of.
int64_t unpacked_columns(const Layer& layer) {
  constexpr int64_t kUnpackedColumns = 1024;  // 64 KiB
  return layer.on_tiles() ? layer.depth : std::min(kUnpackedColumns, layer.depth);
}

// All rows of a panel of codes into layer.sums. The next panel is fetched meanwhile.
void compute_unpacked(const Layer& layer, const CodeForm& form, const char* packed,
                      const char* next) {
  const int64_t passes = (layer.rows + layer.kernel.max_rows - 1) / layer.kernel.max_rows;
  const int64_t at_once = unpacked_columns(layer);
  int64_t to_fetch = next ? panel_bytes_of(layer.weight) / 64 : 0;
  for (int64_t column = 0; column < layer.depth; column += at_once) {
    const int64_t width = std::min(at_once, layer.depth - column), lines = width / 2;
    form.unpack(layer.weight, packed, {column / kDepth, (column + width) / kDepth}, layer.unpacked);
    for (int64_t pass = 0; pass < passes; pass++, to_fetch -= lines) {
      const Part part = pass_of(layer, pass, passes).rows;
      const kg_bf16* x = (const kg_bf16*)(layer.x + part.begin * layer.x_bytes) + column;
      const bool fetches = to_fetch > 0;
      layer.kernel.run({layer.unpacked, kBlock * width, x, layer.x_bytes / 2,
                        (int)(part.end - part.begin), width, layer.sums + part.begin * kPanel,
                        kPanel, column > 0, fetches ? next : nullptr, lines});
      if (fetches) next += lines * 64;
    }
  }
}

}  // namespace

// Panels are dealt to the threads in runs, each run one forward stream; all rows of the step go
// through a panel while it is in the cache, and the next panel is fetched meanwhile. Where a step is
// cut by rows each thread does so with its rows, and all panels.
bool linear(const Step& step, const kg_op& op, const kg_op* next_op, int thread) {
  const kg_linear& weight = *(const kg_linear*)op.params;
  const Buffer& in = step.buffer(op.in);
  const bool is_logits = op.out == KG_LOGITS;
  const int64_t all_rows = step.batch->num_tokens;
  void* out = is_logits ? (void*)step.batch->logits : step.buffer(op.out).base;
  const int64_t out_bytes = is_logits ? weight.rows * 4 : step.buffer(op.out).row_bytes;
  const int num_threads = step.pool->num_threads;
  const bool cuts_rows = step.cuts_rows(all_rows);
  const Part mine = cuts_rows ? part_of(all_rows, thread, num_threads) : Part{0, all_rows};
  const int64_t rows = mine.end - mine.begin;
  const auto panels_of = [&](const kg_linear& weight, bool gated) {
    const int64_t count = num_panels(weight, gated);
    return cuts_rows ? Part{0, count} : part_of(count, thread, num_threads);
  };
  const Part panels = panels_of(weight, op.epilogue == KG_GATED);
  const bool use_amx = step.pool->use_amx;
  Layer layer{weight, kernel_for(rows, use_amx), use_amx, depth_of(weight), rows,
              step.row<char>(in, mine.begin, all_rows, thread), in.row_bytes};
  const CodeForm* form = code_form(weight.kind);
  if (form && form->multiplies(rows, use_amx)) {
    layer.codes = form;
    if (form->has_zeros) {
      layer.sums = (float*)spare.take(num_groups(weight) * rows * 4);
      sum_groups(weight, (const kg_bf16*)layer.x, in.row_bytes / 2, (int)rows, layer.sums);
    }
  } else if (form) {
    layer.sums = (float*)spare.take(kPanel * (rows * 4 + unpacked_columns(layer) * 2));
    layer.unpacked = (kg_bf16*)(layer.sums + rows * kPanel);
  }
  const int64_t panel_bytes = panel_bytes_of(weight);
  const int64_t passes = (rows + max_rows(layer) - 1) / max_rows(layer);
  const int64_t fetching = std::min<int64_t>(passes, 2), lines = panel_bytes / 64 / fetching;

  const char* after = nullptr;  // this thread's first panel of the next linear layer
  if (next_op) {
    const kg_linear& next = *(const kg_linear*)next_op->params;
    const Part its = panels_of(next, next_op->epilogue == KG_GATED);
    after = (const char*)next.weight + its.begin * panel_bytes_of(next);
  }
  alignas(64) float sums[kAmxRows * kPanel];
  for (int64_t index = panels.begin; index < panels.end; index++) {
    const char* packed = (const char*)weight.weight + index * panel_bytes;
    const char* next = index + 1 < panels.end ? packed + panel_bytes : after;
    if (layer.unpacked) {
      compute_unpacked(layer, *form, packed, next);
      store(op, weight, {layer.sums, mine.begin, rows, index * kPanel}, out, out_bytes);
      continue;
    }
    for (int64_t pass = 0; pass < passes; pass++) {
      const auto [part, first] = pass_of(layer, pass, passes);
      compute(layer, packed, part, next && pass < fetching ? next + pass * lines * 64 : nullptr,
              lines, sums);
      store(op, weight,
            {sums + (first - part.begin) * kPanel, mine.begin + first, part.end - first,
             index * kPanel},
            out, out_bytes);
    }
  }
  return step.meets(all_rows);
}

}  // namespace kg

using namespace kg;

extern "C" int64_t kg_padded_rows(int64_t rows, int gated) {
  return gated ? 2 * round_up(rows / 2, kBlock) : round_up(rows, kPanel);
}

extern "C" int64_t kg_packed_bytes(const kg_linear* layer) {
  // Gate and up are padded apart from one another, which may take a block more.
  return round_up(layer->rows + kPanel, kPanel) / kPanel * panel_bytes_of(*layer);
}

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
  const int64_t depth = padded_depth(columns), blocks = kg_padded_rows(rows, gated) / kBlock;
  const Source source{weight, rows, columns, gated != 0};
  on_all_cores(blocks, rows * columns * 2,
               [=](int64_t index) { pack_block(source, index * kBlock, depth, packed); });
}
