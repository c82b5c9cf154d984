// What the ops of a tape are given: the step, the thread, and where buffers lie.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "ops.h"
#include "panel.h"
#include "pool.h"

namespace kg {

// Steps of at most so many rows give each thread its own copy of a norm's output: computing it
// twice is cheaper than waiting for the other half.
constexpr int64_t kReplicatedRows = 16;

// Steps of at least so many rows for each thread are cut by rows: a thread takes its rows through
// all columns of all weights, and through whole layers, attention apart, without meeting another.
// What a core has written stays in its cache (m: a line of the other core's takes 27 ns, 6-8 % of
// a chunk of 256 tokens), and twice as much is read of the weights. Codes are made bf16 by each
// thread for itself (m: a chunk of 128 tokens of a 1B in 4 bits 669 ms where it is cut by rows, 612
// where it is not; 256 tokens 1,225 and 1,213). AMX multiplies faster, but its cores lie farther
// apart.
constexpr int64_t kRowsApart = 64, kCodeRowsApart = 128, kAmxRowsApart = 128;

constexpr int64_t kTile = 2 * kPanel;  // tokens of the cache that attention reads at a time
constexpr int64_t kMaxRows = 96;       // rows that attend together

struct Part {
  int64_t begin, end;
};

// Part `index` of `count` equal ones of `total` things.
inline Part part_of(int64_t total, int64_t index, int64_t count) {
  return {total * index / count, total * (index + 1) / count};
}

struct Buffer {
  char* base;
  int64_t row_bytes;
  int64_t columns;
  bool is_replicated;
};

// Rows that attend together to a stretch of the cache: tokens of one sequence's chunk, or decodes
// that share the stretch; see plan.cpp.
struct Attending {
  int32_t sequence;                   // whose block table is read
  int32_t head, num_heads;            // of keys and values
  int32_t first_row, num_rows;        // tokens of the sequence's chunk
  int32_t begin, end;                 // tokens of the cache
  int32_t slot;                       // where to leave an unfinished result, or -1
  int32_t first_member, num_members;  // in place of rows and slot: of Plan::members
};

struct Member {  // a decode, and where its share of a stretch's result goes
  int32_t sequence, slot;
};

struct Merging {  // a decode with several unfinished results
  int32_t sequence, first_slot, num_slots;
};

struct Plan {  // what the threads attend to in one step, the same for all layers with one window
  std::vector<Attending> items;
  std::vector<Member> members;
  std::vector<Merging> merges;
  int64_t num_slots;
  // What the planner notes of each decode; kept, so that a step need not allocate.
  std::vector<int32_t> order, slots_of, first_slot, first_alone;
};

struct Step {
  const kg_batch* batch;
  kg_pool* pool;
  const Buffer* buffers;
  const int64_t* first_tokens;  // [num_sequences], of each sequence in the flat batch
  std::atomic<int64_t>* next_item;
  char* const* scratch;  // of each thread
  float* partials;
  int64_t rows_apart;  // of a thread, from which on a step is cut by rows

  const Buffer& buffer(int index) const { return buffers[index]; }
  bool replicates(const Buffer& buffer, int64_t rows) const {
    return buffer.is_replicated && rows <= kReplicatedRows;
  }
  bool cuts_rows(int64_t rows) const {
    return rows >= pool->num_threads * rows_apart;
  }
  // Whether threads meet after an op that each has done for its own rows.
  bool meets(int64_t rows) const { return !cuts_rows(rows); }
  // Row `row` as `thread` sees it.
  template <class T>
  T* row(const Buffer& buffer, int64_t row, int64_t rows, int thread) const {
    const int64_t first = replicates(buffer, rows) ? thread * kReplicatedRows : 0;
    return (T*)(buffer.base + (first + row) * buffer.row_bytes);
  }
};

constexpr int64_t kScratchBytes = 1 << 18;

// Each runs on every thread; true: the threads must meet before the next op.
bool embed(const Step&, const kg_op&, int thread);
bool rope(const Step&, const kg_op&, int thread);
bool norm(const Step&, const kg_op&, int thread);
bool add_norm(const Step&, const kg_op&, int thread);
bool linear(const Step&, const kg_op&, const kg_op* next_linear, int thread);
bool write(const Step&, const kg_op&, int thread);
bool attend(const Step&, const kg_op&, const Plan&, int thread);
bool keep(const Step&, const kg_op&, int thread);

// The most likely id of each of these rows of `logits`, and its log probability.
void choose_rows(const float* logits, Part rows, int64_t vocab_size, int64_t* ids, float* logprobs);

void plan_attention(const kg_batch&, const kg_attention&, int num_threads, Plan&);
int64_t partial_floats(const kg_attention&);

}  // namespace kg
