// The KV cache as attention reads it: 32 tokens of a head at a time, as two panels' weights.
//
// *Arranged* blocks lie so that nothing is packed when they are read; `keys` and `values` of a block
// of B tokens are, of each head,
//
//   keys     [B / 16][dim / 2][16 tokens][2]     the weight of queries @ keys.T
//   values   [dim / 16][B / 2][16 dims][2]       the weight of weights @ values, by pairs of tokens
//
// Whole panels must fit: dim and B are multiples of 32. Other caches are [B][num_kv_heads][dim], as
// torch has them, and a tile of them is packed on the spot.
#pragma once
#include "step.h"

namespace kg {

constexpr int64_t kPieces = kTile / kPanel;

struct Piece {
  const kg_bf16 *keys, *values;
  int64_t value_stride;  // from one 16 dimensions to the next, in elements
};

struct Tile {  // of one head
  Piece pieces[kPieces];
  int64_t count;  // of its pieces
};

struct Stretch {  // a tile's tokens in the cache of a sequence
  int64_t sequence, begin, end;
};

struct Room {  // of a thread, for a tile that is packed
  kg_bf16 *keys, *values;  // kTile * depth each
};

class Pages {  // one layer's
 public:
  Pages(const kg_batch&, const kg_attention&);

  // A token's keys and values of all heads.
  void write(int64_t sequence, int64_t position, const kg_bf16* keys, const kg_bf16* values) const;
  // `begin` is a multiple of kPanel if the cache is arranged. Values of tokens behind the end are
  // zeros: a weight of 0 times NaN would be NaN.
  Tile tile(const Stretch&, int64_t head, const Room&) const;
  // Where that tile lies, to fetch it while another is computed.
  Tile lying(const Stretch&, int64_t head) const;

  const bool is_arranged;

 private:
  int64_t block_of(int64_t sequence, int64_t position) const {
    return batch_.block_tables[sequence * batch_.table_width + position / batch_.block_size];
  }
  Tile pack(const Stretch&, int64_t head, const Room&) const;

  const kg_batch& batch_;
  kg_bf16 *const keys_, *const values_;
  const int64_t dim_, num_heads_;
};

}  // namespace kg
