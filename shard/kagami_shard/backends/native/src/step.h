// What the ops of a tape are given: the step, the thread, and where buffers lie.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "ops.h"
#include "panel.h"
#include "pool.h"

namespace kg {

// Steps of at most so many rows give each thread its own copy of a norm's output: computing it
// twice is cheaper than waiting for the other half.
constexpr int64_t kReplicatedRows = 16;

// Steps of at least so many rows for each thread are cut by rows: a thread takes its rows through
// all columns of all weights, and through whole layers but for attention, without meeting another.
// Before they meet they help one another (linear.cpp).
// What a core has written stays in its cache (measured: a line of the other core takes 27 ns, which
// is 6-8 % of a chunk of 256 tokens), but weights are read once by each thread. Each thread makes
// bf16 of codes for itself (measured on a 1B in 4 bits: a chunk of 128 tokens takes 669 ms cut by
// rows and 612 not cut; 256 tokens 1,225 and 1,213). AMX multiplies faster, but its cores lie
// farther apart.
constexpr int64_t kRowsApart = 64, kCodeRowsApart = 128, kAmxRowsApart = 128;

constexpr int64_t kTile = 2 * kPanel;  // tokens of the cache that attention reads at a time
constexpr int64_t kMaxRows = 96;       // rows that attend together
// The cache is summed up in stretches, counted from its beginning, and the sums of stretches are
// added in order. So a row's result has the same bits whoever computes which stretch: one thread or
// several, alone or together with rows that share it. The first two have 128 tokens, for threads to
// share a short decode; the others have 256, for each stretch costs its rows a new shift and a sum.
constexpr int64_t kShortStretch = 2 * kTile, kLongStretch = 2 * kShortStretch;
constexpr int64_t stretch_of(int64_t token) {
  return token < kLongStretch ? token / kShortStretch : token / kLongStretch + 1;
}
constexpr int64_t stretch_begin(int64_t stretch) {
  return stretch < 2 ? stretch * kShortStretch : (stretch - 1) * kLongStretch;
}

struct Part {
  int64_t begin, end;
};

// Part `index` of `count` equal ones of `total` things.
inline Part part_of(int64_t total, int64_t index, int64_t count) {
  return {total * index / count, total * (index + 1) / count};
}

// Whether a step of so many rows is cut by rows: if each thread gets at least `rows_apart` of them.
inline bool cuts_rows(int64_t rows, int64_t num_threads, int64_t rows_apart) {
  return rows >= num_threads * rows_apart;
}

struct Buffer {
  char* base;
  int64_t row_bytes;
  bool is_replicated;
};

// Rows that attend together to a stretch of the cache: tokens of one sequence's chunk, or decodes
// that share the stretch; see plan.cpp.
struct AttentionTask {
  int32_t sequence;                   // whose block table is read
  int32_t head, num_heads;            // of keys and values
  int32_t first_row, num_rows;        // tokens of the sequence's chunk
  int32_t begin, end;                 // tokens of the cache
  int32_t slot;                       // the first one for its unfinished results, or -1
  int32_t first_member, num_members;  // in place of rows and slot: of AttentionPlan::members
  // Whether the task begins with the first token that its rows see. Its stretches then become one
  // result; otherwise each stretch has a slot of its own.
  bool is_first;
};

struct Member {  // a decode, and where its share of a stretch's result goes
  int32_t sequence, slot;  // the first one
};

struct MergeTask {  // a decode with several unfinished results
  int32_t sequence, first_slot, num_slots;
};

// What the threads attend to in one step, the same for all layers with one window.
struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  std::vector<Part> ranges;  // of tasks, for each thread those that it begins with
  bool is_by_rows;           // each range is of its thread's rows; else all tasks are the first one's
  std::vector<Member> members;
  std::vector<MergeTask> merges;
  int64_t num_slots;
  // What the planner notes of each decode; here, so that a step need not allocate.
  std::vector<int32_t> order, slots_of, first_slot, first_alone;
};

// A thread's share of an op's work; other threads may take from it.
class alignas(64) WorkShare {
 public:
  void begin(const kg_op* op) {
    taken_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    op_.store(op, std::memory_order_release);
  }
  // Whether its thread has begun, so that the op's input is there, and some of `count` is left.
  bool is_open(const kg_op* op, int64_t count) const {
    return op_.load(std::memory_order_acquire) == op &&
           taken_.load(std::memory_order_relaxed) < count;
  }
  int64_t take() { return taken_.fetch_add(1, std::memory_order_relaxed); }
  void finish() { done_.fetch_add(1, std::memory_order_release); }
  // Called by its thread: returns when all `count` are finished. Nobody may take until it begins again.
  void end(int64_t count) {
    for (int looks = 1; done_.load(std::memory_order_acquire) < count; looks++)
      looks % kLooks ? __builtin_ia32_pause() : std::this_thread::yield();
    op_.store(nullptr, std::memory_order_relaxed);
  }

 private:
  static constexpr int kLooks = 1000;
  std::atomic<int64_t> taken_{0}, done_{0};
  std::atomic<const kg_op*> op_{nullptr};
};

struct LinearLinks {       // of a linear op with others of its tape
  const kg_op* next;       // the linear op behind it
  int64_t only_selected;   // so many columns, queries, are only wanted of selected rows
  bool is_before_write;    // the op after it is a KG_WRITE, after which threads always meet
};

struct Step {
  const kg_batch* batch;
  kg_pool* pool;
  const Buffer* buffers;
  const int64_t* first_tokens;  // [num_sequences], of each sequence in the flat batch
  WorkShare *linear_shares, *attention_shares;  // of each thread
  char* const* scratch;  // of each thread
  float* partials;
  int64_t rows_apart;  // a step is cut by rows if each thread gets at least so many

  const Buffer& buffer(int index) const { return buffers[index]; }
  bool replicates(const Buffer& buffer, int64_t rows) const {
    return buffer.is_replicated && rows <= kReplicatedRows;
  }
  bool cuts_rows(int64_t rows) const { return kg::cuts_rows(rows, pool->num_threads, rows_apart); }
  // Whether threads meet after an op that each thread has done for its own rows.
  bool meets(int64_t rows) const { return !cuts_rows(rows); }
  // Row `row` as `thread` sees it.
  template <class T>
  T* row(const Buffer& buffer, int64_t row, int64_t rows, int thread) const {
    const int64_t first = replicates(buffer, rows) ? thread * kReplicatedRows : 0;
    return (T*)(buffer.base + (first + row) * buffer.row_bytes);
  }
};

constexpr int64_t kScratchBytes = 3 << 17;

// Each runs on every thread; true: the threads must meet before the next op.
bool embed(const Step&, const kg_op&, int thread);
bool rope(const Step&, const kg_op&, int thread);
bool norm(const Step&, const kg_op&, int thread);
bool add_norm(const Step&, const kg_op&, int thread);
bool linear(const Step&, const kg_op&, const LinearLinks&, int thread);
bool write(const Step&, const kg_op&, int thread);
bool attend(const Step&, const kg_op&, const AttentionPlan&, int thread);
bool select_rows(const Step&, const kg_op&, int thread);

// The most likely id of each of these rows of `logits`, and its log probability.
void choose_tokens(const float* logits, Part rows, int64_t vocab_size, int64_t* ids,
                   float* logprobs);

void plan_attention(const kg_batch&, const kg_attention&, const int64_t* first_tokens,
                    int num_threads, int64_t rows_apart, AttentionPlan&);
int64_t partial_floats(const kg_attention&);

}  // namespace kg
