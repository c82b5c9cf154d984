// Linear layers over packed weights.
#include <string.h>

#include "quantized.h"
#include "simd.h"
#include "step.h"

namespace kg {
namespace {

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
    const __m512 value = _mm512_mul_ps(activate_to_bf16(op.activation, gate, op.bound), up);
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
        store_bf16(p, mask, activate_to_bf16(op.activation, y, op.bound));
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

// A thread's memory from step to step, as large as its largest layer until now.
struct Spare {
  std::vector<char> memory;
  char* take(int64_t bytes) {
    if ((int64_t)memory.size() < bytes + 64) memory.resize(bytes + 64);
    return (char*)round_up((int64_t)memory.data(), 64);
  }
};
thread_local Spare spare;

struct Layer {  // what all panels of a linear layer have in common, for some rows of the step
  const kg_op& op;
  const kg_linear& weight;
  const kg_batch& batch;
  const int64_t only_selected, first_row, rows;
  const bool use_amx;
  const Kernel kernel;  // of bf16 panels
  const int64_t depth;
  const char* const x;    // of the first row
  const int64_t x_bytes;  // from row to row
  void* const out;        // of the step's first row
  const int64_t out_bytes;
  const CodeForm* codes = nullptr;  // if they are multiplied as they are
  float* sums = nullptr;            // then of groups of x, else of products, [rows][kPanel]
  kg_bf16* unpacked = nullptr;      // some columns of a panel

  Layer(const Step& step, const kg_op& op, int64_t only_selected, Part part, int thread)
      : op(op),
        weight(*(const kg_linear*)op.params),
        batch(*step.batch),
        only_selected(only_selected),
        first_row(part.begin),
        rows(part.end - part.begin),
        use_amx(step.pool->use_amx),
        kernel(kernel_for(use_amx)),
        depth(depth_of(weight)),
        x(step.row<char>(step.buffer(op.in), first_row, batch.num_tokens, thread)),
        x_bytes(step.buffer(op.in).row_bytes),
        out(op.out == KG_LOGITS ? (void*)batch.logits : step.buffer(op.out).base),
        out_bytes(op.out == KG_LOGITS ? weight.rows * 4 : step.buffer(op.out).row_bytes) {
    take_spare();
  }

  bool on_tiles() const {
    return use_amx && !codes && (weight.kind != KG_INT8 || rows > kFewRows);
  }
  // How many columns of a panel of codes are made bf16 at a time, so that they stay in a near cache
  // while the rows go through. All of them for tiles, which may compute rows twice: see pass_of.
  int64_t unpacked_columns() const {
    constexpr int64_t kUnpackedColumns = 1024;  // 64 KiB
    return on_tiles() ? depth : std::min(kUnpackedColumns, depth);
  }

 private:
  void take_spare() {
    const CodeForm* form = code_form(weight.kind);
    if (!form) return;
    if (form->multiplies(rows, use_amx)) {
      codes = form;
      if (!form->has_zeros) return;
      sums = (float*)spare.take(num_groups(weight) * rows * 4);
      sum_groups(weight, (const kg_bf16*)x, x_bytes / 2, (int)rows, sums);
    } else {
      sums = (float*)spare.take(kPanel * (rows * 4 + unpacked_columns() * 2));
      unpacked = (kg_bf16*)(sums + rows * kPanel);
    }
  }
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

// All rows of a panel of codes into layer.sums. The next panel is fetched meanwhile.
void compute_unpacked(const Layer& layer, const CodeForm& form, const char* packed,
                      const char* next) {
  const int64_t passes = (layer.rows + layer.kernel.max_rows - 1) / layer.kernel.max_rows;
  const int64_t at_once = layer.unpacked_columns();
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

// Prefetches the lines that a pass will write when its products are known (measured on a chunk of
// 256 tokens of a 1B: products take 0.5 % less time, and 3 % less where sums are added to the
// stream). A gated pass writes half a line of a row, and gains nothing. Must be inline: GCC leaves
// the call out otherwise.
KG_INLINE inline void fetch_output(const Layer& layer, Part rows, int64_t panel) {
  if (layer.op.epilogue == KG_GATED) return;
  const int64_t bytes = kPanel * (layer.op.epilogue == KG_STORE_BF16 ? 2 : 4);
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const char* at = (char*)layer.out + row * layer.out_bytes + panel * bytes;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 1);
  }
}

// Whether logits are wanted of one of these rows of a step.
bool are_selected(const kg_batch& batch, Part rows) {
  if (!batch.selected) return true;
  const int64_t* selected = batch.selected->rows;
  return std::any_of(selected, selected + batch.selected->num_tokens, [=](int64_t row) {
    return rows.begin <= row && row < rows.end;
  });
}

// All rows of a layer through one panel, while `next` is fetched. Codes that are made bf16 for all rows
// are multiplied by all, also of columns that are only wanted of some.
void compute_panel(const Layer& layer, int64_t index, const char* next) {
  const int64_t panel_bytes = panel_bytes_of(layer.weight);
  const char* packed = (const char*)layer.weight.weight + index * panel_bytes;
  const int64_t column = index * kPanel;
  if (layer.unpacked) {
    compute_unpacked(layer, *code_form(layer.weight.kind), packed, next);
    store(layer.op, layer.weight, {layer.sums, layer.first_row, layer.rows, column}, layer.out,
          layer.out_bytes);
    return;
  }
  const int64_t passes = (layer.rows + max_rows(layer) - 1) / max_rows(layer);
  const int64_t fetching = std::min<int64_t>(passes, 2), lines = panel_bytes / 64 / fetching;
  alignas(64) float sums[kAmxRows * kPanel];
  for (int64_t pass = 0, fetched = 0; pass < passes; pass++) {
    const auto [part, first] = pass_of(layer, pass, passes);
    const Part rows{layer.first_row + part.begin, layer.first_row + part.end};
    if (column + kPanel <= layer.only_selected && !are_selected(layer.batch, rows)) continue;
    fetch_output(layer, rows, index);
    const bool fetches = next && fetched < fetching;
    compute(layer, packed, part, fetches ? next + fetched++ * lines * 64 : nullptr, lines, sums);
    store(layer.op, layer.weight,
          {sums + (first - part.begin) * kPanel, layer.first_row + first, part.end - first, column},
          layer.out, layer.out_bytes);
  }
}

}  // namespace

// Each thread takes a run of panels, one forward stream. All rows of the step go through a panel while
// it is in the cache, and the next panel is fetched meanwhile. If a step is cut by rows, each thread
// takes its rows through all panels. A thread that has finished before the threads meet takes panels
// of the others' rows (measured: two threads with equal work end 1 % apart).
bool linear(const Step& step, const kg_op& op, const LinearLinks& links, int thread) {
  const int64_t rows = step.batch->num_tokens;
  const int num_threads = step.pool->num_threads;
  const bool cuts_rows = step.cuts_rows(rows);
  const auto panels_of = [&](const kg_op& op) {
    const int64_t count = num_panels(*(const kg_linear*)op.params, op.epilogue == KG_GATED);
    return cuts_rows ? Part{0, count} : part_of(count, thread, num_threads);
  };
  const auto panel_at = [](const kg_op& op, int64_t index) {
    const kg_linear& weight = *(const kg_linear*)op.params;
    return (const char*)weight.weight + index * panel_bytes_of(weight);
  };
  const auto layer_of = [&](int whose) {
    const Part part = cuts_rows ? part_of(rows, whose, num_threads) : Part{0, rows};
    return Layer(step, op, links.only_selected, part, whose);
  };
  const Part panels = panels_of(op);
  // What this thread reads when it has come to the end.
  const char* after = links.next ? panel_at(*links.next, panels_of(*links.next).begin) : nullptr;
  const auto multiply = [&](const Layer& layer, int64_t index) {
    compute_panel(layer, index, index + 1 < panels.end ? panel_at(op, index + 1) : after);
  };
  if (!cuts_rows || !links.is_before_write) {
    const Layer layer = layer_of(thread);
    for (int64_t index = panels.begin; index < panels.end; index++) multiply(layer, index);
    return step.meets(rows);
  }
  WorkShare& mine = step.linear_shares[thread];
  mine.begin(&op);
  for (int other = 0; other < num_threads; other++) {
    const int whose = (thread + other) % num_threads;
    WorkShare& share = step.linear_shares[whose];
    if (!share.is_open(&op, panels.end)) continue;
    const Layer layer = layer_of(whose);
    for (int64_t index; (index = share.take()) < panels.end; share.finish()) multiply(layer, index);
  }
  mine.end(panels.end);
  return step.meets(rows);
}

}  // namespace kg
