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

KG_AMX void multiply_lower(const Panel& panel) {  // 1 to 16 rows
  const int64_t out_bytes = panel.out_stride * 4;
  if (panel.adds) {
    _tile_loadd(SUM_00, panel.out, out_bytes);
    _tile_loadd(SUM_01, panel.out + kBlock, out_bytes);
  } else {
    _tile_zero(SUM_00);
    _tile_zero(SUM_01);
  }
  const kg_bf16 *first = panel.weight, *second = panel.weight + panel.block_stride;
  const char* next = panel.next;
  const int64_t lines = next ? panel.next_lines / (panel.k / kDepth) : 0;
  for (int64_t k = 0; k < panel.k; k += kDepth, first += 512, second += 512) {
    for (int64_t line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    _tile_loadd(WEIGHT_0, first, 64);
    _tile_loadd(WEIGHT_1, second, 64);
    _tile_loadd(X_0, panel.x + k, panel.x_stride * 2);
    _tile_dpbf16ps(SUM_00, X_0, WEIGHT_0);
    _tile_dpbf16ps(SUM_01, X_0, WEIGHT_1);
  }
  _tile_stored(SUM_00, panel.out, out_bytes);
  _tile_stored(SUM_01, panel.out + kBlock, out_bytes);
}

KG_AMX void multiply_both(const Panel& panel) {  // 17 to 32 rows
  const int64_t out_bytes = panel.out_stride * 4;
  float *upper_out = panel.out, *lower_out = panel.out + 16 * panel.out_stride;
  if (panel.adds) {
    _tile_loadd(SUM_00, upper_out, out_bytes);
    _tile_loadd(SUM_01, upper_out + kBlock, out_bytes);
    _tile_loadd(SUM_10, lower_out, out_bytes);
    _tile_loadd(SUM_11, lower_out + kBlock, out_bytes);
  } else {
    _tile_zero(SUM_00);
    _tile_zero(SUM_01);
    _tile_zero(SUM_10);
    _tile_zero(SUM_11);
  }
  const kg_bf16 *first = panel.weight, *second = panel.weight + panel.block_stride;
  const kg_bf16* lower = panel.x + 16 * panel.x_stride;
  const char* next = panel.next;
  const int64_t lines = next ? panel.next_lines / (panel.k / kDepth) : 0;
  for (int64_t k = 0; k < panel.k; k += kDepth, first += 512, second += 512) {
    for (int64_t line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    _tile_loadd(WEIGHT_0, first, 64);
    _tile_loadd(X_0, panel.x + k, panel.x_stride * 2);
    _tile_dpbf16ps(SUM_00, X_0, WEIGHT_0);
    _tile_loadd(WEIGHT_1, second, 64);
    _tile_dpbf16ps(SUM_01, X_0, WEIGHT_1);
    _tile_loadd(X_1, lower + k, panel.x_stride * 2);
    _tile_dpbf16ps(SUM_10, X_1, WEIGHT_0);
    _tile_dpbf16ps(SUM_11, X_1, WEIGHT_1);
  }
  _tile_stored(SUM_00, upper_out, out_bytes);
  _tile_stored(SUM_01, upper_out + kBlock, out_bytes);
  _tile_stored(SUM_10, lower_out, out_bytes);
  _tile_stored(SUM_11, lower_out + kBlock, out_bytes);
}

KG_AMX void multiply_int8(const Int8Panel& panel, int32_t* sums) {
  _tile_zero(SUM_00);
  _tile_zero(SUM_01);
  const char *first = panel.weight, *second = first + kBlock * panel.depth;
  const char* next = panel.next;
  const int64_t lines = next ? panel.next_lines / (panel.depth / kDepth8) : 0;
  for (int64_t k = 0; k < panel.depth; k += kDepth8, first += 1024, second += 1024) {
    for (int64_t line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    _tile_loadd(WEIGHT_0, first, 64);
    _tile_loadd(WEIGHT_1, second, 64);
    _tile_loadd(X_0, panel.x + k, panel.x_stride);
    _tile_dpbusd(SUM_00, X_0, WEIGHT_0);
    _tile_dpbusd(SUM_01, X_0, WEIGHT_1);
  }
  _tile_stored(SUM_00, sums, kPanel * 4);
  _tile_stored(SUM_01, sums + kBlock, kPanel * 4);
}

}  // namespace

void panel_int8_amx(const Int8Panel& panel) {
  configure(panel.rows);
  alignas(64) int32_t sums[kInt8AmxRows * kPanel];
  multiply_int8(panel, sums);
  finish_int8(panel, sums);
}

void panel_amx(const Panel& panel) {
  configure(panel.rows);
  if (panel.rows > 16)
    multiply_both(panel);
  else
    multiply_lower(panel);
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
