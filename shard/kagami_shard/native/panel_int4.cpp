// 4-bit codes: whole numbers by one look-up.
#include "panel_codes.h"

namespace kg {
namespace {

// 0 to 15, twice: `vpermw` looks at five bits, and the fifth is another code's.
constexpr Table numbers() {
  Table table{};
  for (int i = 0; i < 32; i++) table.values[i] = bf16_of(i % 16, 0);
  return table;
}
constexpr Table kNumbers = numbers();

inline __m512 halves_at(const char* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

class Int4 {
 public:
  static constexpr int kHeaderBytes = 64, kStepBytes = 256;
  static constexpr bool kHasZeros = true;

  static __m512 scales_at(const char* header) { return halves_at(header); }
  static __m512 zeros_at(const char* header) { return halves_at(header + 32); }

  Codes codes_at(const char* step, int pair) const {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(step + pair * 32));
    const __m512i words = _mm512_cvtepu8_epi16(bytes);
    return {(__m512bh)_mm512_permutexvar_epi16(words, table_),
            (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table_)};
  }

 private:
  const __m512i table_ = kNumbers.load();
};

}  // namespace

// Unpacking a panel takes as long as 24 rows do on the vector unit, and longer than tiles take
// for 32.
constexpr CodeForm kInt4Form = form_of<Int4>(4 * kCodeRows);

}  // namespace kg
