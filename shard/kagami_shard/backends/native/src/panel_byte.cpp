// Codes of 8 bits: e4m3 floats, and whole numbers from -128 to 127. bf16 holds either exactly.
#include "panel_codes.h"

namespace kg {
namespace {

constexpr Table uppers() {  // sign and exponent by s eeee; e4m3's bias is 7
  Table table{};
  for (int i = 0; i < 32; i++)
    table.values[i] = (kg_bf16)((i >> 4) << 15 | bf16_of(1, (i & 15) - 7));
  return table;
}
constexpr Table smalls() {  // by mmm s, where the exponent is 0: mmm / 512
  Table table{};
  for (int i = 0; i < 32; i++)
    table.values[i] = (kg_bf16)((i & 1) << 15 | bf16_of(i >> 1 & 7, -9));
  return table;
}
constexpr Table kUppers = uppers(), kSmalls = smalls();

// A code lies rotated by three bits, mmm s eeee (quantized.h), so that `vpermw`, which looks at
// the lowest five, finds sign and exponent; the bits of the mantissa are put beside them.
class Float8 {
 public:
  static constexpr int kHeaderBytes = 64, kStepBytes = 512, kAtOnce = 2;
  static constexpr bool kHasZeros = false;
  static constexpr float kOffset = 0;

  static __m512 scales_at(const char* header) { return _mm512_loadu_ps(header); }

  Codes<kAtOnce> codes_at(const char* step, int pair) const {
    const __m512i words = _mm512_loadu_si512(step + pair * 64);
    const __m512i high = _mm512_srli_epi16(words, 8);
    Codes<kAtOnce> codes{number_of(words), number_of(high)};
    // Few weights are so small, so that most lines pass here.
    if (__builtin_expect(_mm512_testn_epi8_mask(words, _mm512_set1_epi8(15)) != 0, 0))
      codes = {with_small(codes.pairs[0], words), with_small(codes.pairs[1], high)};
    return codes;
  }

 private:
  __m512bh number_of(__m512i words) const {
    const __m512i upper = _mm512_permutexvar_epi16(words, upper_);
    // upper | (words >> 1 & 0x70)
    return (__m512bh)_mm512_ternarylogic_epi32(upper, _mm512_srli_epi16(words, 1),
                                               _mm512_set1_epi16(0x70), 0xf8);
  }

  __m512bh with_small(__m512bh numbers, __m512i words) const {
    const __mmask32 is_small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(15));
    return (__m512bh)_mm512_mask_permutexvar_epi16((__m512i)numbers, is_small,
                                                   _mm512_srli_epi16(words, 4), small_);
  }

  const __m512i upper_ = kUppers.load(), small_ = kSmalls.load();
};

class Grouped8 {
 public:
  static constexpr int kHeaderBytes = 128, kStepBytes = 512, kAtOnce = 2;
  static constexpr bool kHasZeros = true;
  static constexpr float kOffset = 0;

  static __m512 scales_at(const char* header) { return _mm512_loadu_ps(header); }
  static __m512 zeros_at(const char* header) { return _mm512_loadu_ps(header + 64); }

  Codes<kAtOnce> codes_at(const char* step, int pair) const {
    const char* codes = step + pair * 32;
    return {at(codes), at(codes + kStepBytes / 2)};
  }

 private:
  // The floats of such numbers are bf16 in their upper halves, and zeros.
  static __m512i floats_at(const char* codes) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)codes);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
  }

  static __m512bh at(const char* codes) {
    const __m512i even = floats_at(codes), odd = floats_at(codes + kBlock);
    return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
  }
};

}  // namespace

// Unpacking a panel takes as long as 150 rows take longer in codes than in bf16.
constexpr CodeForm kFloat8Form = form_of<Float8>(16 * kCodeRows);
constexpr CodeForm kGrouped8Form = form_of<Grouped8>(16 * kCodeRows);

}  // namespace kg
