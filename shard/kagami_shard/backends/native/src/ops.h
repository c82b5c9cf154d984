// The C interface of the CPU's library: what Python sees of it (library.py mirrors these structs).
//
// A step is a *tape*: a list of ops over numbered buffers, recorded once for a model and replayed
// in one call per step, whatever the step's size is. Rows of a buffer are tokens (or the rows that
// logits are wanted for); a buffer is numbered by its place in the list given to kg_tape_new.
// Nothing here allocates during a replay, except the first one that is larger than all before.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef uint16_t kg_bf16;

enum { KG_BF16, KG_INT8, KG_INT4, KG_FLOAT8, KG_GROUPED8 };  // kg_linear.kind; see quantized.h

enum {  // kg_op.code            in        out       params           index
  KG_EMBED,     //               ids       float32   kg_embedding
  KG_ROPE,      //               positions float32   kg_rope          [num_tokens, cos | sin]
  KG_NORM,      //               float32   bf16      kg_norm
  KG_ADD_NORM,  //               float32   float32   kg_norm          out += alpha * norm(in)
  KG_LINEAR,    //               bf16 (1)  epilogue  kg_linear        (1) 8 bits if it is KG_INT8
  KG_WRITE,     //               float32   the same  kg_attention     buffer of the rope's tables
  KG_ATTEND,    //               (2)       bf16      kg_attention     (2) what KG_WRITE has left
  KG_QUANTIZE,  //               bf16      8 bits    kg_quantize      what a KG_INT8 layer reads
  KG_SELECT,      //               any       the same  NULL             rows kg_batch.selected names
  KG_NUM_CODES,
};

enum {  // kg_op.epilogue of KG_LINEAR, y = x @ W.T + bias
  KG_STORE_FLOAT,  // out = act(alpha * y), float32
  KG_STORE_BF16,   // out = act(y), bf16
  KG_ADD,          // out += alpha * y, float32
  KG_GATED,        // out = act(gate) * up, bf16; gate and up interleaved by 16 (kg_pack)
};

enum { KG_NO_ACTIVATION, KG_SILU, KG_GELU, KG_GELU_TANH, KG_RELU, KG_SOFTCAP };

enum { KG_ROUND, KG_RMS, KG_LAYER_NORM };            // kg_norm.kind
enum { KG_NO_QK_NORM, KG_NORM_HEADS, KG_NORM_ALL };  // kg_attention.qk_norm

enum { KG_LOGITS = -1 };  // as a buffer: kg_batch.logits

typedef struct {  // memory, and how much of it is there
  const void* data;
  int64_t bytes;
} kg_span;

typedef struct {  // rows of a bf16 matrix, `stride` elements apart, in memory of so many bytes
  const kg_bf16* first;
  int64_t rows, columns, stride, bytes;
} kg_rows;

typedef struct {
  int32_t kind;
  int32_t rows, columns;  // of the weight, as the checkpoint has it: [out, in]
  int32_t group;          // of codes: columns that share a scale, a multiple of 32
  const void* weight;     // packed
  const float* bias;      // float32, in the order of the packed rows, padded to 32; or NULL
  int64_t weight_bytes, bias_count;  // what is there
} kg_linear;

typedef struct {
  int32_t width;
  int32_t is_packed;   // 1: the packed weight of a tied head, 0: rows one after the other
  const void* weight;  // bf16
  float multiplier;
  int32_t rows;
  int64_t weight_bytes;
} kg_embedding;

typedef struct {
  int32_t half;  // rotary_dim / 2
  float factor;  // on cos and sin
  const float* frequencies;
  int64_t count;  // of the frequencies
} kg_rope;

typedef struct {
  int32_t kind;
  int32_t width;
  float eps;
  const float* weight;
  const float* bias;
  int64_t weight_count, bias_count;
} kg_norm;

typedef struct {
  int32_t columns;
  int32_t hadamard_block;  // columns of a block that a Hadamard matrix rotates; 1: none
} kg_quantize;

typedef struct {
  int32_t layer;  // index into the cache
  int32_t num_heads, num_kv_heads, head_dim, rotary_half;
  int32_t window;  // 0: none
  int32_t qk_norm;
  float scale, softcap, eps;  // softcap 0: none
  const float* qk_weight;     // [num_heads + num_kv_heads, head_dim]
  int64_t qk_count;
} kg_attention;

typedef struct {
  int32_t code, in, out, index, epilogue, activation;
  int32_t selected;  // 1: over the selected tokens, as all ops behind a KG_SELECT
  float alpha, bound;  // bound: of KG_SOFTCAP
  const void* params;
} kg_op;

typedef struct {
  int32_t columns, item_size;
  int32_t is_replicated;  // small steps give each thread a copy of its own (KG_NORM's output)
} kg_buffer;

typedef struct kg_batch {  // one step; see batch.py and kv_cache.py
  int64_t num_tokens, num_sequences, num_decodes, table_width;
  const int64_t *input_ids, *positions, *block_tables, *query_lens, *kv_lens;
  kg_bf16* const* keys;  // per layer [num_blocks, block_size, num_kv_heads, head_dim], within a
  kg_bf16* const* values;  // block arranged as cache.h says
  int64_t block_size;
  float* logits;  // of each token that they are wanted for, [vocab_size]
  // The tokens that logits are wanted for, as a step of their own; NULL: all, in order.
  const struct kg_batch* selected;
  const int64_t* rows;  // in `selected`: the token of the step; ids and positions are not read
} kg_batch;

typedef struct {    // greedy decodes, one token of each sequence, that go on from step to step
  kg_batch batch;   // num_tokens, num_sequences and num_decodes are equal, all are selected
  int64_t *ids;     // the same memory as batch.input_ids: what is chosen is the next step's input
  int64_t *positions, *kv_lens;  // the same as the batch's, moved on by each step
  float* logprobs;               // of the ids, not finite where there is no distribution
  int64_t vocab_size;
  int64_t sampling_ns;  // what choosing took
} kg_decodes;

// A line for each struct above, its size and the offsets of its fields; for each enum its values; and
// the bytes of a thread's scratch.
const char* kg_layout(void);

typedef struct kg_pool kg_pool;
typedef struct kg_tape kg_tape;

int kg_has_amx(void);  // and this process may use it

// Threads, the caller counted. At a barrier a thread looks `spins` times before it sleeps.
kg_pool* kg_pool_new(int num_threads, int spins, int use_amx);
void kg_pool_delete(kg_pool*);

// Every length of memory comes with it, and is compared with the sizes before it is used: a function
// that says 1, or -1, has read and written nothing.
int64_t kg_packed_bytes(const kg_linear*);  // kind, rows, columns and group; -1: there is no such weight
// Each packs into `weight` of the layer, of `weight_bytes`; 0, or 1: the sizes do not fit.
// int8 [rows, columns] with float scales [rows]; 4-bit codes [rows, columns / 2] uint8, the even
// column low, with float16 scales and zeros [rows, groups], zeros in fifteenths from 0 to 17.
int kg_pack_int8(const kg_linear*, const kg_span* values, const kg_span* scales, int gated);
int kg_pack_int4(const kg_linear*, const kg_span* codes, const kg_span* scales,
                 const kg_span* zeros, int gated);
// Bytes [rows, columns], with float scales [rows, groups] and for KG_GROUPED8 zeros, else NULL:
// e4m3 without NaN, or codes from 0 to 255.
int kg_pack_bytes(const kg_linear*, const kg_span* codes, const kg_span* scales,
                  const kg_span* zeros, int gated);
// bf16 [rows, columns], which lie in `parts`, one below the other, into the order that the kernels
// read. With `gated` the upper half of the rows is the gate, the lower half `up`: they come to lie
// alternately, 16 rows of each.
int kg_pack(const kg_linear*, const kg_rows* parts, int num_parts, int gated);
int64_t kg_padded_rows(int64_t rows, int gated);

// A layer's cache as torch has written it into the order that the library reads.
void kg_arrange(kg_bf16* keys, kg_bf16* values, int64_t num_blocks, int64_t block_size,
                int64_t num_kv_heads, int64_t head_dim);

void* kg_huge_alloc(int64_t bytes);  // zeros, aligned to 2 MiB, on huge pages; NULL: no memory
void kg_huge_free(void*, int64_t bytes);

typedef struct {
  int32_t op;          // its index; -1: no op was refused
  const char* reason;  // in the library's own memory
} kg_refusal;

// Copies ops and buffers; params must outlive the tape. Every op is compared with its buffers and its
// memory, so that a replay cannot leave them: NULL: an op is refused, or there is no memory.
// `vocab_size` columns are the logits of a row.
kg_tape* kg_tape_new(kg_pool*, const kg_op*, int num_ops, const kg_buffer*, int num_buffers,
                     int64_t vocab_size, kg_refusal*);
void kg_tape_delete(kg_tape*);
// 0, or 1: no memory for the buffers of such a step, 2: an id that the embedding does not have.
int kg_replay(kg_tape*, const kg_batch*);
const void* kg_tape_buffer(kg_tape*, int buffer, int64_t* row_bytes);  // for tests, after a replay

// A step, then the most likely id of each of its rows, and on to the next position. The number of
// rows without a distribution, or -1: no memory, -2: an id that the embedding does not have, or another
// vocabulary, and nothing has changed.
int kg_decode(kg_tape*, kg_decodes*);

// The most likely id of each row of `logits`, and its log probability.
void kg_choose_tokens(kg_pool*, const float* logits, int64_t num_rows, int64_t vocab_size,
                      int64_t* ids, float* logprobs);
// The log probabilities of `ids`, [num_rows, ids_per_row]. A token's has the same bits here, there
// and in kg_decode.
void kg_logprobs(kg_pool*, const float* logits, int64_t num_rows, int64_t vocab_size,
                 const int64_t* ids, int64_t ids_per_row, float* logprobs);

#ifdef __cplusplus
}
#endif
