// How large packed weights and their panels are.
#include "quantized.h"

namespace kg {

bool is_weight(const kg_linear& layer) {
  if (layer.kind < KG_BF16 || layer.kind > KG_GROUPED8) return false;
  if (layer.rows < 1 || layer.rows > kMostRows) return false;
  if (layer.columns < 1 || layer.columns > kMostRows) return false;
  return !code_form(layer.kind) || (layer.group > 0 && layer.group % kDepth == 0);
}

int64_t depth_of(const kg_linear& weight) {
  switch (weight.kind) {
    case KG_INT8:
      return round_up(weight.columns, kDepth8);
    default:
      return round_up(weight.columns, kDepth);
  }
}

int64_t panel_bytes_of(const kg_linear& weight) {
  switch (weight.kind) {
    case KG_INT8:
      return kPanel * (depth_of(weight) + 8);
    case KG_BF16:
      return kPanel * depth_of(weight) * 2;
    default:
      return kPanel / kBlock * code_block_bytes(weight);
  }
}

}  // namespace kg

using namespace kg;

extern "C" int64_t kg_padded_rows(int64_t rows, int gated) {
  return gated ? 2 * round_up(rows / 2, kBlock) : round_up(rows, kPanel);
}

extern "C" int64_t kg_packed_bytes(const kg_linear* layer) {
  if (!is_weight(*layer)) return -1;
  // Gate and up are padded apart from one another, which may take a block more.
  return round_up(layer->rows + kPanel, kPanel) / kPanel * panel_bytes_of(*layer);
}
