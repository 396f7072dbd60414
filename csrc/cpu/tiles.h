// AMX tiles for products of bf16 pairs: 16 rows of 16 words each. Six instructions, or, with
// IDC_EMULATE_TILES, their arithmetic in plain C++, by which tests prove the kernels on machines without AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace idcore {
namespace cpu {
namespace {

constexpr int kTile = 16;  // rows of a tile, and 32-bit words in each

IDC_INLINE int64_t whole_tiles(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

#if defined(IDC_EMULATE_TILES)

struct TileState {
  bool on;
  float sum[2][kTile][kTile];
  uint16_t left[kTile][2 * kTile], right[2][kTile][2 * kTile];
};
thread_local TileState t_tiles;

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Tiles that were not configured hold nothing: using them must show.
void tiles_on() {
  std::memset(&t_tiles, 0xff, sizeof t_tiles);  // NaN
  t_tiles.on = true;
}
void tiles_off() { t_tiles.on = false; }
void need_tiles() {
  if (!t_tiles.on) __builtin_trap();
}
void load_rows(uint16_t (*to)[2 * kTile], const float* from, int64_t row_bytes) {
  need_tiles();
  for (int r = 0; r < kTile; ++r)
    std::memcpy(to[r], reinterpret_cast<const char*>(from) + r * row_bytes, sizeof to[r]);
}
template <int I>
void tile_clear() {
  need_tiles();
  std::memset(t_tiles.sum[I], 0, sizeof t_tiles.sum[I]);
}
void tile_left(const float* from, int64_t row_bytes) { load_rows(t_tiles.left, from, row_bytes); }
template <int I>
void tile_right(const float* from, int64_t row_bytes) {
  load_rows(t_tiles.right[I], from, row_bytes);
}
template <int I>
void tile_multiply() {
  need_tiles();
  for (int m = 0; m < kTile; ++m) {
    for (int n = 0; n < kTile; ++n) {
      float sum = t_tiles.sum[I][m][n];
      for (int k = 0; k < kTile; ++k) {
        for (int half = 0; half < 2; ++half)
          sum += from_bf16(t_tiles.left[m][2 * k + half]) * from_bf16(t_tiles.right[I][k][2 * n + half]);
      }
      t_tiles.sum[I][m][n] = sum;
    }
  }
}
template <int I>
void tile_store(float* to, int64_t row_bytes) {
  need_tiles();
  for (int m = 0; m < kTile; ++m)
    std::memcpy(reinterpret_cast<char*>(to) + m * row_bytes, t_tiles.sum[I][m], sizeof t_tiles.sum[I][m]);
}

#else

// Registers 0 and 1: sums; 2: left; 3 and 4: right. The instructions' own wrappers do not tell the compiler
// that they read memory.
IDC_INLINE void memory_is_read() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile};
};
static_assert(sizeof(TileShape) == 64, "as the processor reads it");

IDC_INLINE void tiles_on() {
  const TileShape shape;
  memory_is_read();
  _tile_loadconfig(&shape);
}
IDC_INLINE void tiles_off() { _tile_release(); }
template <int I>
IDC_INLINE void tile_clear() {
  if constexpr (I == 0) _tile_zero(0);
  if constexpr (I == 1) _tile_zero(1);
}
IDC_INLINE void tile_left(const float* from, int64_t row_bytes) {
  memory_is_read();
  _tile_loadd(2, from, row_bytes);
}
template <int I>
IDC_INLINE void tile_right(const float* from, int64_t row_bytes) {
  memory_is_read();
  if constexpr (I == 0) _tile_loadd(3, from, row_bytes);
  if constexpr (I == 1) _tile_loadd(4, from, row_bytes);
}
template <int I>
IDC_INLINE void tile_multiply() {
  if constexpr (I == 0) _tile_dpbf16ps(0, 2, 3);
  if constexpr (I == 1) _tile_dpbf16ps(1, 2, 4);
}
template <int I>
IDC_INLINE void tile_store(float* to, int64_t row_bytes) {
  if constexpr (I == 0) _tile_stored(0, to, row_bytes);
  if constexpr (I == 1) _tile_stored(1, to, row_bytes);
  memory_is_read();
}

#endif

}  // namespace
}  // namespace cpu
}  // namespace idcore
