// Weights stored as codes, times bf16 activations. Codes become bf16 numbers in registers, without
// rounding; a group's products are summed, and its scale and zero come in once for all columns:
// sum((code - zero) * scale * x) = scale * (sum(code * x) - zero * sum(x)).
//
// A *form* says how codes lie in memory and what they are. It is made once a panel, with its
// look-up tables in registers, and has
//   kHeaderBytes, kStepBytes   of a group, and of 32 columns of a block
//   kHasZeros                  or all are 0
//   kOffset                    what codes_at's numbers are larger than the codes
//   scales_at, zeros_at        of the 16 outputs, from a group's header
//   kAtOnce, codes_at(step, i) bf16, [16 outputs][2], of kAtOnce pairs of columns: i and those
//                              kPairs / kAtOnce, twice as many, ... further on
#pragma once
#include "quantized.h"
#include "simd.h"

namespace kg {

constexpr int kPairs = kDepth / 2;  // of columns, in a step

// Up to so many rows the memory is the limit. A line comes into the first cache in time if it is
// asked for so many bytes ahead (measured: 32.4 GB/s with it, 30.5 without, reading alone 34).
constexpr int kRowsInStream = 2, kAhead = 1024;

template <int kCount>
struct Codes {
  __m512bh pairs[kCount];
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

template <class Form>
__m512 numbers_zeros(const char* header) {
  const __m512 zeros = Form::zeros_at(header);
  return Form::kOffset ? _mm512_add_ps(zeros, _mm512_set1_ps(Form::kOffset)) : zeros;
}

template <class Form, int kRows>
void multiply_block(const Form& form, const CodePanel& panel, const char* block,
                    const char* next, float* out) {
  // Sums of a row that need not wait for one another.
  constexpr int kSums = kRows <= 2 ? Form::kAtOnce : 2;
  constexpr int kApart = kPairs / Form::kAtOnce;
  const kg_linear& layer = *panel.layer;
  const int64_t groups = num_groups(layer), headers = header_bytes_of(layer);
  __m512 total[kRows];
  each<kRows>([&](int r) KG_INLINE { total[r] = _mm512_setzero_ps(); });
  const kg_bf16* x = panel.x;
  const char *header = block, *codes = block + headers;
  const char* next_header = next;
  const char* next_codes = next ? next + headers : nullptr;
  for (int64_t group = 0; group < groups; group++, header += Form::kHeaderBytes) {
    const int64_t steps = num_steps(layer, group);
    __m512 sum[kRows * kSums];
    each<kRows * kSums>([&](int i) KG_INLINE { sum[i] = _mm512_setzero_ps(); });
    for (int64_t step = 0; step < steps; step++, codes += Form::kStepBytes, x += kDepth) {
      if (next)
        for (int line = 0; line < Form::kStepBytes / 64; line++, next_codes += 64)
          _mm_prefetch(next_codes, _MM_HINT_T1);
      if constexpr (kRows <= kRowsInStream)
        for (int line = 0; line < Form::kStepBytes; line += 64)
          _mm_prefetch(codes + kAhead + line, _MM_HINT_T0);
      for (int i = 0; i < kApart; i++) {
        const auto numbers = form.codes_at(codes, i);
        each<Form::kAtOnce>([&](int j) KG_INLINE {
          each<kRows>([&](int r) KG_INLINE {
            const __m512bh pair = pair_at(x + r * panel.x_stride + (i + j * kApart) * 2);
            __m512& to = sum[r * kSums + j % kSums];
            to = _mm512_dpbf16_ps(to, pair, numbers.pairs[j]);
          });
        });
      }
    }
    if (next) {
      next_header += Form::kHeaderBytes;
      for (int line = 0; line * 64 < Form::kHeaderBytes; line++)
        _mm_prefetch(next_header - 1 - line * 64, _MM_HINT_T1);
    }
    const __m512 scale = Form::scales_at(header);
    __m512 zeros;
    if constexpr (Form::kHasZeros) zeros = numbers_zeros<Form>(header);
    each<kRows>([&](int r) KG_INLINE {
      const __m512* sums = sum + r * kSums;
      __m512 product = _mm512_add_ps(sums[0], sums[1]);
      if constexpr (kSums == 4)
        product = _mm512_add_ps(product, _mm512_add_ps(sums[2], sums[3]));
      if constexpr (Form::kHasZeros) {
        const __m512 of_x = _mm512_set1_ps(panel.sums[r * groups + group]);
        product = _mm512_fnmadd_ps(zeros, of_x, product);
      }
      total[r] = _mm512_fmadd_ps(scale, product, total[r]);
    });
  }
  each<kRows>([&](int r) KG_INLINE { _mm512_storeu_ps(out + r * kPanel, total[r]); });
}

template <class Form, int kRows>
void multiply_panel(const CodePanel& panel) {
  const Form form;
  const int64_t block_bytes = code_block_bytes(*panel.layer);
  const char *first = panel.weight, *next = panel.next;
  multiply_block<Form, kRows>(form, panel, first, next, panel.out);
  multiply_block<Form, kRows>(form, panel, first + block_bytes, next ? next + block_bytes : nullptr,
                              panel.out + kBlock);
}

template <class Form>
void multiply_codes(const CodePanel& panel) {
  static constexpr void (*kByRows[kCodeRows])(const CodePanel&) = {
      multiply_panel<Form, 1>, multiply_panel<Form, 2>, multiply_panel<Form, 3>,
      multiply_panel<Form, 4>, multiply_panel<Form, 5>, multiply_panel<Form, 6>,
      multiply_panel<Form, 7>, multiply_panel<Form, 8>};
  kByRows[panel.rows - 1](panel);
}

// (numbers - zeros) * scales, rounded to bf16; `numbers` are [16 outputs][2], zeros and scales are
// of the outputs.
template <class Form>
inline __m512i value_of(__m512bh numbers, __m512 zeros, __m512 scales) {
  const __m512i bits = (__m512i)numbers;
  __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
  if constexpr (Form::kHasZeros) {
    even = _mm512_sub_ps(even, zeros);
    odd = _mm512_sub_ps(odd, zeros);
  }
  const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, scales),
                                                     _mm512_mul_ps(even, scales));
  alignas(64) static constexpr uint16_t kInTurn[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), apart);
}

// Some steps of a panel as panel.h wants them, every weight rounded to bf16.
template <class Form>
void unpack_codes(const kg_linear& weight, const char* packed, Part steps, kg_bf16* panel) {
  const Form form;
  constexpr int kApart = kPairs / Form::kAtOnce;
  const int64_t headers = header_bytes_of(weight), block_bytes = code_block_bytes(weight);
  const int64_t group_steps = std::max(1, weight.group / kDepth);
  for (int block = 0; block < kPanel / kBlock; block++, packed += block_bytes) {
    const char* codes = packed + headers + steps.begin * Form::kStepBytes;
    for (int64_t step = steps.begin; step < steps.end;
         step++, codes += Form::kStepBytes, panel += kBlock * kDepth) {
      const char* header = packed + step / group_steps * Form::kHeaderBytes;
      const __m512 scales = Form::scales_at(header);
      __m512 zeros;
      if constexpr (Form::kHasZeros) zeros = numbers_zeros<Form>(header);
      for (int i = 0; i < kApart; i++) {
        const auto numbers = form.codes_at(codes, i);
        for (int j = 0; j < Form::kAtOnce; j++)
          _mm512_storeu_si512(panel + (i + j * kApart) * 32,
                              value_of<Form>(numbers.pairs[j], zeros, scales));
      }
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
