// Ops that work row by row: embedding, norms, the rope's tables, greedy tokens and logprobs.
#include <math.h>
#include <string.h>

#include "simd.h"
#include "step.h"

namespace kg {
namespace {

// A row of a packed head lies a cache line apart for every two columns; `row` is [width / 2] pairs.
void embed_packed(const kg_embedding& table, int64_t id, float* out) {
  const int64_t depth = round_up(table.width, kDepth);
  const kg_bf16* pairs = (const kg_bf16*)table.weight + id / kBlock * kBlock * depth + id % kBlock * 2;
  for (int64_t i = 0; i < table.width; i++)
    out[i] = to_float(pairs[i / 2 * 2 * kBlock + i % 2]) * table.multiplier;
}

void embed_row(const kg_embedding& table, int64_t id, float* out) {
  const kg_bf16* row = (const kg_bf16*)table.weight + id * table.width;
  const __m512 factor = _mm512_set1_ps(table.multiplier);
  for (int64_t i = 0; i < table.width; i += kLanes) {
    const __mmask16 mask = lanes(table.width - i);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(load_bf16(row + i, mask), factor));
  }
}

// Calls use(i, mask, normed) for every 16 columns.
template <class Use>
void norm_row(const kg_norm& norm, const float* in, Use use) {
  __m512 mean = _mm512_setzero_ps(), scale = _mm512_set1_ps(1.f);
  const int64_t width = norm.width;
  if (norm.kind == KG_LAYER_NORM) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += kLanes)
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(width - i), in + i));
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
  }
  if (norm.kind != KG_ROUND) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += kLanes) {
      const __mmask16 mask = lanes(width - i);
      const __m512 x = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, in + i), mean);
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    scale = _mm512_set1_ps(1.f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + norm.eps));
  }
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 mask = lanes(width - i);
    __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, in + i), mean);
    x = _mm512_mul_ps(x, scale);
    if (norm.weight) x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, norm.weight + i));
    if (norm.bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, norm.bias + i));
    use(i, mask, x);
  }
}

}  // namespace

bool embed(const Step& step, const kg_op& op, int thread) {
  const kg_embedding& table = *(const kg_embedding*)op.params;
  const int64_t rows = step.batch->num_tokens;
  const Part part = part_of(rows, thread, step.pool->num_threads);
  for (int64_t row = part.begin; row < part.end; row++) {
    float* out = step.row<float>(step.buffer(op.out), row, rows, thread);
    if (table.is_packed)
      embed_packed(table, step.batch->input_ids[row], out);
    else
      embed_row(table, step.batch->input_ids[row], out);
  }
  return step.meets(rows);
}

bool rope(const Step& step, const kg_op& op, int thread) {
  const kg_rope& rope = *(const kg_rope*)op.params;
  const int64_t rows = step.batch->num_tokens;
  const Part part = part_of(rows, thread, step.pool->num_threads);
  for (int64_t row = part.begin; row < part.end; row++) {
    float* out = step.row<float>(step.buffer(op.out), row, rows, thread);
    for (int32_t i = 0; i < rope.half; i++) {
      const float angle = (float)step.batch->positions[row] * rope.frequencies[i];
      out[i] = cosf(angle) * rope.factor;
      out[rope.half + i] = sinf(angle) * rope.factor;
    }
  }
  return step.meets(rows);
}

bool norm(const Step& step, const kg_op& op, int thread) {
  const kg_norm& norm = *(const kg_norm*)op.params;
  const Buffer &in = step.buffer(op.in), &out = step.buffer(op.out);
  const int64_t rows = step.batch->num_tokens;
  const bool replicates = step.replicates(out, rows);
  const Part part = replicates ? Part{0, rows} : part_of(rows, thread, step.pool->num_threads);
  for (int64_t row = part.begin; row < part.end; row++) {
    kg_bf16* to = step.row<kg_bf16>(out, row, rows, thread);
    norm_row(norm, step.row<float>(in, row, rows, thread),
             [&](int64_t i, __mmask16 mask, __m512 x) { store_bf16(to + i, mask, x); });
  }
  return !replicates && step.meets(rows);
}

bool add_norm(const Step& step, const kg_op& op, int thread) {
  const kg_norm& norm = *(const kg_norm*)op.params;
  const int64_t rows = step.batch->num_tokens;
  const Part part = part_of(rows, thread, step.pool->num_threads);
  const __m512 alpha = _mm512_set1_ps(op.alpha);
  for (int64_t row = part.begin; row < part.end; row++) {
    float* to = step.row<float>(step.buffer(op.out), row, rows, thread);
    norm_row(norm, step.row<float>(step.buffer(op.in), row, rows, thread),
             [&](int64_t i, __mmask16 mask, __m512 x) {
               const __m512 old = _mm512_maskz_loadu_ps(mask, to + i);
               _mm512_mask_storeu_ps(to + i, mask, _mm512_fmadd_ps(alpha, x, old));
             });
  }
  return step.meets(rows);
}

// After this op the step has the selected rows alone. If all are selected, both buffers are the same
// memory.
bool select_rows(const Step& step, const kg_op& op, int thread) {
  const Buffer &in = step.buffer(op.in), &out = step.buffer(op.out);
  if (in.base == out.base) return false;
  const int64_t rows = step.batch->num_tokens;
  const Part part = part_of(rows, thread, step.pool->num_threads);
  for (int64_t row = part.begin; row < part.end; row++)
    memcpy(out.base + row * out.row_bytes, in.base + step.batch->rows[row] * in.row_bytes,
           out.row_bytes);
  return true;
}

namespace {

struct Distribution {  // what a row of logits says
  float largest;
  int64_t id;       // the first of the largest logits
  float log_total;  // log of the sum of exp(logit - largest); NaN where there is no distribution
  float logprob(float logit) const { return (logit - largest) - log_total; }
};

// One thread reads a row in one order: the result's bits do not depend on how many rows a step has.
Distribution distribution_of(const float* logits, int64_t count) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  __m512 largest = none;
  __mmask16 unordered = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512 x = _mm512_mask_loadu_ps(none, lanes(count - i), logits + i);
    unordered |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, x);
  }
  Distribution found{_mm512_reduce_max_ps(largest), 0, NAN};
  if (unordered || !isfinite(found.largest)) return found;
  const __m512 top = _mm512_set1_ps(found.largest);
  __m512 total = _mm512_setzero_ps();
  bool is_found = false;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 mask = lanes(count - i);
    const __m512 x = _mm512_mask_loadu_ps(none, mask, logits + i);
    total = _mm512_mask_add_ps(total, mask, total, exp(_mm512_sub_ps(x, top)));
    const __mmask16 hit = is_found ? 0 : _mm512_cmp_ps_mask(x, top, _CMP_EQ_OQ);
    if (hit) {
      found.id = i + __builtin_ctz(hit);
      is_found = true;
    }
  }
  found.log_total = logf(_mm512_reduce_add_ps(total));
  return found;
}

// `work(row)` for each of so many rows, on all threads.
template <class Work>
void for_each_row(kg_pool* pool, int64_t num_rows, Work work) {
  auto job = [&](int thread) {
    const Part rows = part_of(num_rows, thread, pool->num_threads);
    for (int64_t row = rows.begin; row < rows.end; row++) work(row);
  };
  if (num_rows == 1)
    work(0);
  else
    pool->run(job);
}

}  // namespace

void choose_tokens(const float* logits, Part rows, int64_t vocab_size, int64_t* ids,
                   float* logprobs) {
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const float* of_row = logits + row * vocab_size;
    const Distribution found = distribution_of(of_row, vocab_size);
    ids[row] = found.id;
    logprobs[row] = found.logprob(of_row[found.id]);
  }
}

}  // namespace kg

extern "C" void kg_choose_tokens(kg_pool* pool, const float* logits, int64_t num_rows,
                                 int64_t vocab_size, int64_t* ids, float* logprobs) {
  kg::for_each_row(pool, num_rows, [&](int64_t row) {
    kg::choose_tokens(logits, {row, row + 1}, vocab_size, ids, logprobs);
  });
}

extern "C" void kg_logprobs(kg_pool* pool, const float* logits, int64_t num_rows,
                            int64_t vocab_size, const int64_t* ids, int64_t ids_per_row,
                            float* logprobs) {
  kg::for_each_row(pool, num_rows, [&](int64_t row) {
    const float* of_row = logits + row * vocab_size;
    const kg::Distribution found = kg::distribution_of(of_row, vocab_size);
    for (int64_t i = row * ids_per_row; i < (row + 1) * ids_per_row; i++)
      logprobs[i] = found.logprob(of_row[ids[i]]);
  });
}
