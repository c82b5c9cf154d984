// Whether sizes and memory agree, asked once before either is used.
#pragma once
#include "ops.h"

namespace kg {

constexpr int64_t kMostRows = 1 << 28;  // and columns: products of two stay far from 2^63

bool is_weight(const kg_linear&);             // kind, rows, columns and group are such as can be packed
bool has_room(const kg_linear&, bool gated);   // and `weight` has room for it
bool is_array(const kg_span&, int64_t item_size, int64_t rows, int64_t columns);
bool are_rows_of(const kg_linear&, const kg_rows* parts, int num_parts);

struct Recorded {  // a tape to be
  const kg_op* ops;
  int64_t num_ops;
  const kg_buffer* buffers;
  int64_t num_buffers, vocab_size;
};

// The first op that cannot be replayed without leaving its buffers and its memory, and why.
kg_refusal refused_op(const Recorded&);

}  // namespace kg
