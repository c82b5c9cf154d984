// Whether sizes and memory agree, asked once before either is used.
#pragma once
#include "ops.h"

namespace kg {

bool has_room(const kg_linear&, bool gated);  // it is a weight, with memory for all of it
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
