// The bf16 GEMM's inner product by AMX: 32 rows by 32 columns in four tile registers.
//   in:  up to 32 rows of bf16, depth a multiple of 32; a panel as gemm_tile.h has it, in pairs of k
//   out: a float32 tile, rows x kPanel; one chain of sums for all of k, as vdpbf16ps has it
//   used by gemm.h where TTX_AMX_BF16 and amx_is_usable()
#pragma once

#include "amx.h"
#include "gemm_tile.h"

namespace ttx::detail {

constexpr int kAmxPairs = 32;  // k of one tile of A

#if defined(TTX_AMX) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TTX_AMX_BF16 1

#define TTX_TILE_MULTIPLY(sum, a, w) \
  asm volatile("tdpbf16ps %%tmm" #w ", %%tmm" #a ", %%tmm" #sum ::)

inline void multiply_amx(AmxTiles& tiles, int rows, const bf16* a, long lda, const bf16* panel,
                         long depth, NextPanel next, float* tile) {
  tiles.shape_for(rows);
  constexpr long pairs = 2 * kLanes, width = 2 * pairs * sizeof(bf16);
  const long stride = lda * static_cast<long>(sizeof(bf16));
  bool both = rows > 16;
  TTX_TILE_ZERO(0);
  TTX_TILE_ZERO(1);
  if (both) {
    TTX_TILE_ZERO(2);
    TTX_TILE_ZERO(3);
  }
  for (long k = 0; k < depth; k += kAmxPairs, panel += kAmxPairs * kPanel) {
    for (long line = 0; line < next.bytes_per_k * kAmxPairs; line += 64)
      __builtin_prefetch(next.address + next.bytes_per_k * k + line, 0, 2);
    TTX_TILE_LOAD(6, panel, width);
    TTX_TILE_LOAD(4, a + k, stride);
    TTX_TILE_MULTIPLY(0, 4, 6);
    TTX_TILE_LOAD(7, panel + pairs, width);
    TTX_TILE_MULTIPLY(1, 4, 7);
    if (both) {
      TTX_TILE_LOAD(5, a + 16 * lda + k, stride);
      TTX_TILE_MULTIPLY(2, 5, 6);
      TTX_TILE_MULTIPLY(3, 5, 7);
    }
  }
  constexpr long row_nbytes = kPanel * sizeof(float);
  TTX_TILE_STORE(0, tile, row_nbytes);
  TTX_TILE_STORE(1, tile + kLanes, row_nbytes);
  if (both) {
    TTX_TILE_STORE(2, tile + 16 * kPanel, row_nbytes);
    TTX_TILE_STORE(3, tile + 16 * kPanel + kLanes, row_nbytes);
  }
}

#undef TTX_TILE_MULTIPLY
#endif

}  // namespace ttx::detail
