// AMX's tile instructions in plain C++, for testing panel_amx.cpp on processors without AMX.
// Only in the library of the tests (KG_EMULATE_TILES). As the hardware does, bf16 pairs are
// multiplied into float32 sums without rounding between (denormals aside).
#pragma once
#include <string.h>

#include "simd.h"

namespace kg {

struct Tile {
  uint8_t bytes[16][64];
  int rows, row_bytes;
};
inline thread_local Tile tiles[8];

inline void emulated_config(const void* config) {
  const uint8_t* bytes = (const uint8_t*)config;
  for (int tile = 0; tile < 8; tile++) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * tile, 2);
    tiles[tile].rows = bytes[48 + tile];
    tiles[tile].row_bytes = row_bytes;
  }
}

inline void emulated_release() { memset(tiles, 0, sizeof tiles); }

inline void emulated_zero(int tile) { memset(tiles[tile].bytes, 0, sizeof tiles[tile].bytes); }

inline void emulated_load(int tile, const void* base, int64_t stride) {
  for (int row = 0; row < tiles[tile].rows; row++)
    memcpy(tiles[tile].bytes[row], (const char*)base + row * stride, tiles[tile].row_bytes);
}

inline void emulated_store(int tile, void* base, int64_t stride) {
  for (int row = 0; row < tiles[tile].rows; row++)
    memcpy((char*)base + row * stride, tiles[tile].bytes[row], tiles[tile].row_bytes);
}

inline void emulated_multiply(int sum, int left, int right) {
  for (int row = 0; row < tiles[sum].rows; row++) {
    float sums[16];
    memcpy(sums, tiles[sum].bytes[row], 64);
    for (int pair = 0; pair < tiles[left].row_bytes / 4; pair++)
      for (int column = 0; column < tiles[sum].row_bytes / 4; column++)
        for (int i = 0; i < 2; i++) {
          kg_bf16 x, w;
          memcpy(&x, tiles[left].bytes[row] + pair * 4 + i * 2, 2);
          memcpy(&w, tiles[right].bytes[pair] + column * 4 + i * 2, 2);
          sums[column] += to_float(x) * to_float(w);
        }
    memcpy(tiles[sum].bytes[row], sums, 64);
  }
}

// Bytes without sign times bytes with one, four at a time.
inline void emulated_multiply_bytes(int sum, int left, int right) {
  for (int row = 0; row < tiles[sum].rows; row++) {
    int32_t sums[16];
    memcpy(sums, tiles[sum].bytes[row], 64);
    for (int quad = 0; quad < tiles[left].row_bytes / 4; quad++)
      for (int column = 0; column < tiles[sum].row_bytes / 4; column++)
        for (int i = 0; i < 4; i++)
          sums[column] += tiles[left].bytes[row][quad * 4 + i] *
                          (int8_t)tiles[right].bytes[quad][column * 4 + i];
    memcpy(tiles[sum].bytes[row], sums, 64);
  }
}

}  // namespace kg

// immintrin.h has them as macros, too.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(config) kg::emulated_config(config)
#define _tile_release() kg::emulated_release()
#define _tile_zero(tile) kg::emulated_zero(tile)
#define _tile_loadd(tile, base, stride) kg::emulated_load(tile, base, stride)
#define _tile_stored(tile, base, stride) kg::emulated_store(tile, base, stride)
#define _tile_dpbf16ps(sum, left, right) kg::emulated_multiply(sum, left, right)
#define _tile_dpbusd(sum, left, right) kg::emulated_multiply_bytes(sum, left, right)
