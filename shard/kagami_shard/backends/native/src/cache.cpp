// What is written into the KV cache, and the tiles that attention reads of it.
#include "cache.h"

#include <string.h>

#include "packing.h"
#include "simd.h"

namespace kg {
namespace {

bool can_arrange(int64_t dim, int64_t block_size) {
  return dim % kPanel == 0 && block_size % kPanel == 0;
}

bool all_zero(const kg_bf16* values, int64_t count) {
  return values[0] == 0 && memcmp(values, values + 1, (count - 1) * sizeof *values) == 0;
}

// One head's part of an arranged block.
struct Arranged {
  kg_bf16 *keys, *values;
  int64_t dim, block_size;

  void put(int64_t offset, const kg_bf16* key, const kg_bf16* value) const {
    int32_t* pairs = (int32_t*)(keys + offset / kBlock * kBlock * dim) + offset % kBlock;
    for (int64_t i = 0; i < dim; i += 2) memcpy(pairs + i / 2 * kBlock, key + i, 4);
    // Either half of every 32 bits is a token's.
    const __mmask32 mine = offset % 2 ? 0xaaaaaaaau : 0x55555555u;
    kg_bf16* line = values + offset / 2 * 2 * kBlock;
    for (int64_t i = 0; i < dim; i += kBlock, line += block_size * kBlock) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + i)));
      _mm512_mask_storeu_epi16(line, mine, offset % 2 ? _mm512_slli_epi32(wide, 16) : wide);
    }
  }
};

// The values of a piece whose last tokens do not count.
Piece without_rest(const Piece& piece, int64_t count, int64_t dim, kg_bf16* room) {
  const __m512i zero = _mm512_setzero_si512();
  const int64_t stride = kPanel * kBlock;
  for (int64_t block = 0; block < dim / kBlock; block++)
    for (int64_t token = 0; token < kPanel; token += 2) {
      const kg_bf16* from = piece.values + block * piece.value_stride + token * kBlock;
      const __mmask32 mask = token + 1 < count ? 0xffffffffu : token < count ? 0x55555555u : 0;
      _mm512_storeu_si512(room + block * stride + token * kBlock,
                          mask ? _mm512_maskz_loadu_epi16(mask, from) : zero);
    }
  return {piece.keys, room, stride};
}

}  // namespace

Pages::Pages(const kg_batch& batch, const kg_attention& spec)
    : is_arranged(can_arrange(spec.head_dim, batch.block_size)),
      batch_(batch),
      keys_(batch.keys[spec.layer]),
      values_(batch.values[spec.layer]),
      dim_(spec.head_dim),
      num_heads_(spec.num_kv_heads) {}

void Pages::write(int64_t sequence, int64_t position, const kg_bf16* keys,
                  const kg_bf16* values) const {
  const int64_t size = batch_.block_size, offset = position % size;
  const int64_t block = block_of(sequence, position) * size * num_heads_ * dim_;
  if (!is_arranged) {
    const int64_t width = num_heads_ * dim_, at = block + offset * width;
    memcpy(keys_ + at, keys, width * 2);
    memcpy(values_ + at, values, width * 2);
    return;
  }
  for (int64_t head = 0; head < num_heads_; head++) {
    const int64_t at = block + head * size * dim_;
    const Arranged of_head{keys_ + at, values_ + at, dim_, size};
    of_head.put(offset, keys + head * dim_, values + head * dim_);
  }
}

Tile Pages::tile(const Stretch& stretch, int64_t head, const Room& room) const {
  if (!is_arranged) return pack(stretch, head, room);
  Tile tile = lying(stretch, head);
  const int64_t rest = (stretch.end - stretch.begin) % kPanel;
  if (rest && stretch.end - stretch.begin < kTile) {
    Piece& last = tile.pieces[tile.count - 1];
    last = without_rest(last, rest, dim_, room.values);
  }
  return tile;
}

Tile Pages::lying(const Stretch& stretch, int64_t head) const {
  Tile tile{};
  if (!is_arranged) return tile;
  const int64_t size = batch_.block_size, end = std::min(stretch.end, stretch.begin + kTile);
  for (int64_t begin = stretch.begin; begin < end; begin += kPanel) {
    const int64_t block = block_of(stretch.sequence, begin), offset = begin % size;
    const int64_t at = (block * num_heads_ + head) * size * dim_;
    tile.pieces[tile.count++] = {keys_ + at + offset * dim_, values_ + at + offset * kBlock,
                                 size * kBlock};
  }
  return tile;
}

Tile Pages::pack(const Stretch& stretch, int64_t head, const Room& room) const {
  const int64_t size = batch_.block_size, width = num_heads_ * dim_;
  const int64_t depth = round_up(dim_, kDepth), num_blocks = depth / kBlock;
  const int64_t count = std::min(kTile, stretch.end - stretch.begin);
  const int64_t padded = round_up(count, kPanel);
  int64_t at[kTile];
  for (int64_t i = 0; i < count; i++) {
    const int64_t position = stretch.begin + i;
    at[i] = (block_of(stretch.sequence, position) * size + position % size) * width + head * dim_;
  }
  for (int64_t first = 0; first < padded; first += kBlock)
    for (int64_t column = 0; column < depth; column += 32) {
      const int64_t left = dim_ - column;
      const __mmask32 mask = left >= 32 ? 0xffffffffu : (__mmask32)((1u << left) - 1);
      __m512i rows[kBlock];
      for (int64_t i = 0; i < kBlock; i++)
        rows[i] = first + i < count ? _mm512_maskz_loadu_epi16(mask, keys_ + at[first + i] + column)
                                    : _mm512_setzero_si512();
      transpose(rows);
      kg_bf16* to = room.keys + first * depth + column * kBlock;
      for (int64_t i = 0; i < kBlock; i++) _mm512_storeu_si512(to + i * 32, rows[i]);
    }
  for (int64_t i = 0; i < padded; i += 2) {
    const kg_bf16* first = values_ + (i < count ? at[i] : 0);
    const kg_bf16* second = values_ + (i + 1 < count ? at[i + 1] : 0);
    for (int64_t block = 0; block < num_blocks; block++) {
      const __mmask16 mask = lanes(dim_ - block * kBlock);
      const __mmask16 of_first = i < count ? mask : 0, of_second = i + 1 < count ? mask : 0;
      const __m256i even = _mm256_maskz_loadu_epi16(of_first, first + block * kBlock);
      const __m256i odd = _mm256_maskz_loadu_epi16(of_second, second + block * kBlock);
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(room.values + block * kBlock * kTile + i * kBlock, both);
    }
  }
  Tile tile{};
  for (int64_t first = 0; first < padded; first += kPanel)
    tile.pieces[tile.count++] = {room.keys + first * depth, room.values + first * kBlock,
                                 kBlock * kTile};
  return tile;
}

}  // namespace kg

using namespace kg;

extern "C" void kg_arrange(kg_bf16* keys, kg_bf16* values, int64_t num_blocks, int64_t block_size,
                           int64_t num_kv_heads, int64_t head_dim) {
  if (!can_arrange(head_dim, block_size)) return;
  const int64_t width = num_kv_heads * head_dim, elements = block_size * width;
  on_all_cores(num_blocks, num_blocks * elements * 4, [=](int64_t index) {
    kg_bf16 *to_keys = keys + index * elements, *to_values = values + index * elements;
    // Zeros lie the same in both orders, and a block that was never written takes no memory yet.
    if (all_zero(to_keys, elements) && all_zero(to_values, elements)) return;
    const std::vector<kg_bf16> old_keys(to_keys, to_keys + elements);
    const std::vector<kg_bf16> old_values(to_values, to_values + elements);
    for (int64_t head = 0; head < num_kv_heads; head++) {
      const int64_t at = head * block_size * head_dim;
      const Arranged of_head{to_keys + at, to_values + at, head_dim, block_size};
      for (int64_t token = 0; token < block_size; token++) {
        const int64_t from = token * width + head * head_dim;
        of_head.put(token, old_keys.data() + from, old_values.data() + from);
      }
    }
  });
}
