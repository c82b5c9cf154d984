// The tape: buffers that grow with the largest step, and the replay on all threads.
#include <sys/mman.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "checks.h"
#include "quantized.h"
#include "simd.h"
#include "step.h"

namespace {

using namespace kg;

constexpr int64_t kHugePage = 2 << 20;
// The next step of a decode comes 0.5 to 2 ms after the last one. A thread whose core has gone to
// sleep takes as long as several ops to wake, and Python and gRPC find one core awake in between
// (notes/0015).
constexpr int kLingerUs = 2000;
constexpr int64_t kSpareBytes = 64 << 10;  // kernels prefetch beyond the end

int64_t mapped_bytes(int64_t bytes) { return round_up(bytes + kSpareBytes, kHugePage); }

struct Memory {  // freed with its owner
  char* base = nullptr;
  int64_t bytes = 0;
  ~Memory() { kg_huge_free(base, bytes); }
  bool reserve(int64_t wanted) {
    if (wanted <= bytes) return true;
    kg_huge_free(base, bytes);
    base = (char*)kg_huge_alloc(wanted);
    bytes = base ? wanted : 0;
    return base != nullptr;
  }
};

struct SharedPlan {  // of all layers whose attention looks alike to the planner
  const kg_attention* spec;
  bool has_selected;  // some of it comes behind a KG_SELECT
  AttentionPlan whole, selected;
  const AttentionPlan& of(const Step& step) const { return step.batch->rows ? selected : whole; }
};

// The first token of each sequence in the flat batch.
void find_first_tokens(const kg_batch& batch, std::vector<int64_t>& first_tokens) {
  first_tokens.resize(batch.num_sequences);
  int64_t token = 0;
  for (int64_t i = 0; i < batch.num_sequences; i++) {
    first_tokens[i] = token;
    token += batch.query_lens[i];
  }
}

}  // namespace

struct kg_tape {
  kg_pool* pool;
  std::vector<kg_op> ops;
  std::vector<LinearLinks> links;  // of each op
  std::vector<char> must_meet;  // after each op: see meet_before_writes
  std::vector<kg_buffer> shapes;
  std::vector<Buffer> buffers;
  std::vector<int64_t> offsets;  // of the buffers in `rows`
  std::vector<int64_t> first_tokens, first_selected;
  std::vector<int> plan_of;  // of each op, or -1
  std::vector<SharedPlan> plans;
  std::vector<char*> scratch;
  int64_t max_rows = 0, rows_apart = kRowsApart;
  int64_t vocab_size = 0, num_ids = kMostRows;  // columns of logits; rows of embeddings
  Memory rows, threads, partials;
  std::vector<WorkShare> linear_shares, attention_shares;

  bool grow(const kg_batch& batch) {
    const int64_t num_selected = batch.selected ? batch.selected->num_tokens : 0;
    const int64_t wanted =
        std::max({batch.num_tokens, num_selected, kReplicatedRows * pool->num_threads});
    if (wanted <= max_rows) return true;
    int64_t bytes = 0;
    offsets.clear();
    for (const auto& buffer : buffers) {
      offsets.push_back(bytes);
      bytes += round_up(buffer.row_bytes * wanted, 4096) + 64;
    }
    max_rows = 0;
    if (!rows.reserve(bytes)) return false;
    max_rows = wanted;
    return true;
  }

  // Where all rows are selected nothing is copied: both buffers are the same memory.
  void place_buffers(bool selects_all) {
    for (size_t i = 0; i < buffers.size(); i++) buffers[i].base = rows.base + offsets[i];
    if (!selects_all) return;
    for (const auto& op : ops)
      if (op.code == KG_SELECT) buffers[op.out].base = buffers[op.in].base;
  }

  bool prepare(const kg_batch& batch) {
    if (!grow(batch)) return false;
    place_buffers(!batch.selected);
    find_first_tokens(batch, first_tokens);
    if (batch.selected) find_first_tokens(*batch.selected, first_selected);
    int64_t floats = 0;
    const auto plan = [&](const kg_batch& batch, const std::vector<int64_t>& first_tokens,
                          const kg_attention& spec, AttentionPlan& plan) {
      plan_attention(batch, spec, first_tokens.data(), pool->num_threads, rows_apart, plan);
      floats = std::max(floats, plan.num_slots * partial_floats(spec));
    };
    for (auto& each : plans) {
      plan(batch, first_tokens, *each.spec, each.whole);
      if (batch.selected && each.has_selected)
        plan(*batch.selected, first_selected, *each.spec, each.selected);
    }
    return !floats || partials.reserve(floats * 4);
  }

  // Each thread computes the norm of few rows for itself, and nobody waits: the layer that follows
  // must not write what another thread's norm still reads. And selected rows may be another thread's.
  void meet_before_writes() {
    must_meet.assign(ops.size(), 0);
    for (size_t i = 0; i < ops.size(); i++) {
      if (ops[i].code == KG_SELECT && i > 0 && ops[i - 1].code != KG_SELECT) must_meet[i - 1] = 1;
      if (ops[i].code != KG_NORM) continue;
      size_t next = i + 1;
      while (next < ops.size() && ops[next].code == KG_QUANTIZE) next++;
      if (next < ops.size() && ops[next].out == ops[i].in) must_meet[next - 1] = 1;
    }
  }

  void link_linears() {
    links.resize(ops.size());
    const kg_op* next = nullptr;
    for (size_t i = ops.size(); i-- > 0;) {
      links[i] = {next, 0, i + 1 < ops.size() && ops[i + 1].code == KG_WRITE};
      if (links[i].is_before_write) links[i].only_selected = queries_only_selected(i + 1);
      if (ops[i].code == KG_LINEAR) next = &ops[i];
    }
  }

  bool has_ids(const kg_batch& batch) const {
    return std::all_of(batch.input_ids, batch.input_ids + batch.num_tokens,
                       [this](int64_t id) { return 0 <= id && id < num_ids; });
  }

  // The last layer needs keys and values of all rows, and queries of the selected ones.
  int64_t queries_only_selected(size_t write) const {
    size_t select = write + 1;
    while (select < ops.size() && ops[select].code == KG_SELECT &&
           ops[select].in != ops[write].out)
      select++;
    if (select == ops.size() || ops[select].code != KG_SELECT) return 0;
    const kg_attention& spec = *(const kg_attention*)ops[write].params;
    return (int64_t)spec.num_heads * spec.head_dim;
  }

  // The ops that look alike to a plan share it.
  int plan_for(const kg_op& op) {
    const kg_attention& spec = *(const kg_attention*)op.params;
    size_t i = 0;
    while (i < plans.size() && (plans[i].spec->window != spec.window ||
                                  plans[i].spec->num_heads != spec.num_heads ||
                                  plans[i].spec->num_kv_heads != spec.num_kv_heads))
      i++;
    if (i == plans.size()) plans.push_back({&spec, false});
    plans[i].has_selected |= op.selected != 0;
    return (int)i;
  }

  Step step_of(const kg_batch& batch, const std::vector<int64_t>& first_tokens) {
    return {&batch,
            pool,
            buffers.data(),
            first_tokens.data(),
            linear_shares.data(),
            attention_shares.data(),
            scratch.data(),
            (float*)partials.base,
            rows_apart};
  }

  int64_t find_rows_apart() const {
    const auto has_codes = [](const kg_op& op) {
      return op.code == KG_LINEAR && code_form(((const kg_linear*)op.params)->kind);
    };
    if (pool->use_amx) return kAmxRowsApart;
    return std::any_of(ops.begin(), ops.end(), has_codes) ? kCodeRowsApart : kRowsApart;
  }

  // All ops of a step, those behind a KG_SELECT over the selected tokens.
  void run(const kg_batch& batch, int thread) {
    const Step whole = step_of(batch, first_tokens);
    const Step selected = batch.selected ? step_of(*batch.selected, first_selected) : whole;
    for (size_t i = 0; i < ops.size(); i++) {
      const Step& step = ops[i].selected ? selected : whole;
      if (!step.batch->num_tokens) return;
      if (run(step, i, thread) || must_meet[i]) pool->barrier();
    }
  }

  bool run(const Step& step, size_t index, int thread) {
    const kg_op& op = ops[index];
    switch (op.code) {
      case KG_EMBED:
        return embed(step, op, thread);
      case KG_ROPE:
        return rope(step, op, thread);
      case KG_NORM:
        return norm(step, op, thread);
      case KG_ADD_NORM:
        return add_norm(step, op, thread);
      case KG_QUANTIZE:
        return quantize(step, op, thread);
      case KG_LINEAR:
        return linear(step, op, links[index], thread);
      case KG_WRITE:
        return write(step, op, thread);
      case KG_SELECT:
        return select_rows(step, op, thread);
      case KG_ATTEND:
        return attend(step, op, plans[plan_of[index]].of(step), thread);
    }
    abort();  // kg_tape_new has looked at all codes
  }
};

extern "C" kg_tape* kg_tape_new(kg_pool* pool, const kg_op* ops, int num_ops,
                                const kg_buffer* shapes, int num_buffers, int64_t vocab_size,
                                kg_refusal* refusal) {
  *refusal = refused_op({ops, num_ops, shapes, num_buffers, vocab_size});
  if (refusal->reason) return nullptr;
  auto tape = std::make_unique<kg_tape>();
  tape->pool = pool;
  tape->vocab_size = vocab_size;
  for (int i = 0; i < num_ops; i++)
    if (ops[i].code == KG_EMBED)
      tape->num_ids = std::min<int64_t>(tape->num_ids, ((const kg_embedding*)ops[i].params)->rows);
  tape->linear_shares = std::vector<WorkShare>(pool->num_threads);
  tape->attention_shares = std::vector<WorkShare>(pool->num_threads);
  tape->ops.assign(ops, ops + num_ops);
  tape->meet_before_writes();
  tape->link_linears();
  tape->rows_apart = tape->find_rows_apart();
  for (const auto& op : tape->ops)
    tape->plan_of.push_back(op.code == KG_ATTEND ? tape->plan_for(op) : -1);
  for (int i = 0; i < num_buffers; i++) {
    const kg_buffer& shape = shapes[i];
    // Rows a multiple of 4 KiB apart would share the same few sets of the first cache.
    int64_t row_bytes = round_up(shape.columns, kDepth) * shape.item_size;
    row_bytes = round_up(row_bytes, 64);
    if (row_bytes % 1024 == 0) row_bytes += 64;
    tape->buffers.push_back({nullptr, row_bytes, shape.is_replicated != 0});
  }
  if (!tape->threads.reserve(kScratchBytes * pool->num_threads)) return nullptr;
  for (int i = 0; i < pool->num_threads; i++)
    tape->scratch.push_back(tape->threads.base + i * kScratchBytes);
  return tape.release();
}

extern "C" void kg_tape_delete(kg_tape* tape) { delete tape; }

extern "C" int kg_replay(kg_tape* tape, const kg_batch* batch) {
  if (!tape->has_ids(*batch)) return 2;
  if (!tape->prepare(*batch)) return 1;
  auto job = [&](int thread) { tape->run(*batch, thread); };
  tape->pool->run(job);
  return 0;
}

extern "C" int kg_decode(kg_tape* tape, kg_decodes* decodes) {
  using Clock = std::chrono::steady_clock;
  const kg_batch& batch = decodes->batch;
  if (!tape->has_ids(batch) || decodes->vocab_size != tape->vocab_size) return -2;
  if (!tape->prepare(batch)) return -1;
  Clock::time_point computed;
  auto job = [&](int thread) {
    tape->run(batch, thread);
    if (thread == 0) computed = Clock::now();
    choose_tokens(batch.logits, part_of(batch.num_tokens, thread, tape->pool->num_threads),
                  decodes->vocab_size, decodes->ids, decodes->logprobs);
  };
  tape->pool->run(job, kLingerUs);
  int num_lost = 0;
  for (int64_t i = 0; i < batch.num_tokens; i++) {
    decodes->positions[i]++;
    decodes->kv_lens[i]++;
    num_lost += !std::isfinite(decodes->logprobs[i]);
  }
  decodes->sampling_ns =
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - computed).count();
  return num_lost;
}

extern "C" const void* kg_tape_buffer(kg_tape* tape, int buffer, int64_t* row_bytes) {
  *row_bytes = tape->buffers[buffer].row_bytes;
  return tape->buffers[buffer].base;
}

extern "C" void* kg_huge_alloc(int64_t bytes) {
  // A page more than asked for, to begin at a huge page's border; the rest is given back.
  const int64_t size = mapped_bytes(bytes), total = size + kHugePage;
  char* base = (char*)mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == (char*)MAP_FAILED) return nullptr;
  char* start = (char*)round_up((int64_t)base, kHugePage);
  if (start > base) munmap(base, start - base);
  if (base + total > start + size) munmap(start + size, base + total - start - size);
  madvise(start, size, MADV_HUGEPAGE);
  return start;
}

extern "C" void kg_huge_free(void* base, int64_t bytes) {
  if (base) munmap(base, mapped_bytes(bytes));
}

extern "C" int kg_has_amx(void) { return has_amx(); }
