// The int8 GEMM's inner product by AMX: 32 rows by 32 columns in four tile registers.
//   in:  up to 32 rows of int8 activations, depth a multiple of 64; a panel as gemm_int8_tile.h has it
//   out: an int32 tile, rows x kPanel, of exact sums: a * w, panels without an offset
//   used by gemm_int8.h where kHasAmxInt8 and amx_is_usable()
#pragma once

#include "amx.h"
#include "gemm_int8_tile.h"

namespace ttx::detail {

constexpr int kAmxDepth = 64;

#if defined(TTX_AMX) && defined(__AMX_INT8__)
#define TTX_AMX_INT8 1
constexpr bool kHasAmxInt8 = true;

#define TTX_TILE_MULTIPLY(sum, a, w) \
  asm volatile("tdpbssd %%tmm" #w ", %%tmm" #a ", %%tmm" #sum ::)

inline void multiply_amx(AmxTiles& tiles, int rows, const std::int8_t* a, long lda,
                         const std::int8_t* panel, long depth, NextPanel next, std::int32_t* tile) {
  tiles.shape_for(rows);
  constexpr long width = kQuad * kPanel, half = kQuad * kLanes;
  bool both = rows > 16;
  TTX_TILE_ZERO(0);
  TTX_TILE_ZERO(1);
  if (both) {
    TTX_TILE_ZERO(2);
    TTX_TILE_ZERO(3);
  }
  for (long k = 0; k < depth; k += kAmxDepth, panel += kAmxDepth * kPanel) {
    for (long line = 0; line < next.bytes_per_k * kAmxDepth; line += 64)
      __builtin_prefetch(next.address + next.bytes_per_k * k + line, 0, 2);
    TTX_TILE_LOAD(6, panel, width);
    TTX_TILE_LOAD(4, a + k, lda);
    TTX_TILE_MULTIPLY(0, 4, 6);
    TTX_TILE_LOAD(7, panel + half, width);
    TTX_TILE_MULTIPLY(1, 4, 7);
    if (both) {
      TTX_TILE_LOAD(5, a + 16 * lda + k, lda);
      TTX_TILE_MULTIPLY(2, 5, 6);
      TTX_TILE_MULTIPLY(3, 5, 7);
    }
  }
  constexpr long row_nbytes = kPanel * sizeof(std::int32_t);
  TTX_TILE_STORE(0, tile, row_nbytes);
  TTX_TILE_STORE(1, tile + kLanes, row_nbytes);
  if (both) {
    TTX_TILE_STORE(2, tile + 16 * kPanel, row_nbytes);
    TTX_TILE_STORE(3, tile + 16 * kPanel + kLanes, row_nbytes);
  }
}

#undef TTX_TILE_MULTIPLY
#else
constexpr bool kHasAmxInt8 = false;
#endif

}  // namespace ttx::detail
