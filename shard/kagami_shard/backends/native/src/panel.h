// The one inner kernel: some rows of activations times a panel of 32 columns.
//
// Linear layers are this over a packed weight, attention is this over a tile of keys or values,
// which the cache holds so or which is packed on the spot. A packed panel is two blocks of 16
// columns, each [k / 2][16][2] bf16: what `vdpbf16ps` multiplies with a broadcast pair of
// activations, and what an AMX B tile (16 pairs of rows) wants. So one layout serves both kinds of
// processor.
#pragma once
#include <algorithm>
#include <type_traits>

#include "ops.h"

namespace kg {

constexpr int kBlock = 16;         // columns of a block
constexpr int kPanel = 2 * kBlock;  // columns of a panel
constexpr int kDepth = 32;          // k is padded to this: the depth of an AMX tile

struct Panel {
  const kg_bf16* weight;
  int64_t block_stride;  // from one block to the next, in elements
  const kg_bf16* x;
  int64_t x_stride;  // in elements
  int rows;
  int64_t k;               // a multiple of kDepth
  float* out;              // [rows][kPanel], rows `out_stride` floats apart
  int64_t out_stride;
  bool adds;               // to what is there
  const char* next;        // where to prefetch from meanwhile, or null
  int64_t next_lines;      // cache lines of it, for every 2 columns of k at most 2
};

using PanelKernel = void (*)(const Panel&);

struct Kernel {
  PanelKernel run;
  int max_rows;
};

void panel_avx512(const Panel&);
void panel_amx(const Panel&);
constexpr int kAvx512Rows = 8, kAmxRows = 32;
// Up to so many rows the vector unit keeps up with the memory, and needs no tiles set up.
constexpr int kFewRows = 4;

// Tiles add up the products of a step in an order of their own (TDPBF16PS: even and odd pairs apart).
// So where there are tiles, every number of rows takes them: a row has the same bits alone and among
// others. Whole numbers have no order: int8 may use either.
inline Kernel kernel_for(bool use_amx) {
  if (use_amx) return {panel_amx, kAmxRows};
  return {panel_avx512, kAvx512Rows};
}

// How a pass prefetches the next panel: so many cache lines in each step along k, or one line of
// four, two steps' lines. In a long panel the processor's own prefetcher finds the other three, and
// has more of them under way than a core that asks for each (measured: a 1B, two Zen 4 cores, fast
// memory, 4 x 1,024 52 -> 45 ms, 2 x 192 46 -> 40). One of four loses if the next pass comes too soon
// (8 rows 45 -> 51, 16 rows 82 -> 97), and in short panels (SmolLM2 in 8 bits 4.0 -> 4.5).
constexpr int kOneOfFour = -1;
constexpr int64_t kLongPanel = 1024;  // lines

template <int kFetching>
using Fetching = std::integral_constant<int, kFetching>;

// `multiply(Fetching<...>)`, for `lines` of `next` in so many steps.
template <int kRows, class Multiply>
inline void with_fetching(const char* next, int64_t lines, int64_t steps, Multiply multiply) {
  const int64_t in_step = next ? lines / steps : 0;
  if constexpr (kRows <= kFewRows)
    if (in_step >= 2 && lines >= kLongPanel) return multiply(Fetching<kOneOfFour>());
  switch (std::min<int64_t>(in_step, 2)) {
    case 0:
      return multiply(Fetching<0>());
    case 1:
      return multiply(Fetching<1>());
    default:
      return multiply(Fetching<2>());
  }
}

template <int kFetching>
inline const char* fetch(const char* next, int64_t step) {
  if constexpr (kFetching == kOneOfFour) {
    if (step % 2 == 0) __builtin_prefetch(next, 0, 2);
    return next + 128;
  }
  for (int line = 0; line < kFetching; line++, next += 64) __builtin_prefetch(next, 0, 2);
  return next;
}

bool has_amx();        // asks the kernel for the tiles' state, too
void release_tiles();  // the thread's; a thread with live tiles is slow to switch

}  // namespace kg
