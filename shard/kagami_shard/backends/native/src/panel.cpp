#include "panel.h"

#include <algorithm>

#include "simd.h"

namespace kg {
namespace {

// With more rows than kFewRows the units limit a step as much as the memory does. A line that was
// fetched for this panel is then asked for again so many pairs of k ahead, into the first cache
// (measured: a step of 16 rows of a 1B 83.9 -> 82.2 ms; 79.6 -> 79.2 where the memory is fast; one
// row loses 1.5 %).
constexpr int64_t kPairsAhead = 32;

// Lines of `next` are asked for in each pair of k: they arrive while this panel is computed, so that
// a second pass over the panel's rows does not leave the memory idle (measured: 13.3 -> 9.5 ms for
// 16 rows of a 268 MB weight on two Zen 4 cores, 0.95 of what the units can multiply).
template <int kRows, int kFetching>
void multiply(const Panel& panel) {
  __m512 sum[kRows][2];
  KG_UNROLL for (int r = 0; r < kRows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  if (panel.adds)
    KG_UNROLL for (int r = 0; r < kRows; r++) {
      sum[r][0] = _mm512_loadu_ps(panel.out + r * panel.out_stride);
      sum[r][1] = _mm512_loadu_ps(panel.out + r * panel.out_stride + kBlock);
    }
  const kg_bf16 *first = panel.weight, *second = panel.weight + panel.block_stride;
  const kg_bf16* x = panel.x;
  const int64_t stride = panel.x_stride, pairs = panel.k / 2;
  const char* next = panel.next;
  for (int64_t i = 0; i < pairs; i++) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(first + i * 32);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(second + i * 32);
    next = fetch<kFetching>(next, i);
    if constexpr (kFetching && kRows > kFewRows) {
      _mm_prefetch((const char*)(first + (i + kPairsAhead) * 32), _MM_HINT_T0);
      _mm_prefetch((const char*)(second + (i + kPairsAhead) * 32), _MM_HINT_T0);
    }
    KG_UNROLL for (int r = 0; r < kRows; r++)
      add_products<kRows == kAvx512Rows>(sum[r], x + r * stride + i * 2, w0, w1);
  }
  KG_UNROLL for (int r = 0; r < kRows; r++) {
    _mm512_storeu_ps(panel.out + r * panel.out_stride, sum[r][0]);
    _mm512_storeu_ps(panel.out + r * panel.out_stride + kBlock, sum[r][1]);
  }
}

template <int kRows>
void multiply_rows(const Panel& panel) {
  with_fetching<kRows>(panel.next, panel.next_lines, panel.k / 2, [&](auto fetching) {
    multiply<kRows, decltype(fetching)::value>(panel);
  });
}

}  // namespace

void panel_avx512(const Panel& panel) {
  static constexpr PanelKernel kByRows[kAvx512Rows] = {
      multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,
      multiply_rows<5>, multiply_rows<6>, multiply_rows<7>, multiply_rows<8>};
  kByRows[panel.rows - 1](panel);
}

}  // namespace kg
