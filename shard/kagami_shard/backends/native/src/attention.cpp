// Paged attention (arXiv:2309.06180): rope, the norms of queries and keys, and the write into the
// cache are one op, attending is the next. A running softmax over tiles of the cache
// (FlashAttention, arXiv:2205.14135): a tile of keys and values lies as weights do (cache.h), so
// both products are those of a linear layer (attend_rows.cpp).
//
// Rows that share a tile: the heads of a KV group, times the tokens of a prompt's chunk. A decode has
// few of them, so it takes all KV heads together: they lie side by side in the cache, and the pages
// are read as one stream (measured: 333 -> 105 us a layer, 16 sequences of 192 tokens, SmolLM2).
#include <math.h>

#include "cache.h"
#include "simd.h"
#include "softmax.h"

namespace kg {
namespace {

constexpr int64_t kMaxHeadDim = 256;

struct Shape {
  int64_t group, depth, blocks;  // queries of a KV head; head_dim padded; blocks of 16 of that
  int64_t width;                 // of a token in the cache, all heads
  explicit Shape(const kg_attention& spec)
      : group(spec.num_heads / spec.num_kv_heads),
        depth(round_up(spec.head_dim, kDepth)),
        blocks(depth / kBlock),
        width((int64_t)spec.num_kv_heads * spec.head_dim) {}
};

struct Scratch {  // one thread's, laid out in its kScratchBytes
  kg_bf16 *queries, *keys, *values, *weights;
  float *scores, *sums, *shifts, *bounds, *totals;
  float *added_sums, *added_shifts, *added_totals;  // of the stretches before
  Scratch(char* base, const Shape& shape) {
    auto take = [&base](int64_t bytes) {
      char* taken = base;
      base += round_up(bytes, 64);
      return taken;
    };
    queries = (kg_bf16*)take(kMaxRows * shape.depth * 2);
    keys = (kg_bf16*)take(kTile * shape.depth * 2);
    values = (kg_bf16*)take(kTile * shape.depth * 2);
    weights = (kg_bf16*)take(kMaxRows * kTile * 2);
    scores = (float*)take(kMaxRows * kTile * 4);
    sums = (float*)take(kMaxRows * shape.depth * 4);
    shifts = (float*)take(kMaxRows * 4);
    bounds = (float*)take(kMaxRows * 4);
    totals = (float*)take(kMaxRows * kLanes * 4);
    added_sums = (float*)take(kMaxRows * shape.depth * 4);
    added_shifts = (float*)take(kMaxRows * 4);
    added_totals = (float*)take(kMaxRows * 4);
  }
};
static_assert(kMaxRows * kMaxHeadDim * 10 + kTile * kMaxHeadDim * 4 + kMaxRows * kTile * 6 +
                      kMaxRows * (kLanes + 4) * 4 + 12 * 64 <=
                  kScratchBytes,
              "a thread's scratch is too small");

float mean_square(const float* x, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes(count - i), x + i);
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  return _mm512_reduce_add_ps(sum) / (float)count;
}

void scale_by(float* x, const float* weight, float factor, int64_t count) {
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 mask = lanes(count - i);
    const __m512 w = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weight + i), by);
    _mm512_mask_storeu_ps(x + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), w));
  }
}

void norm_queries_and_keys(const kg_attention& spec, float* heads) {
  const int64_t dim = spec.head_dim, num_heads = spec.num_heads + spec.num_kv_heads;
  if (spec.qk_norm == KG_NORM_HEADS) {
    for (int64_t at = 0; at < num_heads * dim; at += dim)
      scale_by(heads + at, spec.qk_weight + at,
               1.f / sqrtf(mean_square(heads + at, dim) + spec.eps), dim);
  } else if (spec.qk_norm == KG_NORM_ALL) {
    const int64_t of_queries = spec.num_heads * dim, of_keys = spec.num_kv_heads * dim;
    scale_by(heads, spec.qk_weight, 1.f / sqrtf(mean_square(heads, of_queries) + spec.eps),
             of_queries);
    scale_by(heads + of_queries, spec.qk_weight + of_queries,
             1.f / sqrtf(mean_square(heads + of_queries, of_keys) + spec.eps), of_keys);
  }
}

// Rotates dimension i with i + half.
void rotate(float* head, const float* table, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const __mmask16 mask = lanes(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(mask, head + i);
    const __m512 b = _mm512_maskz_loadu_ps(mask, head + half + i);
    const __m512 cosine = _mm512_maskz_loadu_ps(mask, table + i);
    const __m512 sine = _mm512_maskz_loadu_ps(mask, table + half + i);
    const __m512 first = _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine));
    _mm512_mask_storeu_ps(head + i, mask, first);
    const __m512 second = _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine));
    _mm512_mask_storeu_ps(head + half + i, mask, second);
  }
}

void round_to(kg_bf16* to, const float* from, int64_t count, float factor) {
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 mask = lanes(count - i);
    store_bf16(to + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + i), by));
  }
}

struct Partial {  // what a row has summed up of some of its tokens, times 2^-shift
  float* sums;    // [depth], of weighted values
  float &shift, &total;
};

void store(const Partial& to, const Partial& from, int64_t depth) {
  memcpy(to.sums, from.sums, depth * 4);
  to.shift = from.shift;
  to.total = from.total;
}

// Stretches of a row are added by this alone, in the order of their tokens. A total of 0: the row
// has seen nothing.
void add_partial(const Partial& to, const Partial& more, int64_t depth) {
  if (more.total == 0) return;
  if (to.total == 0) {  // its sums and its shift may be anything
    store(to, more, depth);
    return;
  }
  const float top = std::max(to.shift, more.shift);
  const __m512 one = _mm512_set1_ps(1.f);
  const __m512 old_by = _mm512_scalef_ps(one, _mm512_set1_ps(to.shift - top));
  const __m512 by = _mm512_scalef_ps(one, _mm512_set1_ps(more.shift - top));
  for (int64_t i = 0; i < depth; i += kLanes) {
    const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(to.sums + i), old_by);
    const __m512 added = _mm512_fmadd_ps(_mm512_loadu_ps(more.sums + i), by, old);
    _mm512_storeu_ps(to.sums + i, added);
  }
  to.total = to.total * _mm512_cvtss_f32(old_by) + more.total * _mm512_cvtss_f32(by);
  to.shift = top;
}

// An op of a layer's attention, as one thread sees it.
struct LayerOp {
  const Step& step;
  const kg_op& op;
  const kg_attention& spec;
  const kg_batch& batch;
  const Shape shape;
  const Pages pages;
  const int thread;

  LayerOp(const Step& step, const kg_op& op, int thread)
      : step(step),
        op(op),
        spec(*(const kg_attention*)op.params),
        batch(*step.batch),
        shape(spec),
        pages(batch, spec),
        thread(thread) {}
};

// What is done to a token's queries, keys and values before anyone attends. Queries that nobody will
// use (LinearLinks::only_selected) are what lay there.
struct Writing : LayerOp {
  using LayerOp::LayerOp;

  // Queries stay in their row, rotated and rounded: bf16 in the first half of their floats.
  void write_token(int64_t sequence, int64_t token, int64_t position) const {
    float* heads = step.row<float>(step.buffer(op.in), token, batch.num_tokens, thread);
    const int64_t dim = spec.head_dim, of_queries = spec.num_heads * dim;
    norm_queries_and_keys(spec, heads);
    const float* table = step.row<float>(step.buffer(op.index), token, batch.num_tokens, thread);
    for (int64_t head = 0; head < spec.num_heads + spec.num_kv_heads; head++)
      rotate(heads + head * dim, table, spec.rotary_half);
    kg_bf16* rounded = (kg_bf16*)heads;
    // Scores are exponents of 2 then, unless there is a cap.
    round_to(rounded, heads, of_queries, spec.softcap != 0 ? 1.f : kLog2e * spec.scale);
    round_to(rounded + of_queries, heads + of_queries, 2 * shape.width, 1.f);
    pages.write(sequence, position, rounded + of_queries, rounded + of_queries + shape.width);
  }

  void write(Part tokens) const {
    int64_t sequence = 0;
    for (int64_t token = tokens.begin; token < tokens.end; token++) {
      while (sequence + 1 < batch.num_sequences && step.first_tokens[sequence + 1] <= token)
        sequence++;
      const int64_t first = batch.kv_lens[sequence] - batch.query_lens[sequence];
      write_token(sequence, token, first + token - step.first_tokens[sequence]);
    }
  }
};

struct Attention : LayerOp {
  const AttentionPlan& plan;

  Attention(const Step& step, const kg_op& op, const AttentionPlan& plan, int thread)
      : LayerOp(step, op, thread), plan(plan) {}

  const kg_bf16* query(int64_t token, int64_t head) const {
    const Buffer& queries = step.buffer(op.in);
    return step.row<kg_bf16>(queries, token, batch.num_tokens, thread) + head * spec.head_dim;
  }

  // Which of the tile's tokens the token at `position` sees.
  uint64_t seen(const AttentionTask& task, int64_t begin, int64_t position) const {
    const int64_t last = std::min<int64_t>(position, task.end - 1);
    const int64_t first = spec.window ? std::max<int64_t>(0, position - spec.window + 1) : 0;
    const int64_t low = std::max<int64_t>(first - begin, 0);
    const int64_t high = std::min<int64_t>(last - begin + 1, kTile);
    if (low >= high) return 0;
    return (~0ull >> (64 - high)) & (~0ull << low);
  }

  Softmax softmax(const Scratch& scratch) const {
    return {shape.depth,    scratch.shifts, scratch.bounds,
            scratch.totals, scratch.sums,   scratch.weights};
  }

  const Member& member(const AttentionTask& task, int64_t index) const {
    return plan.members[task.first_member + index];
  }

  struct Of {  // whose a row of a task is, and where its unfinished result goes, or -1
    int64_t token, head, slot;
  };

  // `use(row, Of)`: the KV heads' rows one after the other, of each the tokens, of each its group.
  template <class Use>
  void each_row(const AttentionTask& task, Use use) const {
    const int64_t count = task.num_members ? task.num_members : task.num_rows;
    int64_t row = 0;
    for (int64_t head = task.head; head < task.head + task.num_heads; head++)
      for (int64_t index = 0; index < count; index++) {
        Of of{step.first_tokens[task.sequence] + task.first_row + index, 0, task.slot};
        if (task.num_members) {
          of.token = step.first_tokens[member(task, index).sequence];
          of.slot = member(task, index).slot;
        }
        for (int64_t i = 0; i < shape.group; i++) {
          of.head = head * shape.group + i;
          use(row++, of);
        }
      }
  }

  // `next` is what this thread likely does then: its first tile is fetched at the end of this one.
  void attend(const AttentionTask& task, const AttentionTask* next, const Scratch& scratch) const {
    const int64_t count = task.num_members ? task.num_members : task.num_rows;
    const int64_t of_head = count * shape.group, rows = of_head * task.num_heads;
    // Of the first row; decodes see all of a stretch that they share.
    const int64_t position = task.num_members ? task.end
                                              : batch.kv_lens[task.sequence] -
                                                    batch.query_lens[task.sequence] + task.first_row;
    each_row(task, [&](int64_t row, Of of) {
      kg_bf16* to = scratch.queries + row * shape.depth;
      memcpy(to, query(of.token, of.head), spec.head_dim * 2);
      if (shape.depth > spec.head_dim)
        memset(to + spec.head_dim, 0, (shape.depth - spec.head_dim) * 2);
    });
    const Part all{stretch_of(task.begin), stretch_of(task.end - 1) + 1};
    for (int64_t stretch = all.begin; stretch < all.end; stretch++) {
      const int64_t first = std::max<int64_t>(task.begin, stretch_begin(stretch));
      const int64_t end = std::min<int64_t>(task.end, stretch_begin(stretch + 1));
      softmax(scratch).start(rows);
      for (int64_t begin = first; begin < end; begin += kTile)
        for (int64_t head = 0; head < task.num_heads; head++) {
          const Part part{head * of_head, (head + 1) * of_head};
          const Tile tile = pages.tile({task.sequence, begin, task.end}, task.head + head,
                                       {scratch.keys, scratch.values});
          attend_tile(task, begin, position, scratch, part, tile, coming(task, next, begin, head),
                      begin > first);
        }
      end_stretch(task, stretch - all.begin, stretch + 1 == all.end, scratch);
    }
  }

  // What the rows have summed up of the task's stretch `index` goes to those before it, or away.
  void end_stretch(const AttentionTask& task, int64_t index, bool is_last,
                   const Scratch& scratch) const {
    each_row(task, [&](int64_t row, Of of) {
      float total = _mm512_reduce_add_ps(_mm512_loadu_ps(scratch.totals + row * kLanes));
      Partial result{scratch.sums + row * shape.depth, scratch.shifts[row], total};
      if (!task.is_first) {
        store(partial_of(of.slot + index, of.head), result, shape.depth);
        return;
      }
      const Partial added{scratch.added_sums + row * shape.depth, scratch.added_shifts[row],
                          scratch.added_totals[row]};
      if (index == 0) added.total = 0;
      if (index == 0 && is_last)
        leave(of, result);
      else
        add_partial(added, result, shape.depth);
      if (index > 0 && is_last) leave(of, added);
    });
  }

  void leave(const Of& of, const Partial& result) const {
    if (of.slot < 0)
      finish(of.token, of.head, result.sums, result.total);
    else
      store(partial_of(of.slot, of.head), result, shape.depth);
  }

  // The tile that is read after this one.
  Tile coming(const AttentionTask& task, const AttentionTask* next, int64_t begin, int64_t head) const {
    if (head + 1 < task.num_heads)
      return pages.lying({task.sequence, begin, task.end}, task.head + head + 1);
    if (begin + kTile < task.end)
      return pages.lying({task.sequence, begin + kTile, task.end}, task.head);
    return next ? pages.lying({next->sequence, next->begin, next->end}, next->head) : Tile{};
  }

  // For the rows of the tile's head; the first of them is of the token at `position`.
  void attend_tile(const AttentionTask& task, int64_t begin, int64_t position, const Scratch& scratch,
                   Part rows, const Tile& tile, const Tile& coming, bool adds) const {
    const int64_t count = rows.end - rows.begin;
    uint64_t masks[kMaxRows];
    const int64_t last = position + (count - 1) / shape.group;
    const bool sees_all = !~(seen(task, begin, position) & seen(task, begin, last));
    for (int64_t row = 0; row < count && !sees_all; row++)
      masks[row] = seen(task, begin, position + row / shape.group);
    const Softmax running = softmax(scratch);
    const TileRows of_tile{running,    rows.begin, count,
                           scratch.queries + rows.begin * shape.depth,
                           tile,       coming,     sees_all ? nullptr : masks,
                           spec.scale, spec.softcap, adds};
    if (step.pool->use_amx)  // whatever the number of rows: see kernel_for
      attend_amx(of_tile, scratch.scores);
    else
      attend_avx512(of_tile);
  }

  void finish(int64_t token, int64_t head, const float* sums, float total) const {
    kg_bf16* out = step.row<kg_bf16>(step.buffer(op.out), token, batch.num_tokens, thread);
    const __m512 by = _mm512_set1_ps(1.f / total);
    for (int64_t i = 0; i < spec.head_dim; i += kLanes)
      store_bf16(out + head * spec.head_dim + i, lanes(spec.head_dim - i),
                 _mm512_mul_ps(_mm512_loadu_ps(sums + i), by));
  }

  // A slot has the unfinished results of all heads: [num_heads][depth] sums, then the
  // shifts, then the totals.
  Partial partial_of(int64_t slot, int64_t head) const {
    float* base = step.partials + slot * partial_floats(spec);
    float* shifts = base + spec.num_heads * shape.depth;
    return {base + head * shape.depth, shifts[head], shifts[spec.num_heads + head]};
  }

  void merge(const MergeTask& merging, int64_t head, float* sums) const {
    float shift = 0, total = 0;
    const Partial added{sums, shift, total};
    for (int64_t slot = 0; slot < merging.num_slots; slot++)
      add_partial(added, partial_of(merging.first_slot + slot, head), shape.depth);
    finish(step.first_tokens[merging.sequence], head, sums, total);
  }
};

}  // namespace

int64_t partial_floats(const kg_attention& spec) {
  return round_up(spec.num_heads * (Shape(spec).depth + 2), kLanes);
}

bool write(const Step& step, const kg_op& op, int thread) {
  Writing(step, op, thread).write(part_of(step.batch->num_tokens, thread, step.pool->num_threads));
  step.attention_shares[thread].begin(&op);  // for those who attend
  return true;
}

bool attend(const Step& step, const kg_op& op, const AttentionPlan& plan, int thread) {
  const Attention attention(step, op, plan, thread);
  const Scratch scratch(step.scratch[thread], attention.shape);
  const int num_threads = step.pool->num_threads;
  for (int other = 0; other < num_threads; other++) {
    const int whose = (thread + other) % num_threads;
    const Part range = plan.ranges[whose];
    if (range.begin == range.end) continue;
    const auto take = [&] {
      return range.begin + step.attention_shares[whose].take();
    };
    for (int64_t i; (i = take()) < range.end;) {
      const int64_t likely = i + (plan.is_by_rows ? 1 : num_threads);
      attention.attend(plan.tasks[i], likely < range.end ? &plan.tasks[likely] : nullptr, scratch);
    }
  }
  if (plan.merges.empty()) return true;
  step.pool->barrier();
  const int64_t num_heads = attention.spec.num_heads;
  const Part part = part_of((int64_t)plan.merges.size() * num_heads, thread, num_threads);
  for (int64_t i = part.begin; i < part.end; i++)
    attention.merge(plan.merges[i / num_heads], i % num_heads, scratch.sums);
  return true;
}

}  // namespace kg
