// 4-bit weights times bf16 activations: codes become whole bf16 numbers by a look-up, a group's
// products are summed, and the group's scale and zero come in once for all its columns:
// sum((code - zero) * scale * x) = scale * (sum(code * x) - zero * sum(x)).
#include "quantized.h"
#include "simd.h"

namespace kg {
namespace {

constexpr int kHalfPairs = kDepth / 4;  // pairs of columns whose codes lie in the low halves

// bf16 of 0 to 15, twice: `vpermw` looks at five bits, and the fifth is another code's.
inline __m512i code_table() {
  alignas(64) kg_bf16 table[32];
  for (int i = 0; i < 32; i++) {
    const float value = (float)(i % 16);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    table[i] = (kg_bf16)(bits >> 16);
  }
  return _mm512_load_si512(table);
}

struct Codes {  // of pair p of columns, and of pair p + kHalfPairs: [16 outputs][2] bf16
  __m512bh low, high;
};

inline Codes codes_at(const char* step, int pair, __m512i table) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)(step + pair * 32));
  const __m512i words = _mm512_cvtepu8_epi16(bytes);
  return {(__m512bh)_mm512_permutexvar_epi16(words, table),
          (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table)};
}

inline __m512 halves_at(const char* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

inline __m512bh pair_at(const kg_bf16* x) {
  int32_t pair;
  memcpy(&pair, x, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

template <int kRows>
void multiply_block(const Int4Panel& panel, const char* block, float* out) {
  const kg_linear& layer = *panel.layer;
  const int64_t groups = num_groups(layer);
  const __m512i table = code_table();
  __m512 total[kRows];
  for (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  const kg_bf16* x = panel.x;
  const char* next = panel.next;
  for (int64_t group = 0; group < groups; group++) {
    const __m512 scale = halves_at(block), zero = halves_at(block + 32);
    block += kGroupHeader;
    const int64_t steps = num_steps(layer, group);
    __m512 sum[kRows], other[kRows];  // two, so that one product need not wait for the other
    for (int r = 0; r < kRows; r++) sum[r] = other[r] = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++, block += kStepBytes, x += kDepth) {
      if (next)
        for (int line = 0; line < 5; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      for (int pair = 0; pair < kHalfPairs; pair++) {
        const Codes codes = codes_at(block, pair, table);
        for (int r = 0; r < kRows; r++) {
          const kg_bf16* row = x + r * panel.x_stride + pair * 2;
          sum[r] = _mm512_dpbf16_ps(sum[r], pair_at(row), codes.low);
          other[r] = _mm512_dpbf16_ps(other[r], pair_at(row + kDepth / 2), codes.high);
        }
      }
    }
    for (int r = 0; r < kRows; r++) {
      const __m512 of_x = _mm512_set1_ps(panel.sums[r * groups + group]);
      const __m512 product = _mm512_fnmadd_ps(zero, of_x, _mm512_add_ps(sum[r], other[r]));
      total[r] = _mm512_fmadd_ps(scale, product, total[r]);
    }
  }
  for (int r = 0; r < kRows; r++) _mm512_storeu_ps(out + r * kPanel, total[r]);
}

template <int kRows>
void multiply(const Int4Panel& panel) {
  const int64_t block_bytes = int4_block_bytes(*panel.layer);
  multiply_block<kRows>(panel, panel.weight, panel.out);
  Int4Panel second = panel;
  if (second.next) second.next += block_bytes;
  multiply_block<kRows>(second, panel.weight + block_bytes, panel.out + kBlock);
}

}  // namespace

void panel_int4(const Int4Panel& panel) {
  static constexpr void (*kByRows[kInt4Rows])(const Int4Panel&) = {
      multiply<1>, multiply<2>, multiply<3>, multiply<4>,
      multiply<5>, multiply<6>, multiply<7>, multiply<8>};
  kByRows[panel.rows - 1](panel);
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

// A panel as panel.h wants it, every weight rounded to bf16.
void unpack_int4(const kg_linear& weight, const char* packed, kg_bf16* panel) {
  const __m512i table = code_table();
  const int64_t groups = num_groups(weight);
  // Each output's scale and zero for both of its columns of a pair.
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i twice_upper = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
  for (int64_t group = 0; group < kPanel / kBlock * groups; group++) {
    const __m512 scale = halves_at(packed), zero = halves_at(packed + 32);
    const __m512 scales[2] = {_mm512_permutexvar_ps(twice, scale),
                              _mm512_permutexvar_ps(twice_upper, scale)};
    const __m512 zeros[2] = {_mm512_permutexvar_ps(twice, zero),
                             _mm512_permutexvar_ps(twice_upper, zero)};
    const auto value = [&](__m512bh codes, int half) {
      const __m256i bits = half ? _mm512_extracti64x4_epi64((__m512i)codes, 1)
                                : _mm512_castsi512_si256((__m512i)codes);
      return _mm512_mul_ps(_mm512_sub_ps(widen(bits), zeros[half]), scales[half]);
    };
    const auto store = [&](kg_bf16* to, __m512bh codes) {
      store_bf16(to, value(codes, 0));
      store_bf16(to + kLanes, value(codes, 1));
    };
    packed += kGroupHeader;
    const int64_t steps = num_steps(weight, group % groups);
    for (int64_t step = 0; step < steps; step++, packed += kStepBytes, panel += kBlock * kDepth)
      for (int pair = 0; pair < kHalfPairs; pair++) {
        const Codes codes = codes_at(packed, pair, table);
        store(panel + pair * 32, codes.low);
        store(panel + (pair + kHalfPairs) * 32, codes.high);
      }
  }
}

}  // namespace kg
