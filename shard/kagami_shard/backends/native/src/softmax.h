// The running softmax of rows that attend to one tile of the cache after the other
// (FlashAttention, arXiv:2205.14135), in powers of two.
#pragma once
#include <math.h>

#include "cache.h"
#include "simd.h"

namespace kg {

// The exponent of a token that a row does not see, and below it the bound of a row that has seen
// nothing yet.
constexpr float kHidden = -1e35f, kNothing = -1e30f;
constexpr float kHeadroom = 8;
constexpr float kLog2e = 1.44269504089f;

// A row's weights are 2^(score - shift); `score - shift` is called the exponent. The shift moves for
// the first tokens that a row sees, and later only for an exponent above kHeadroom, which is rare.
// Shifts are whole numbers, so earlier sums follow a shift without rounding.
struct Softmax {
  int64_t depth;
  float* shifts;
  float* bounds;     // an exponent above its row's bound moves the shift
  float* totals;     // [rows][kLanes]
  float* sums;       // [rows][depth], of weighted values
  kg_bf16* weights;  // [rows][kTile], of the present tile

  // The first tile of each row stores its sums: what lay there is not added to.
  void start(int64_t rows) const {
    for (int64_t row = 0; row < rows; row++) shifts[row] = 0, bounds[row] = kNothing;
    memset(totals, 0, rows * kLanes * 4);
  }

  // How far the largest of two times 16 exponents is above the row's bound, lane by lane; NaN counts
  // as `least`.
  __m512 excess(int64_t row, __m512 a, __m512 b, __m512 least) const {
    return _mm512_max_ps(_mm512_sub_ps(_mm512_max_ps(a, b), _mm512_set1_ps(bounds[row])), least);
  }

  // Moves the row's shift for a piece's exponents, if they ask for it, and returns by how much;
  // `num_weights` of the tile's weights are there already.
  __attribute__((noinline)) float raise(int64_t row, __m512 a, __m512 b,
                                        int64_t num_weights) const {
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    if (!(largest > bounds[row])) return 0;
    const float by = ceilf(largest);
    if (bounds[row] != kNothing) {  // else there is nothing to scale yet
      const __m512 factor = _mm512_scalef_ps(_mm512_set1_ps(1.f), _mm512_set1_ps(-by));
      scale(totals + row * kLanes, kLanes, factor);
      scale(sums + row * depth, depth, factor);
      kg_bf16* pending = weights + row * kTile;
      for (int64_t i = 0; i < num_weights; i += kLanes)
        store_bf16(pending + i, _mm512_mul_ps(load_bf16(pending + i), factor));
    }
    shifts[row] += by;
    bounds[row] = kHeadroom;
    return by;
  }

  // The row's weights of piece `piece` of the tile, from its exponents.
  void weigh(int64_t row, __m512 a, __m512 b, int64_t piece) const {
    __m512 x[2] = {a, b};
    powers_of_2(x);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(x[1], x[0]);
    // The total is that of the rounded weights: otherwise a row with one large weight would be wrong
    // by its rounding. Lanes do not matter, they are added up at the end.
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    float* total = totals + row * kLanes;
    _mm512_storeu_ps(total, _mm512_dpbf16_ps(_mm512_loadu_ps(total), rounded, ones));
    _mm512_storeu_si512(weights + row * kTile + piece * kPanel, (__m512i)rounded);
  }

 private:
  static void scale(float* values, int64_t count, __m512 factor) {
    for (int64_t i = 0; i < count; i += kLanes)
      _mm512_storeu_ps(values + i, _mm512_mul_ps(_mm512_loadu_ps(values + i), factor));
  }
};

// Rows that attend to a tile, from row `first` of a softmax on.
struct TileRows {
  const Softmax& softmax;
  int64_t first, count;
  const kg_bf16* queries;     // [count][depth], times what makes scores powers of 2
  const Tile &tile, &coming;  // fetched meanwhile
  const uint64_t* seen;       // of each row, which of the tile's tokens; null: all
  float scale, softcap;       // softcap 0: none; else queries are as they come
  bool adds;                  // to the sums of tiles before; false: this is the first tile
};

void attend_avx512(const TileRows&);
void attend_amx(const TileRows&, float* scores);  // room for [count][kTile]

}  // namespace kg
