// What the library was compiled with, for library.py to compare with its own.
#include <stddef.h>

#include <initializer_list>
#include <string>

#include "ops.h"
#include "step.h"

namespace {

// A struct's size and the offsets of its fields, or the values of an enum, in a line.
std::string line(const char* name, std::initializer_list<int64_t> numbers) {
  std::string text = name;
  for (const int64_t number : numbers) text += " " + std::to_string(number);
  return text + "\n";
}

#define AT(field) (int64_t) offsetof(Struct, field)

std::string span() {
  using Struct = kg_span;
  return line("kg_span", {sizeof(Struct), AT(data), AT(bytes)});
}
std::string rows() {
  using Struct = kg_rows;
  return line("kg_rows", {sizeof(Struct), AT(first), AT(rows), AT(columns), AT(stride), AT(bytes)});
}
std::string refusal() {
  using Struct = kg_refusal;
  return line("kg_refusal", {sizeof(Struct), AT(op), AT(reason)});
}
std::string linear() {
  using Struct = kg_linear;
  return line("kg_linear", {sizeof(Struct), AT(kind), AT(rows), AT(columns), AT(group), AT(weight),
                            AT(bias), AT(weight_bytes), AT(bias_count)});
}
std::string quantize() {
  using Struct = kg_quantize;
  return line("kg_quantize", {sizeof(Struct), AT(columns), AT(hadamard_block)});
}
std::string embedding() {
  using Struct = kg_embedding;
  return line("kg_embedding",
              {sizeof(Struct), AT(width), AT(is_packed), AT(weight), AT(multiplier), AT(rows),
               AT(weight_bytes)});
}
std::string rope() {
  using Struct = kg_rope;
  return line("kg_rope", {sizeof(Struct), AT(half), AT(factor), AT(frequencies), AT(count)});
}
std::string norm() {
  using Struct = kg_norm;
  return line("kg_norm", {sizeof(Struct), AT(kind), AT(width), AT(eps), AT(weight), AT(bias),
                          AT(weight_count), AT(bias_count)});
}
std::string attention() {
  using Struct = kg_attention;
  return line("kg_attention",
              {sizeof(Struct), AT(layer), AT(num_heads), AT(num_kv_heads), AT(head_dim),
               AT(rotary_half), AT(window), AT(qk_norm), AT(scale), AT(softcap), AT(eps),
               AT(qk_weight), AT(qk_count)});
}
std::string op() {
  using Struct = kg_op;
  return line("kg_op", {sizeof(Struct), AT(code), AT(in), AT(out), AT(index), AT(epilogue),
                        AT(activation), AT(selected), AT(alpha), AT(bound), AT(params)});
}
std::string buffer() {
  using Struct = kg_buffer;
  return line("kg_buffer", {sizeof(Struct), AT(columns), AT(item_size), AT(is_replicated)});
}
std::string batch() {
  using Struct = kg_batch;
  return line("kg_batch",
              {sizeof(Struct), AT(num_tokens), AT(num_sequences), AT(num_decodes), AT(table_width),
               AT(input_ids), AT(positions), AT(block_tables), AT(query_lens), AT(kv_lens),
               AT(keys), AT(values), AT(block_size), AT(logits), AT(selected), AT(rows)});
}
std::string decodes() {
  using Struct = kg_decodes;
  return line("kg_decodes", {sizeof(Struct), AT(batch), AT(ids), AT(positions), AT(kv_lens),
                             AT(logprobs), AT(vocab_size), AT(sampling_ns)});
}

std::string enums() {
  return line("kind", {KG_BF16, KG_INT8, KG_INT4, KG_FLOAT8, KG_GROUPED8}) +
         line("code", {KG_EMBED, KG_ROPE, KG_NORM, KG_ADD_NORM, KG_LINEAR, KG_WRITE, KG_ATTEND,
                       KG_QUANTIZE, KG_SELECT}) +
         line("epilogue", {KG_STORE_FLOAT, KG_STORE_BF16, KG_ADD, KG_GATED}) +
         line("activation", {KG_NO_ACTIVATION, KG_SILU, KG_GELU, KG_GELU_TANH, KG_RELU, KG_SOFTCAP}) +
         line("norm kind", {KG_ROUND, KG_RMS, KG_LAYER_NORM}) +
         line("qk norm", {KG_NO_QK_NORM, KG_NORM_HEADS, KG_NORM_ALL}) + line("logits", {KG_LOGITS}) +
         line("scratch bytes", {kg::kScratchBytes});
}

}  // namespace

extern "C" const char* kg_layout(void) {
  static const std::string text = span() + rows() + refusal() + linear() +
                                  quantize() + embedding() + rope() + norm() +
                                  attention() + op() + buffer() + batch() + decodes() + enums();
  return text.c_str();
}
