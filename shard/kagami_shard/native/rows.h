// Which row of a weight lies where in its panels.
#pragma once
#include "panel.h"

namespace kg {

// The row of the weight that lies at row `packed` of the panels; -1: padding.
inline int64_t source_row(int64_t packed, int64_t rows, bool gated) {
  if (!gated) return packed < rows ? packed : -1;
  const int64_t panel = packed / kPanel, lane = packed % kPanel;
  const int64_t index = panel * kBlock + lane % kBlock;
  if (index >= rows / 2) return -1;
  return lane < kBlock ? index : rows / 2 + index;
}

}  // namespace kg
