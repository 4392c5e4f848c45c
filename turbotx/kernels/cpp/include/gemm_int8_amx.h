// The int8 GEMM's inner product by AMX: 32 rows by 32 columns in four tile registers.
//   in:  up to 32 rows of int8 activations, depth a multiple of 64; a panel as gemm_int8_tile.h has it
//   out: an int32 tile, rows x kPanel, of exact sums: a * w, panels without an offset
//   used by gemm_int8.h where amx_is_usable(): Linux gives tiles to a process that asks for them
//
// Written as instructions: GCC's own intrinsics are the same text behind half a second of headers.
#pragma once

#include "gemm_int8_tile.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define TTX_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ttx::detail {

constexpr int kAmxDepth = 64, kAmxRows = 32;

#ifdef TTX_AMX
inline bool amx_is_usable() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool usable = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return usable;
}

// Tiles 0 to 3 are sums (rows 0 to 15 by both column halves, then the other rows), 4 and 5 rows of
// A, 6 and 7 columns of the panel. Other code in the thread may have left other tiles.
class AmxTiles {
 public:
  AmxTiles() = default;
  ~AmxTiles() {
    if (rows_ > 0) asm volatile("tilerelease");
  }
  void shape_for(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    Config config{};
    auto set = [&](int tile, int count) {
      config.rows[tile] = static_cast<std::uint8_t>(count);
      config.row_nbytes[tile] = count > 0 ? 64 : 0;
    };
    int first = rows < 16 ? rows : 16, second = rows - first;
    for (int tile : {0, 1, 4}) set(tile, first);
    for (int tile : {2, 3, 5}) set(tile, second);
    for (int tile : {6, 7}) set(tile, 16);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }

 private:
  struct alignas(64) Config {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_nbytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  int rows_ = 0;
};

#define TTX_TILE_LOAD(tile, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(p), "r"(long(stride)) : "memory")
#define TTX_TILE_STORE(tile, p, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(p), "r"(long(stride)) : "memory")
#define TTX_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
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

#undef TTX_TILE_LOAD
#undef TTX_TILE_STORE
#undef TTX_TILE_ZERO
#undef TTX_TILE_MULTIPLY
#else
inline bool amx_is_usable() { return false; }
#endif

}  // namespace ttx::detail
