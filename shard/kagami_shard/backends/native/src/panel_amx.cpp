// The same panel on AMX tiles: 32 rows by 32 columns at a time (Intel's Optimization Reference
// Manual, chapter 20). Two tiles of activations, two of weights, four of sums.
#include <string.h>

#include "panel.h"
#include "quantized.h"
#include "simd.h"

#ifdef KG_EMULATE_TILES
#include "tile_emulation.h"
#define KG_AMX
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define KG_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))
#endif

namespace kg {
namespace {

struct alignas(64) TileConfig {  // the operand of ldtilecfg
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Macros, because the intrinsics paste the tile's number into their assembly.
#define SUM_00 0
#define SUM_01 1
#define SUM_10 2
#define SUM_11 3
#define WEIGHT_0 4
#define WEIGHT_1 5
#define X_0 6
#define X_1 7

thread_local int configured_rows = 0;

KG_AMX void configure(int rows) {
  if (rows == configured_rows) return;
  configured_rows = rows;
  const int upper = rows < 16 ? rows : 16, lower = rows > 16 ? rows - 16 : 1;
  const int of_tile[8] = {upper, upper, lower, lower, 16, 16, upper, lower};
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int tile = 0; tile < 8; tile++) {
    config.rows[tile] = (uint8_t)of_tile[tile];
    config.row_bytes[tile] = 64;
  }
  // gcc 12 takes the operand of _tile_loadconfig for 8 bytes and drops the stores to the others.
  __asm__ __volatile__("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// What both kinds of weights have in common: a step along k is a tile, 64 bytes of each of up to 16
// rows of activations and 1 KiB of each of two blocks of weights; bf16 and int8 differ in the product.
struct Product {
  const char *first, *second;  // the blocks of weights
  const char* x;
  int64_t x_bytes, num_steps;
  void* out;
  int64_t out_bytes;  // from row to row
  bool adds;
  const char* next;
  int64_t lines;  // to prefetch in each step
};

#define MULTIPLY(sum, x, weight)       \
  if constexpr (kIsInt8)               \
    _tile_dpbusd(sum, x, weight);      \
  else                                 \
    _tile_dpbf16ps(sum, x, weight)

inline const char* fetch(const char* next, int64_t lines) {
  for (int64_t line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  return next;
}

template <bool kIsInt8>
KG_AMX void multiply_lower(Product p) {  // 1 to 16 rows
  if (p.adds) {
    _tile_loadd(SUM_00, p.out, p.out_bytes);
    _tile_loadd(SUM_01, (char*)p.out + 64, p.out_bytes);
  } else {
    _tile_zero(SUM_00);
    _tile_zero(SUM_01);
  }
  for (int64_t step = 0; step < p.num_steps; step++) {
    p.next = fetch(p.next, p.lines);
    _tile_loadd(WEIGHT_0, p.first + step * 1024, 64);
    _tile_loadd(WEIGHT_1, p.second + step * 1024, 64);
    _tile_loadd(X_0, p.x + step * 64, p.x_bytes);
    MULTIPLY(SUM_00, X_0, WEIGHT_0);
    MULTIPLY(SUM_01, X_0, WEIGHT_1);
  }
  _tile_stored(SUM_00, p.out, p.out_bytes);
  _tile_stored(SUM_01, (char*)p.out + 64, p.out_bytes);
}

template <bool kIsInt8>
KG_AMX void multiply_both(Product p) {  // 17 to 32 rows
  char *upper_out = (char*)p.out, *lower_out = upper_out + 16 * p.out_bytes;
  const char* lower = p.x + 16 * p.x_bytes;
  if (p.adds) {
    _tile_loadd(SUM_00, upper_out, p.out_bytes);
    _tile_loadd(SUM_01, upper_out + 64, p.out_bytes);
    _tile_loadd(SUM_10, lower_out, p.out_bytes);
    _tile_loadd(SUM_11, lower_out + 64, p.out_bytes);
  } else {
    _tile_zero(SUM_00);
    _tile_zero(SUM_01);
    _tile_zero(SUM_10);
    _tile_zero(SUM_11);
  }
  for (int64_t step = 0; step < p.num_steps; step++) {
    p.next = fetch(p.next, p.lines);
    _tile_loadd(WEIGHT_0, p.first + step * 1024, 64);
    _tile_loadd(X_0, p.x + step * 64, p.x_bytes);
    MULTIPLY(SUM_00, X_0, WEIGHT_0);
    _tile_loadd(WEIGHT_1, p.second + step * 1024, 64);
    MULTIPLY(SUM_01, X_0, WEIGHT_1);
    _tile_loadd(X_1, lower + step * 64, p.x_bytes);
    MULTIPLY(SUM_10, X_1, WEIGHT_0);
    MULTIPLY(SUM_11, X_1, WEIGHT_1);
  }
  _tile_stored(SUM_00, upper_out, p.out_bytes);
  _tile_stored(SUM_01, upper_out + 64, p.out_bytes);
  _tile_stored(SUM_10, lower_out, p.out_bytes);
  _tile_stored(SUM_11, lower_out + 64, p.out_bytes);
}

template <bool kIsInt8>
void multiply(int rows, const Product& product) {
  configure(rows);
  if (rows > 16)
    multiply_both<kIsInt8>(product);
  else
    multiply_lower<kIsInt8>(product);
}

}  // namespace

void panel_int8_amx(const Int8Panel& panel) {
  alignas(64) int32_t sums[kAmxRows * kPanel];
  const int64_t num_steps = panel.depth / kDepth8;
  const int64_t lines = panel.next ? panel.next_lines / num_steps : 0;
  multiply<true>(panel.rows, {panel.weight, panel.weight + kBlock * panel.depth,
                              (const char*)panel.x, panel.x_stride, num_steps, sums, kPanel * 4,
                              false, panel.next, lines});
  finish_int8(panel, sums);
}

void panel_amx(const Panel& panel) {
  const int64_t num_steps = panel.k / kDepth;
  const int64_t lines = panel.next ? panel.next_lines / num_steps : 0;
  multiply<false>(panel.rows, {(const char*)panel.weight,
                               (const char*)(panel.weight + panel.block_stride),
                               (const char*)panel.x, panel.x_stride * 2, num_steps, panel.out,
                               panel.out_stride * 4, panel.adds, panel.next, lines});
}

KG_AMX void release_tiles() {
  if (!configured_rows) return;
  configured_rows = 0;
  _tile_release();
}

#ifdef KG_EMULATE_TILES

bool has_amx() { return true; }

#else

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  if ((d & kNeeded) != kNeeded) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2), XSTATE component
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

}  // namespace kg
