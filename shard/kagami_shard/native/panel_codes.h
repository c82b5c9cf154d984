// Weights kept as codes, times bf16 activations. Codes become bf16 numbers in registers, without
// rounding; a group's products are summed, and its scale and zero come in once for all columns:
// sum((code - zero) * scale * x) = scale * (sum(code * x) - zero * sum(x)).
//
// A *form* says how codes lie in memory and what they are. It is made once a panel, with its
// look-up tables in registers, and has
//   kHeaderBytes, kStepBytes   of a group, and of 32 columns of a block
//   kHasZeros                  or all are 0
//   scales_at, zeros_at        of the 16 outputs, from a group's header
//   codes_at(step, pair)       bf16, [16 outputs][2], of columns 2 * pair and the one after it,
//                              and of those kDepth / 2 further on
#pragma once
#include "quantized.h"
#include "simd.h"

namespace kg {

constexpr int kHalfPairs = kDepth / 4;  // pairs of columns in half a step

struct Codes {
  __m512bh low, high;
};

struct alignas(64) Table {  // what `vpermw` finds by five bits
  kg_bf16 values[32];
  __m512i load() const { return _mm512_load_si512(values); }
};

// `whole` (below 256) times 2 to the power of `exponent`, exactly.
constexpr kg_bf16 bf16_of(int whole, int exponent) {
  if (!whole) return 0;
  for (; whole < 128; whole *= 2) exponent--;
  return (kg_bf16)((exponent + 7 + 127) << 7 | (whole & 127));
}

inline __m512bh pair_at(const kg_bf16* x) {
  int32_t pair;
  memcpy(&pair, x, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

template <class Form, int kRows>
void multiply_block(const Form& form, const CodePanel& panel, const char* block, float* out) {
  constexpr int kLines = (Form::kHeaderBytes + Form::kStepBytes) / 64;
  const kg_linear& layer = *panel.layer;
  const int64_t groups = num_groups(layer);
  __m512 total[kRows];
  for (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  const kg_bf16* x = panel.x;
  const char* next = panel.next;
  for (int64_t group = 0; group < groups; group++) {
    const char* header = block;
    block += Form::kHeaderBytes;
    const int64_t steps = num_steps(layer, group);
    __m512 sum[kRows], other[kRows];  // two, so that one product need not wait for the other
    for (int r = 0; r < kRows; r++) sum[r] = other[r] = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++, block += Form::kStepBytes, x += kDepth) {
      if (next)
        for (int line = 0; line < kLines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      for (int pair = 0; pair < kHalfPairs; pair++) {
        const Codes codes = form.codes_at(block, pair);
        for (int r = 0; r < kRows; r++) {
          const kg_bf16* row = x + r * panel.x_stride + pair * 2;
          sum[r] = _mm512_dpbf16_ps(sum[r], pair_at(row), codes.low);
          other[r] = _mm512_dpbf16_ps(other[r], pair_at(row + kDepth / 2), codes.high);
        }
      }
    }
    const __m512 scale = Form::scales_at(header);
    for (int r = 0; r < kRows; r++) {
      __m512 product = _mm512_add_ps(sum[r], other[r]);
      if constexpr (Form::kHasZeros) {
        const __m512 of_x = _mm512_set1_ps(panel.sums[r * groups + group]);
        product = _mm512_fnmadd_ps(Form::zeros_at(header), of_x, product);
      }
      total[r] = _mm512_fmadd_ps(scale, product, total[r]);
    }
  }
  for (int r = 0; r < kRows; r++) _mm512_storeu_ps(out + r * kPanel, total[r]);
}

template <class Form, int kRows>
void multiply_panel(const CodePanel& panel) {
  const Form form;
  const int64_t block_bytes = code_block_bytes(*panel.layer);
  multiply_block<Form, kRows>(form, panel, panel.weight, panel.out);
  CodePanel second = panel;
  if (second.next) second.next += block_bytes;
  multiply_block<Form, kRows>(form, second, panel.weight + block_bytes, panel.out + kBlock);
}

template <class Form>
void multiply_codes(const CodePanel& panel) {
  static constexpr void (*kByRows[kCodeRows])(const CodePanel&) = {
      multiply_panel<Form, 1>, multiply_panel<Form, 2>, multiply_panel<Form, 3>,
      multiply_panel<Form, 4>, multiply_panel<Form, 5>, multiply_panel<Form, 6>,
      multiply_panel<Form, 7>, multiply_panel<Form, 8>};
  kByRows[panel.rows - 1](panel);
}

// A panel as panel.h wants it, every weight rounded to bf16.
template <class Form>
void unpack_codes(const kg_linear& weight, const char* packed, kg_bf16* panel) {
  const Form form;
  const int64_t groups = num_groups(weight);
  // Each output's scale and zero for both of its columns of a pair.
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i twice_upper = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
  const auto for_pairs = [&](__m512 values, __m512* out) {
    out[0] = _mm512_permutexvar_ps(twice, values);
    out[1] = _mm512_permutexvar_ps(twice_upper, values);
  };
  for (int64_t group = 0; group < kPanel / kBlock * groups; group++) {
    __m512 scales[2], zeros[2];
    for_pairs(Form::scales_at(packed), scales);
    if constexpr (Form::kHasZeros) for_pairs(Form::zeros_at(packed), zeros);
    const auto value = [&](__m512bh codes, int half) {
      const __m256i bits = half ? _mm512_extracti64x4_epi64((__m512i)codes, 1)
                                : _mm512_castsi512_si256((__m512i)codes);
      __m512 result = widen(bits);
      if constexpr (Form::kHasZeros) result = _mm512_sub_ps(result, zeros[half]);
      return _mm512_mul_ps(result, scales[half]);
    };
    const auto store = [&](kg_bf16* to, __m512bh codes) {
      store_bf16(to, value(codes, 0));
      store_bf16(to + kLanes, value(codes, 1));
    };
    packed += Form::kHeaderBytes;
    const int64_t steps = num_steps(weight, group % groups);
    for (int64_t step = 0; step < steps;
         step++, packed += Form::kStepBytes, panel += kBlock * kDepth)
      for (int pair = 0; pair < kHalfPairs; pair++) {
        const Codes codes = form.codes_at(packed, pair);
        store(panel + pair * 32, codes.low);
        store(panel + (pair + kHalfPairs) * 32, codes.high);
      }
  }
}

template <class Form>
constexpr CodeForm form_of(int64_t max_rows) {
  return {Form::kHeaderBytes,   Form::kStepBytes,     Form::kHasZeros,
          max_rows,             multiply_codes<Form>, unpack_codes<Form>};
}

extern const CodeForm kInt4Form, kFloat8Form, kGrouped8Form;

}  // namespace kg
