// Up to eight rows attend to a tile, product by product. First come the scores of each piece; between
// their products the scores of the piece before become weights. Then come the weighted values of the
// whole tile. AMX tiles take the panels of panel.h instead.
#include "softmax.h"

namespace kg {
namespace {

constexpr int kRowsAtOnce = 8;

struct Fetch {  // two cache lines at a time
  const char* next;
  int64_t step;
  explicit Fetch(const kg_bf16* from, const void* instead)
      : next(from ? (const char*)from : (const char*)instead), step(from ? 64 : 0) {}
  void operator()() {
    _mm_prefetch(next, _MM_HINT_T1);
    _mm_prefetch(next + step, _MM_HINT_T1);
    next += 2 * step;
  }
};

// How many of the tile's pieces the rows from `row` on see, as many rows as go together. The first and
// the last row tell: rows of later tokens see later ones.
int64_t pieces_of(const TileRows& rows, int64_t row) {
  if (!rows.seen) return rows.tile.count;
  const int64_t last = std::min(row + kRowsAtOnce, rows.count) - 1;
  const uint64_t by_any = rows.seen[row] | rows.seen[last];
  return by_any >> kPanel ? rows.tile.count : by_any ? 1 : 0;
}

inline void put(float* sums, __m512 more, bool adds) {
  _mm512_storeu_ps(sums, adds ? _mm512_add_ps(_mm512_loadu_ps(sums), more) : more);
}

// Rows whose exponents of a piece are known, but not their weights. Those are computed between the
// products of the next piece: products leave half of the processor's vector units idle.
struct Pending {
  alignas(64) float exponents[kRowsAtOnce][kPanel];
  int64_t row, count, piece;

  inline void weigh(const Softmax& softmax, int64_t r) const {
    softmax.weigh(row + r, _mm512_load_ps(exponents[r]), _mm512_load_ps(exponents[r] + kBlock),
                  piece);
  }
};

template <int kRows>
struct Rows {
  using Sums = __m512[kRows][2];

  // Adds rows of `x` times two blocks of 16 columns, for `pairs` pairs of k.
  static inline void multiply(Sums& sums, const kg_bf16* x, int64_t stride, int64_t pairs,
                              const kg_bf16* first, const kg_bf16* second, Fetch& fetch) {
    for (int64_t i = 0; i < pairs; i++) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(first + i * 32);
      const __m512bh w1 = (__m512bh)_mm512_loadu_si512(second + i * 32);
      fetch();
      KG_UNROLL for (int r = 0; r < kRows; r++)
        add_products<kRows == kRowsAtOnce>(sums[r], x + r * stride + i * 2, w0, w1);
    }
  }

  // Scores, of which the shift was not taken yet, to exponents.
  static inline void cap(const TileRows& rows, int64_t row, Sums& scores) {
    const __m512 scale = _mm512_set1_ps(rows.scale), to_log2 = _mm512_set1_ps(kLog2e);
    KG_UNROLL for (int r = 0; r < kRows; r++)
      KG_UNROLL for (int half = 0; half < 2; half++) {
        const __m512 x = _mm512_mul_ps(scores[r][half], scale);
        const __m512 shift = _mm512_set1_ps(rows.softmax.shifts[rows.first + row + r]);
        scores[r][half] = _mm512_fmsub_ps(activate(KG_SOFTCAP, x, rows.softcap), to_log2, shift);
      }
  }

  // Exponents of a piece (scores where there is a cap) to those that weights are made of.
  static inline void settle(const TileRows& rows, int64_t row, int64_t piece, Sums& exponents) {
    const Softmax& softmax = rows.softmax;
    if (rows.softcap != 0) cap(rows, row, exponents);
    if (rows.seen)
      KG_UNROLL for (int r = 0; r < kRows; r++) {
        const uint64_t seen = rows.seen[row + r] >> piece * kPanel;
        const __m512 hidden = _mm512_set1_ps(kHidden);
        exponents[r][0] = _mm512_mask_mov_ps(hidden, (__mmask16)seen, exponents[r][0]);
        exponents[r][1] = _mm512_mask_mov_ps(hidden, (__mmask16)(seen >> kBlock), exponents[r][1]);
      }
    row += rows.first;
    __m512 excess = _mm512_setzero_ps();
    KG_UNROLL for (int r = 0; r < kRows; r++)
      excess = softmax.excess(row + r, exponents[r][0], exponents[r][1], excess);
    if (_mm512_cmp_ps_mask(excess, _mm512_setzero_ps(), _CMP_GT_OQ))
      KG_UNROLL for (int r = 0; r < kRows; r++) {
        const __m512 by = _mm512_set1_ps(
            softmax.raise(row + r, exponents[r][0], exponents[r][1], piece * kPanel));
        KG_UNROLL for (int half = 0; half < 2; half++)
          exponents[r][half] = _mm512_sub_ps(exponents[r][half], by);
      }
  }

  // Rows from `row` on of these: their exponents of a piece, and the weights of what is pending.
  static void score(const TileRows& rows, int64_t row, int64_t piece, Pending& pending) {
    const Softmax& softmax = rows.softmax;
    const int64_t depth = softmax.depth, pairs = depth / 2 / kRowsAtOnce;
    static constexpr float kZeros[kRowsAtOnce] = {};
    const float* shifts = rows.softcap != 0 ? kZeros : softmax.shifts + rows.first + row;
    Sums exponents;
    KG_UNROLL for (int r = 0; r < kRows; r++)
      exponents[r][0] = exponents[r][1] = _mm512_set1_ps(-shifts[r]);
    const kg_bf16 *x = rows.queries + row * depth, *keys = rows.tile.pieces[piece].keys;
    Fetch fetch(row == 0 ? rows.coming.pieces[piece].keys : nullptr, x);
    for (int64_t r = 0; r < kRowsAtOnce; r++, x += 2 * pairs, keys += 32 * pairs) {
      multiply(exponents, x, depth, pairs, keys, keys + kBlock * depth, fetch);
      if (r < pending.count) pending.weigh(softmax, r);
    }
    settle(rows, row, piece, exponents);
    KG_UNROLL for (int r = 0; r < kRows; r++)
      KG_UNROLL for (int half = 0; half < 2; half++)
        _mm512_store_ps(pending.exponents[r] + half * kBlock, exponents[r][half]);
    pending.row = rows.first + row, pending.count = kRows, pending.piece = piece;
  }

  // Adds these rows' weighted values of the tile. The sums until now lie in the second cache and are
  // loaded while products are computed (measured: 2 % faster than to start the products from them).
  static void add_values(const TileRows& rows, int64_t row, int64_t num_pieces) {
    const Softmax& softmax = rows.softmax;
    const int64_t depth = softmax.depth;
    const Tile &tile = rows.tile, &coming = rows.coming;
    const kg_bf16* weights = softmax.weights + (rows.first + row) * kTile;
    float* out = softmax.sums + (rows.first + row) * depth;
    for (int64_t block = 0; block < depth / kBlock; block += 2, out += kPanel) {
      Sums sums;
      KG_UNROLL for (int r = 0; r < kRows; r++)
        KG_UNROLL for (int half = 0; half < 2; half++)
          sums[r][half] = _mm512_setzero_ps();
      for (int64_t i = 0; i < num_pieces; i++) {
        const Piece &piece = tile.pieces[i], &after = coming.pieces[i];
        const kg_bf16* values = piece.values + block * piece.value_stride;
        const bool fetches = row == 0 && after.values;
        Fetch fetch(fetches ? after.values + block * after.value_stride : nullptr, weights);
        multiply(sums, weights + i * kPanel, kTile, kPanel / 2, values, values + piece.value_stride,
                 fetch);
      }
      KG_UNROLL for (int r = 0; r < kRows; r++)
        KG_UNROLL for (int half = 0; half < 2; half++)
          put(out + r * depth + half * kBlock, sums[r][half], rows.adds);
    }
  }
};

struct Kernels {
  void (*score)(const TileRows&, int64_t row, int64_t piece, Pending&);
  void (*add_values)(const TileRows&, int64_t row, int64_t num_pieces);
};
template <int kRows>
constexpr Kernels kernels() {
  return {Rows<kRows>::score, Rows<kRows>::add_values};
}
constexpr Kernels kByRows[kRowsAtOnce] = {kernels<1>(), kernels<2>(), kernels<3>(), kernels<4>(),
                                          kernels<5>(), kernels<6>(), kernels<7>(), kernels<8>()};

const Kernels& kernels_for(int64_t rows) {
  return kByRows[std::min<int64_t>(kRowsAtOnce, rows) - 1];
}

// Rows times a panel of 32 columns, `out` rows `out_stride` floats apart; fetches once.
void multiply(int64_t rows, Panel panel) {
  for (; rows > 0; rows -= kAmxRows) {
    panel.rows = (int)std::min<int64_t>(rows, kAmxRows);
    panel_amx(panel);
    panel.x += kAmxRows * panel.x_stride;
    panel.out += kAmxRows * panel.out_stride;
    panel.next = nullptr;
  }
}

}  // namespace

void attend_avx512(const TileRows& rows) {
  Pending pending;
  pending.count = 0;
  for (int64_t row = 0; row < rows.count; row += kRowsAtOnce)
    for (int64_t piece = 0; piece < pieces_of(rows, row); piece++)
      kernels_for(rows.count - row).score(rows, row, piece, pending);
  for (int64_t r = 0; r < pending.count; r++) pending.weigh(rows.softmax, r);
  for (int64_t row = 0; row < rows.count; row += kRowsAtOnce)
    kernels_for(rows.count - row).add_values(rows, row, pieces_of(rows, row));
}

void attend_amx(const TileRows& rows, float* scores) {
  const Softmax& softmax = rows.softmax;
  const Tile &tile = rows.tile, &coming = rows.coming;
  const int64_t depth = softmax.depth;
  for (int64_t i = 0; i < tile.count; i++)
    multiply(rows.count, {tile.pieces[i].keys, kBlock * depth, rows.queries, depth, 0, depth,
                          scores + i * kPanel, kTile, false, (const char*)coming.pieces[i].keys,
                          depth});
  for (int64_t row = 0; row < rows.count; row++)
    for (int64_t i = 0; i < tile.count; i++) {
      const float* of_piece = scores + row * kTile + i * kPanel;
      const __m512 shift = _mm512_set1_ps(rows.softcap != 0 ? 0 : softmax.shifts[rows.first + row]);
      Rows<1>::Sums of_row = {{_mm512_sub_ps(_mm512_loadu_ps(of_piece), shift),
                               _mm512_sub_ps(_mm512_loadu_ps(of_piece + kBlock), shift)}};
      Rows<1>::settle(rows, row, i, of_row);
      softmax.weigh(rows.first + row, of_row[0][0], of_row[0][1], i);
    }
  const kg_bf16* weights = softmax.weights + rows.first * kTile;
  for (int64_t d = 0; d < depth; d += kPanel)
    for (int64_t i = 0; i < tile.count; i++) {
      const Piece &piece = tile.pieces[i], &after = coming.pieces[i];
      const int64_t block = d / kBlock;
      const kg_bf16* fetched = after.values ? after.values + block * after.value_stride : nullptr;
      multiply(rows.count, {piece.values + block * piece.value_stride, piece.value_stride,
                            weights + i * kPanel, kTile, 0, kPanel,
                            softmax.sums + rows.first * depth + d, depth, rows.adds || i > 0,
                            (const char*)fetched, kPanel});
    }
}

}  // namespace kg
