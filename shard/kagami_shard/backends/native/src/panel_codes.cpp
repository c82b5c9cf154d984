// Which form of codes a kind of weight has, and the sums of activations that zeros are taken off of.
#include "panel_codes.h"

namespace kg {

const CodeForm* code_form(int kind) {
  switch (kind) {
    case KG_INT4:
      return &kInt4Form;
    case KG_FLOAT8:
      return &kFloat8Form;
    case KG_GROUPED8:
      return &kGrouped8Form;
    default:
      return nullptr;
  }
}

void sum_groups(const kg_linear& weight, const kg_bf16* x, int64_t x_stride, int rows, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const int64_t groups = num_groups(weight);
  for (int r = 0; r < rows; r++)
    for (int64_t group = 0; group < groups; group++) {
      __m512 sum = _mm512_setzero_ps();
      const int64_t end = std::min<int64_t>(weight.columns, (group + 1) * weight.group);
      for (int64_t i = group * weight.group; i < end; i += kDepth) {
        const __mmask32 mask = end - i >= kDepth ? ~0u : (1u << (end - i)) - 1;
        const __m512i values = _mm512_maskz_loadu_epi16(mask, x + r * x_stride + i);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)values, ones);
      }
      sums[r * groups + group] = _mm512_reduce_add_ps(sum);
    }
}

}  // namespace kg
