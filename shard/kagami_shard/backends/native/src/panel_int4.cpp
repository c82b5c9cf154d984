// 4-bit codes: their bits become the last ones of a bf16 number of which the rest is known.
#include "panel_codes.h"

namespace kg {
namespace {

class Int4 {
 public:
  static constexpr int kHeaderBytes = 48, kStepBytes = 256, kAtOnce = 4;
  static constexpr bool kHasZeros = true;
  static constexpr float kOffset = 128;

  static __m512 scales_at(const char* header) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)header));
  }
  static __m512 zeros_at(const char* header) {
    const __m128i parts = _mm_loadu_si128((const __m128i*)(header + 32));
    const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(parts));
    return _mm512_mul_ps(numbers, _mm512_set1_ps(1.f / kZeroParts));
  }

  Codes<kAtOnce> codes_at(const char* step, int i) const {
    const __m512i words = _mm512_loadu_si512(step + i * 64);
    return {number_of(words), number_of(_mm512_srli_epi16(words, 4)),
            number_of(_mm512_srli_epi16(words, 8)), number_of(_mm512_srli_epi16(words, 12))};
  }

 private:
  // 0x4300 is 128 as bf16, whose last bit counts 1.
  static __m512bh number_of(__m512i words) {
    // words & 15 | 0x4300
    return (__m512bh)_mm512_ternarylogic_epi32(words, _mm512_set1_epi16(15),
                                               _mm512_set1_epi16(0x4300), 0xea);
  }
};

}  // namespace

// Unpacking a panel takes as long as 24 rows do on the vector unit, and longer than tiles take
// for 32.
constexpr CodeForm kInt4Form = form_of<Int4>(4 * kCodeRows);

}  // namespace kg
