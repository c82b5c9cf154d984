// Sizes against memory: what keeps a replay within its buffers, whatever it was recorded from.
#include "checks.h"

#include "quantized.h"
#include "step.h"

namespace kg {

bool has_room(const kg_linear& layer, bool gated) {
  if (!is_weight(layer) || !layer.weight || (gated && layer.rows % 2)) return false;
  return layer.weight_bytes >= kg_padded_rows(layer.rows, gated) / kPanel * panel_bytes_of(layer);
}

bool is_array(const kg_span& span, int64_t item_size, int64_t rows, int64_t columns) {
  return span.data && span.bytes == item_size * rows * columns;
}

bool are_rows_of(const kg_linear& layer, const kg_rows* parts, int num_parts) {
  int64_t rows = 0;
  for (int i = 0; i < num_parts; i++) {
    const kg_rows& part = parts[i];
    if (!part.first || part.rows < 1 || part.rows > kMostRows) return false;
    if (part.columns != layer.columns || part.stride < part.columns) return false;
    if (part.stride > kMostRows) return false;
    if (((part.rows - 1) * part.stride + part.columns) * 2 > part.bytes) return false;
    rows += part.rows;
  }
  return rows == layer.rows;
}

namespace {

constexpr int64_t kMaxHeadDim = 256, kMaxGroup = 64;  // what attention.cpp has room for

class Check {
 public:
  Check(const Recorded& tape, const kg_op& op, bool has_selected)
      : tape_(tape), op_(op), has_selected_(has_selected) {}

  const char* run() const {
    if (op_.code < 0 || op_.code >= KG_NUM_CODES) return "there is no such op";
    if (!op_.params && op_.code != KG_SELECT) return "it has no parameters";
    if (op_.selected != has_selected_) return "it is on the wrong side of KG_SELECT";
    switch (op_.code) {
      case KG_EMBED:
        return check_embed(*(const kg_embedding*)op_.params);
      case KG_ROPE:
        return check_rope(*(const kg_rope*)op_.params);
      case KG_NORM:
      case KG_ADD_NORM:
        return check_norm(*(const kg_norm*)op_.params);
      case KG_QUANTIZE:
        return check_quantize(*(const kg_quantize*)op_.params);
      case KG_LINEAR:
        return check_linear(*(const kg_linear*)op_.params);
      case KG_WRITE:
        return check_write(*(const kg_attention*)op_.params);
      case KG_ATTEND:
        return check_attend(*(const kg_attention*)op_.params);
      default:
        return check_select();
    }
  }

 private:
  bool has(int32_t buffer, int64_t columns, int32_t item_size) const {
    if (buffer < 0 || buffer >= tape_.num_buffers) return false;
    const kg_buffer& found = tape_.buffers[buffer];
    return found.item_size == item_size && found.columns == columns;
  }

  const char* check_embed(const kg_embedding& table) const {
    if (table.rows < 1 || table.width < 1 || !table.weight) return "its table is empty";
    const int64_t row = table.is_packed ? round_up(table.width, kDepth) : table.width;
    const int64_t rows = table.is_packed ? round_up(table.rows, kPanel) : table.rows;
    if (table.weight_bytes < rows * row * 2) return "its table is shorter than its rows";
    return has(op_.out, table.width, 4) ? nullptr : "its output has another width than its table";
  }

  const char* check_rope(const kg_rope& rope) const {
    if (rope.half < 1 || rope.count < rope.half || !rope.frequencies)
      return "it has fewer frequencies than it says";
    return has(op_.out, 2 * (int64_t)rope.half, 4) ? nullptr : "its output has another width";
  }

  const char* check_norm(const kg_norm& norm) const {
    if (norm.kind < KG_ROUND || norm.kind > KG_LAYER_NORM) return "there is no such norm";
    if (norm.weight && norm.weight_count != norm.width) return "its weight has another width";
    if (norm.bias && norm.bias_count != norm.width) return "its bias has another width";
    const int32_t item_size = op_.code == KG_NORM ? 2 : 4;
    if (!has(op_.in, norm.width, 4)) return "its input has another width";
    return has(op_.out, norm.width, item_size) ? nullptr : "its output has another width";
  }

  const char* check_quantize(const kg_quantize& how) const {
    const int64_t columns = how.columns, block = how.hadamard_block;
    if (columns < 1 || round_up(columns, kLanes) * 4 > kScratchBytes) return "it has too many columns";
    if (block < 1 || block & (block - 1) || columns % block) return "its blocks do not divide its columns";
    if (!has(op_.in, columns, 2)) return "its input has another width";
    return has(op_.out, round_up(columns, kDepth8) + 64, 1) ? nullptr : "its output has another width";
  }

  const char* check_linear(const kg_linear& layer) const {
    const bool gated = op_.epilogue == KG_GATED;
    if (op_.epilogue < KG_STORE_FLOAT || op_.epilogue > KG_GATED) return "there is no such epilogue";
    if (!has_room(layer, gated)) return "its weight is shorter than its sizes say";
    if (layer.bias && layer.bias_count < kg_padded_rows(layer.rows, gated))
      return "its bias is shorter than its rows";
    if (!reads(layer)) return "its input has another width than its weight";
    if (op_.out == KG_LOGITS) {
      const bool fits = op_.epilogue == KG_STORE_FLOAT && layer.rows == tape_.vocab_size;
      return fits ? nullptr : "its rows are not those of the logits";
    }
    const bool is_float = op_.epilogue == KG_STORE_FLOAT || op_.epilogue == KG_ADD;
    if (!has(op_.out, gated ? layer.rows / 2 : layer.rows, is_float ? 4 : 2))
      return "its output has another width than its weight";
    return nullptr;
  }

  bool reads(const kg_linear& layer) const {
    if (op_.in < 0 || op_.in >= tape_.num_buffers) return false;
    const kg_buffer& in = tape_.buffers[op_.in];
    if (layer.kind != KG_INT8) return in.item_size == 2 && in.columns == layer.columns;
    return in.item_size == 1 && in.columns == round_up(layer.columns, kDepth8) + 64;
  }

  static bool is_attention(const kg_attention& spec) {
    if (spec.layer < 0 || spec.window < 0) return false;
    if (spec.num_kv_heads < 1 || spec.num_heads < 1 || spec.num_heads % spec.num_kv_heads) return false;
    if (spec.num_heads / spec.num_kv_heads > kMaxGroup) return false;
    if (spec.head_dim < 2 || spec.head_dim > kMaxHeadDim || spec.head_dim % 2) return false;
    return spec.rotary_half >= 1 && spec.rotary_half <= spec.head_dim / 2;
  }

  const char* check_write(const kg_attention& spec) const {
    if (!is_attention(spec)) return "there is no such attention";
    const int64_t normed = ((int64_t)spec.num_heads + spec.num_kv_heads) * spec.head_dim;
    if (spec.qk_norm < KG_NO_QK_NORM || spec.qk_norm > KG_NORM_ALL) return "there is no such norm";
    if (spec.qk_norm != KG_NO_QK_NORM && (!spec.qk_weight || spec.qk_count != normed))
      return "the norm of its heads has another width";
    const int64_t width = normed + (int64_t)spec.num_kv_heads * spec.head_dim;
    if (op_.in != op_.out || !has(op_.in, width, 4)) return "its heads have another width";
    return has(op_.index, 2 * (int64_t)spec.rotary_half, 4) ? nullptr : "its rope has another width";
  }

  const char* check_attend(const kg_attention& spec) const {
    if (!is_attention(spec)) return "there is no such attention";
    const int64_t width = (int64_t)spec.num_heads * spec.head_dim;
    const int64_t keys_values = 2 * (int64_t)spec.num_kv_heads * spec.head_dim;
    if (!has(op_.in, width + keys_values, 4)) return "its queries have another width";
    return has(op_.out, width, 2) ? nullptr : "its output has another width";
  }

  const char* check_select() const {
    if (op_.in < 0 || op_.in >= tape_.num_buffers) return "its input is no buffer";
    const kg_buffer& in = tape_.buffers[op_.in];
    return has(op_.out, in.columns, in.item_size) ? nullptr : "its output is another kind of buffer";
  }

  const Recorded& tape_;
  const kg_op& op_;
  const bool has_selected_;
};

}  // namespace

kg_refusal refused_op(const Recorded& tape) {
  for (int64_t i = 0; i < tape.num_buffers; i++)
    if (tape.buffers[i].columns < 1 || tape.buffers[i].columns > kMostRows)
      return {0, "a buffer has no size"};
  bool has_selected = false;
  for (int64_t i = 0; i < tape.num_ops; i++) {
    has_selected |= tape.ops[i].code == KG_SELECT;
    if (const char* reason = Check(tape, tape.ops[i], has_selected).run())
      return {(int32_t)i, reason};
  }
  return {-1, nullptr};
}

}  // namespace kg
