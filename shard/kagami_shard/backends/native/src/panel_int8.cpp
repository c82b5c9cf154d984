// 8-bit weights times 8-bit activations on the vector unit, and the rounding of activations.
#include <math.h>

#include "quantized.h"
#include "simd.h"

namespace kg {
namespace {

inline __m512i four(const uint8_t* p) {
  int32_t value;
  memcpy(&value, p, 4);
  return _mm512_set1_epi32(value);
}

template <int kRows, int kFetching>
void multiply(const Int8Panel& panel) {
  const char* first = panel.weight;
  const char* second = first + kBlock * panel.depth;
  const float* scales = (const float*)(first + kPanel * panel.depth);
  const int32_t* offsets = (const int32_t*)(scales + kPanel);
  __m512i sum[kRows][2];
  for (int r = 0; r < kRows; r++) {
    sum[r][0] = _mm512_loadu_si512(offsets);
    sum[r][1] = _mm512_loadu_si512(offsets + kBlock);
  }
  const char* next = panel.next;
  for (int64_t i = 0; i < panel.depth; i += 4) {
    const __m512i w0 = _mm512_loadu_si512(first + i * kBlock);
    const __m512i w1 = _mm512_loadu_si512(second + i * kBlock);
    next = fetch<kFetching>(next, i / 4);
    for (int r = 0; r < kRows; r++) {
      const __m512i x = four(panel.x + r * panel.x_stride + i);
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], x, w0);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], x, w1);
    }
  }
  for (int r = 0; r < kRows; r++) {
    float scale;
    memcpy(&scale, panel.x + r * panel.x_stride + panel.depth, 4);
    for (int half = 0; half < 2; half++) {
      const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][half]), _mm512_set1_ps(scale));
      _mm512_storeu_ps(panel.out + r * kPanel + half * kBlock,
                       _mm512_mul_ps(y, _mm512_loadu_ps(scales + half * kBlock)));
    }
  }
}

template <int kRows>
void multiply_rows(const Int8Panel& panel) {
  with_fetching<kRows>(panel.next, panel.next_lines, panel.depth / 4, [&](auto fetching) {
    multiply<kRows, decltype(fetching)::value>(panel);
  });
}

// One round of sums and differences of lanes `width` apart.
template <int kWidth>
inline __m512 rotate_lanes(__m512 x) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(kWidth)), x);
  const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(kWidth));
  return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

// quantization/int8.py's `rotated` in place; `x` is padded to 16.
void rotate(float* x, int64_t columns, int block) {
  if (block == 1) return;
  for (int64_t i = 0; i < columns; i += kLanes) {
    __m512 v = rotate_lanes<1>(_mm512_loadu_ps(x + i));
    if (block > 2) v = rotate_lanes<2>(v);
    if (block > 4) v = rotate_lanes<4>(v);
    if (block > 8) v = rotate_lanes<8>(v);
    _mm512_storeu_ps(x + i, v);
  }
  for (int64_t width = kLanes; width < block; width *= 2)
    for (int64_t start = 0; start < columns; start += 2 * width)
      for (int64_t i = start; i < start + width; i += kLanes) {
        const __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + i + width);
        _mm512_storeu_ps(x + i, _mm512_add_ps(low, high));
        _mm512_storeu_ps(x + i + width, _mm512_sub_ps(low, high));
      }
}

void quantize_row(const kg_quantize& how, const kg_bf16* in, float* x, uint8_t* out) {
  const int64_t columns = how.columns, depth = round_up(columns, kDepth8);
  for (int64_t i = 0; i < columns; i += kLanes)
    _mm512_storeu_ps(x + i, load_bf16(in + i, lanes(columns - i)));
  rotate(x, columns, how.hadamard_block);
  __m512 largest = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  for (int64_t i = 0; i < columns; i += kLanes) {
    const __m512 value = _mm512_loadu_ps(x + i);
    unordered |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
  }
  const float top = unordered ? NAN : _mm512_reduce_max_ps(largest);
  const float of_block = 1.f / sqrtf((float)how.hadamard_block);
  const float step = top == 0.f ? 1.f : top / 127.f;
  const __m512 scale = _mm512_set1_ps(step);
  const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127);
  for (int64_t i = 0; i < depth; i += kLanes) {
    const __m512 value = i < columns ? _mm512_loadu_ps(x + i) : _mm512_setzero_ps();
    __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(value, scale));
    code = _mm512_max_epi32(_mm512_min_epi32(code, most), least);
    code = _mm512_add_epi32(code, _mm512_set1_epi32(128));
    _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(code));
  }
  // What is not finite must not become a number: int8 has no other place for it.
  const float result = top * 0.f == 0.f ? step * of_block : NAN;
  memcpy(out + depth, &result, 4);
}

}  // namespace

void panel_int8(const Int8Panel& panel) {
  static constexpr void (*kByRows[kInt8Rows])(const Int8Panel&) = {
      multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,
      multiply_rows<5>, multiply_rows<6>, multiply_rows<7>, multiply_rows<8>};
  kByRows[panel.rows - 1](panel);
}

void finish_int8(const Int8Panel& panel, const int32_t* sums) {
  const float* scales = (const float*)(panel.weight + kPanel * panel.depth);
  const int32_t* offsets = (const int32_t*)(scales + kPanel);
  for (int r = 0; r < panel.rows; r++)
    for (int half = 0; half < kPanel; half += kBlock) {
      float scale;
      memcpy(&scale, panel.x + r * panel.x_stride + panel.depth, 4);
      const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(sums + r * kPanel + half),
                                           _mm512_loadu_si512(offsets + half));
      const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale));
      _mm512_storeu_ps(panel.out + r * kPanel + half,
                       _mm512_mul_ps(y, _mm512_loadu_ps(scales + half)));
    }
}

bool quantize(const Step& step, const kg_op& op, int thread) {
  const kg_quantize& how = *(const kg_quantize*)op.params;
  const Buffer &in = step.buffer(op.in), &out = step.buffer(op.out);
  const int64_t rows = step.batch->num_tokens;
  const bool alone = step.replicates(out, rows);
  const Part part = alone ? Part{0, rows} : part_of(rows, thread, step.pool->num_threads);
  for (int64_t row = part.begin; row < part.end; row++)
    quantize_row(how, step.row<kg_bf16>(in, row, rows, thread), (float*)step.scratch[thread],
                 step.row<uint8_t>(out, row, rows, thread));
  return !alone && step.meets(rows);
}

}  // namespace kg
