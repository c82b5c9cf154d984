// AVX-512 pieces shared by the kernels: conversions and the few functions activations need.
#pragma once
#include <immintrin.h>
#include <string.h>

#include <initializer_list>
#include <utility>

#include "ops.h"

namespace kg {

constexpr int kLanes = 16;

// `body(0)` to `body(kCount - 1)`, written out, so that arrays they index are registers also where
// the compiler would not unroll a loop in time. The body is a lambda that is KG_INLINE.
#define KG_INLINE __attribute__((always_inline))
template <class Body, int... kIndices>
KG_INLINE inline void each_of(const Body& body, std::integer_sequence<int, kIndices...>) {
  (body(kIndices), ...);
}
template <int kCount, class Body>
KG_INLINE inline void each(const Body& body) {
  each_of(body, std::make_integer_sequence<int, kCount>());
}

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// The lowest `count` lanes; any count.
inline __mmask16 lanes(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

inline float to_float(kg_bf16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline __m512 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline __m512 load_bf16(const kg_bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512 load_bf16(const kg_bf16* p, __mmask16 mask) {
  return widen(_mm256_maskz_loadu_epi16(mask, p));
}
inline __m256i narrow(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }
inline void store_bf16(kg_bf16* p, __m512 value) { _mm256_storeu_si256((__m256i*)p, narrow(value)); }
inline void store_bf16(kg_bf16* p, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(p, mask, narrow(value));
}

// Adds a row's pair of bf16 times two blocks of 16 pairs. If full passes of rows keep the units busy,
// the pair is an operand in memory, which saves an instruction (measured: 1.00 cycles for each
// product against 1.02 at k = 256, 1.08 at 64, 1.10 at 32; chunks of 256 tokens take 3 % less). It is
// written as assembly because compilers make it a register. Few rows wait for memory, and wait longer
// that way (measured: 1 x 128 5.5 -> 6.3 ms).
template <bool kFromMemory>
inline void add_products(__m512 (&sums)[2], const kg_bf16* pair, __m512bh first, __m512bh second) {
  int32_t both;
  memcpy(&both, pair, 4);
#ifndef __SANITIZE_ADDRESS__  // which does not see what assembly reads
  if (kFromMemory) {
    const int32_t* from = (const int32_t*)pair;
    __asm__("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(sums[0]) : "m"(*from), "v"(first));
    __asm__("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(sums[1]) : "m"(*from), "v"(second));
    return;
  }
#endif
  const __m512bh shared = (__m512bh)_mm512_set1_epi32(both);
  sums[0] = _mm512_dpbf16_ps(sums[0], shared, first);
  sums[1] = _mm512_dpbf16_ps(sums[1], shared, second);
}

// exp with a relative error under 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN,
// because min and max give their second operand then.
inline __m512 exp(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), _mm512_max_ps(_mm512_set1_ps(-104.f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.f / 720);
  for (float coefficient : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(p, n);
}

// Loops over arrays that are to stay in registers.
#define KG_UNROLL _Pragma("GCC unroll 16")

// 2^x of weights that become bf16, x below 128: relative error under 1e-4; what is smaller than
// 2^-126 becomes a subnormal number, which bf16 takes for 0. NaN stays NaN. Beside products, which
// leave the adders and shifters idle, only its three multiplications take time. Step by step for
// all of them, so that one need not wait for another.
template <int kCount>
inline void powers_of_2(__m512 (&x)[kCount]) {
  const __m512 magic = _mm512_set1_ps(12582912.f);  // 1.5 * 2^23: its last bit counts whole numbers
  __m512 whole[kCount], p[kCount];
  KG_UNROLL for (int i = 0; i < kCount; i++) x[i] = _mm512_max_ps(_mm512_set1_ps(-126.f), x[i]);
  KG_UNROLL for (int i = 0; i < kCount; i++) whole[i] = _mm512_add_ps(x[i], magic);
  KG_UNROLL for (int i = 0; i < kCount; i++)
    x[i] = _mm512_sub_ps(x[i], _mm512_sub_ps(whole[i], magic));
  KG_UNROLL for (int i = 0; i < kCount; i++) p[i] = _mm512_set1_ps(0.055171670f);
  for (float coefficient : {0.242611125f, 0.693260986f, 0.999928073f})
    KG_UNROLL for (int i = 0; i < kCount; i++)
      p[i] = _mm512_fmadd_ps(p[i], x[i], _mm512_set1_ps(coefficient));
  KG_UNROLL for (int i = 0; i < kCount; i++) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole[i]), 23);
    x[i] = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p[i]), exponent));
  }
}

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline __m512 tanh(__m512 x) {  // 2 sigmoid(2x) - 1
  const __m512 two = _mm512_set1_ps(2.f);
  return _mm512_fmsub_ps(two, sigmoid(_mm512_mul_ps(two, x)), _mm512_set1_ps(1.f));
}

// Abramowitz and Stegun 7.1.26: absolute error under 1.5e-7.
inline __m512 erf(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f), size = _mm512_abs_ps(x);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  for (float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(coefficient));
  const __m512 tail = exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(size, size)));
  const __m512 result = _mm512_fnmadd_ps(_mm512_mul_ps(p, t), tail, one);
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_sub_ps(result, negative, _mm512_setzero_ps(), result);
}

inline __m512 activate(int activation, __m512 x, float bound) {
  const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.f);
  switch (activation) {
    case KG_SILU:
      return _mm512_mul_ps(x, sigmoid(x));
    case KG_GELU: {
      const __m512 inner = erf(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
      return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, inner));
    }
    case KG_GELU_TANH: {  // x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
      const __m512 square = _mm512_mul_ps(x, x);
      const __m512 cubic = _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), one);
      const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.5957691216f));
      return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(scaled, cubic)));
    }
    case KG_RELU:
      return _mm512_max_ps(_mm512_setzero_ps(), x);
    case KG_SOFTCAP: {
      const __m512 cap = _mm512_set1_ps(bound);
      return _mm512_mul_ps(cap, tanh(_mm512_div_ps(x, cap)));
    }
    default:
      return x;
  }
}

// What becomes bf16 needs no more than this: silu's relative error is under 2e-4.
inline __m512 activate_to_bf16(int activation, __m512 x, float bound) {
  if (activation != KG_SILU) return activate(activation, x, bound);
  __m512 power[1] = {
      _mm512_min_ps(_mm512_set1_ps(127.f), _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504089f)))};
  powers_of_2(power);
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(power[0], _mm512_set1_ps(1.f))));
}

// 16 rows of 16 x 32 bits become 16 columns.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = 0; i < 4; i++) {
      t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
      t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace kg
