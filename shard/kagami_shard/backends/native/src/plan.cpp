// Which rows attend together, to what, and in which order.
//
// Decodes whose block tables begin alike (a shared prefix) attend to those blocks together: a tile is
// read once for all of them, and their rows make a matrix product of what were many thin ones
// (Hydragen, arXiv:2402.05099). Each then attends to the rest of its cache alone, and the unfinished
// results are merged. Prefixes may branch again: every branch of two or more shares its stretch.
#include <algorithm>
#include <tuple>

#include "simd.h"
#include "step.h"

namespace kg {
namespace {

// So many tasks for each thread let them end at about the same time.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTasksToDeal = 32;

Part stretches_of(Part tokens) {
  return {stretch_of(tokens.begin), stretch_of(tokens.end - 1) + 1};
}

int64_t num_stretches(Part tokens) {
  const Part stretches = stretches_of(tokens);
  return stretches.end - stretches.begin;
}

// How many sequences or tokens attend together: if possible their queries fill whole passes of a
// kernel.
int64_t whole_passes(int64_t group) {
  const int64_t most = std::max<int64_t>(1, kMaxRows / group);
  return most >= kAvx512Rows ? most / kAvx512Rows * kAvx512Rows : most;
}

// Part `index` of `count` of these tokens, cut between stretches.
Part part_of_tokens(Part tokens, int64_t index, int64_t count) {
  const Part stretches = stretches_of(tokens);
  const Part part = part_of(stretches.end - stretches.begin, index, count);
  return {std::max(tokens.begin, stretch_begin(stretches.begin + part.begin)),
          std::min(tokens.end, stretch_begin(stretches.begin + part.end))};
}

struct Planner {
  const kg_batch& batch;
  const kg_attention& spec;
  const int64_t* first_tokens;
  const int num_threads;
  AttentionPlan& plan;
  const int64_t at_once;              // sequences or tokens whose queries attend together
  std::vector<int32_t>& order;        // the decodes, by their block tables
  std::vector<int32_t>& num_slots;    // of each decode
  std::vector<int32_t>& first_alone;  // the first token that each decode shares with nobody

  Planner(const kg_batch& batch, const kg_attention& spec, const int64_t* first_tokens,
          int num_threads, AttentionPlan& plan)
      : batch(batch),
        spec(spec),
        first_tokens(first_tokens),
        num_threads(num_threads),
        plan(plan),
        at_once(whole_passes(spec.num_heads / spec.num_kv_heads)),
        order(plan.order),
        num_slots(plan.slots_of),
        first_alone(plan.first_alone) {}

  // The first token that the token at `position` sees, or one that lies before it in its tile.
  int32_t start(int64_t position) const {
    const int64_t first = spec.window ? std::max<int64_t>(0, position - spec.window + 1) : 0;
    return (int32_t)(first / kTile * kTile);
  }

  void run() {
    num_slots.assign(batch.num_decodes, 0);
    first_alone.resize(batch.num_decodes);
    for (int64_t i = 0; i < batch.num_decodes; i++)
      first_alone[i] = start(batch.kv_lens[i] - 1);
    if (!spec.window && batch.num_decodes > 1) share();
    for (int64_t sequence = batch.num_sequences - 1; sequence >= batch.num_decodes; sequence--)
      add_chunk((int32_t)sequence);
    for (int64_t sequence = batch.num_decodes - 1; sequence >= 0; sequence--)
      add_decode((int32_t)sequence);
    place_slots();
  }

  // ------------------------------------------------------------------ shared stretches

  const int64_t* table(int32_t sequence) const {
    return batch.block_tables + sequence * batch.table_width;
  }
  // Blocks that others may share: whole ones, not that of the newest token.
  int64_t num_blocks(int32_t sequence) const {
    return (batch.kv_lens[sequence] - 1) / batch.block_size;
  }

  void share() {
    order.resize(batch.num_decodes);
    for (size_t i = 0; i < order.size(); i++) order[i] = (int32_t)i;
    std::sort(order.begin(), order.end(), [this](int32_t a, int32_t b) {
      return std::lexicographical_compare(table(a), table(a) + num_blocks(a), table(b),
                                          table(b) + num_blocks(b));
    });
    branch({0, (int64_t)order.size()}, 0, 0);
  }

  // `decodes` (by `order`) have their first `depth` blocks in common. Finds those that have the next
  // one in common, too. Tokens from `from` on have no task yet. Whole stretches are shared.
  void branch(Part decodes, int64_t from, int64_t depth) {
    for (int64_t begin = decodes.begin, end; begin < decodes.end; begin = end) {
      end = begin + 1;
      if (num_blocks(order[begin]) <= depth) continue;
      const int64_t block = table(order[begin])[depth];
      while (end < decodes.end && num_blocks(order[end]) > depth &&
             table(order[end])[depth] == block)
        end++;
      if (end - begin < 2) continue;
      const int64_t blocks = common_blocks(order[begin], order[end - 1], depth);
      const int64_t shared = stretch_begin(stretch_of(blocks * batch.block_size));
      if (shared > from) add_shared({begin, end}, {from, shared});
      branch({begin, end}, std::max(from, shared), blocks);
    }
  }

  // Blocks are sorted, so what the first and the last have in common, all between them have.
  int64_t common_blocks(int32_t first, int32_t last, int64_t known) const {
    const int64_t most = std::min(num_blocks(first), num_blocks(last));
    while (known < most && table(first)[known] == table(last)[known]) known++;
    return known;
  }

  void add_shared(Part decodes, Part tokens) {
    const int64_t count = decodes.end - decodes.begin;
    const int64_t num_tasks = (count + at_once - 1) / at_once * spec.num_kv_heads;
    const int64_t wanted = (kTasksPerThread * num_threads + num_tasks - 1) / num_tasks;
    const int64_t parts = std::min(wanted, num_stretches(tokens));
    for (int64_t part = 0; part < parts; part++) {
      const Part of_part = part_of_tokens(tokens, part, parts);
      for (int64_t at = decodes.begin; at < decodes.end; at += at_once) {
        const int32_t members = (int32_t)std::min(at_once, decodes.end - at);
        const int32_t first_member = (int32_t)plan.members.size();
        const bool is_first = of_part.begin == 0;
        for (int64_t i = at; i < at + members; i++)
          plan.members.push_back({order[i], take_slots(order[i], of_part, is_first)});
        for (int32_t head = 0; head < spec.num_kv_heads; head++)
          plan.tasks.push_back({order[at], head, 1, 0, 0, (int32_t)of_part.begin,
                                (int32_t)of_part.end, -1, first_member, members, is_first});
      }
    }
    for (int64_t i = decodes.begin; i < decodes.end; i++) first_alone[order[i]] = (int32_t)tokens.end;
  }

  // The first of a decode's slots for these tokens; slots are in the order of the tokens.
  int32_t take_slots(int32_t sequence, Part tokens, bool is_first) {
    const int32_t slot = num_slots[sequence];
    num_slots[sequence] += is_first ? 1 : (int32_t)num_stretches(tokens);
    return slot;
  }

  // ------------------------------------------------------------------ one sequence alone

  // From the last tokens backwards: the longest first.
  void add_chunk(int32_t sequence) {
    const int64_t count = batch.query_lens[sequence], before = batch.kv_lens[sequence] - count;
    for (int64_t row = (count - 1) / at_once * at_once; row >= 0; row -= at_once) {
      const int64_t rows = std::min(at_once, count - row);
      for (int32_t head = 0; head < spec.num_kv_heads; head++)
        plan.tasks.push_back({sequence, head, 1, (int32_t)row, (int32_t)rows, start(before + row),
                              (int32_t)(before + row + rows), -1, 0, 0, true});
    }
  }

  // Decodes of few sequences are cut along the cache, so that all threads have something to read.
  void add_decode(int32_t sequence) {
    const Part tokens{first_alone[sequence], batch.kv_lens[sequence]};
    const bool cuts = num_threads > 1 && batch.num_decodes < kTasksPerThread * num_threads &&
                      batch.num_decodes == batch.num_sequences;
    const int64_t parts = cuts ? num_stretches(tokens) : 1;
    const int32_t heads_at_once = (int32_t)std::min<int64_t>(spec.num_kv_heads, at_once);
    const bool is_unfinished = parts > 1 || num_slots[sequence] > 0;
    for (int64_t part = 0; part < parts; part++) {
      const Part of_part = part_of_tokens(tokens, part, parts);
      const bool is_first = num_slots[sequence] == 0;
      const int32_t slot = is_unfinished ? take_slots(sequence, of_part, is_first) : -1;
      for (int32_t head = 0; head < spec.num_kv_heads; head += heads_at_once)
        plan.tasks.push_back({sequence, head, std::min(heads_at_once, spec.num_kv_heads - head), 0,
                              1, (int32_t)of_part.begin, (int32_t)of_part.end, slot, 0, 0, is_first});
    }
  }

  // ------------------------------------------------------------------ who begins with what

  // The thread that has most of the task's rows.
  int owner(const AttentionTask& task) const {
    const int64_t row = first_tokens[task.sequence] + task.first_row + task.num_rows / 2;
    return (int)(((row + 1) * num_threads - 1) / batch.num_tokens);  // see part_of
  }

  // If a step is cut by rows, a thread begins with its own rows: their queries lie in its cache, and it
  // will read the result. Later rows attend to more tokens, so few tasks are not divided well that way
  // (measured: SmolLM2, 24 tasks: threads wait 1.3 ms of 41 longer; a 1B, 88 tasks: less).
  void deal(bool cuts_rows) {
    auto& tasks = plan.tasks;
    const bool by_rows = cuts_rows && (int64_t)tasks.size() >= kTasksToDeal * num_threads;
    plan.is_by_rows = by_rows;
    if (by_rows)
      std::sort(tasks.begin(), tasks.end(), [this](const AttentionTask& a, const AttentionTask& b) {
        const auto key = [this](const AttentionTask& task) {
          return std::make_tuple(owner(task), -task.end, task.sequence, task.head, task.begin);
        };
        return key(a) < key(b);
      });
    plan.ranges.clear();
    int64_t begin = 0;
    for (int thread = 0; thread < num_threads; thread++) {
      int64_t end = begin;
      while (end < (int64_t)tasks.size() && (!by_rows || owner(tasks[end]) == thread)) end++;
      plan.ranges.push_back({begin, end});
      begin = end;
    }
  }

  // ------------------------------------------------------------------ results to merge

  // Slots were counted for each decode; now they get their place among all.
  void place_slots() {
    auto& first_slot = plan.first_slot;
    first_slot.resize(batch.num_decodes);
    for (int32_t sequence = 0; sequence < batch.num_decodes; sequence++) {
      first_slot[sequence] = (int32_t)plan.num_slots;
      if (!num_slots[sequence]) continue;
      plan.merges.push_back({sequence, first_slot[sequence], num_slots[sequence]});
      plan.num_slots += num_slots[sequence];
    }
    for (auto& task : plan.tasks)
      if (task.slot >= 0) task.slot += first_slot[task.sequence];
    for (auto& member : plan.members) member.slot += first_slot[member.sequence];
  }
};

}  // namespace

// A thread that is free takes the next task, the longest first: shared stretches, chunks from their
// last tokens backwards, then decodes (the engine sorts them by length). If a step is cut by rows, a
// thread takes the tasks of its own rows before others.
void plan_attention(const kg_batch& batch, const kg_attention& spec, const int64_t* first_tokens,
                    int num_threads, int64_t rows_apart, AttentionPlan& plan) {
  plan.tasks.clear();
  plan.members.clear();
  plan.merges.clear();
  plan.num_slots = 0;
  Planner planner(batch, spec, first_tokens, num_threads, plan);
  planner.run();
  planner.deal(cuts_rows(batch.num_tokens, num_threads, rows_apart));
}

}  // namespace kg
