// AMX: products of 32 rows by 32 columns in four tile registers of x86 servers.
//   in:  up to 32 rows of int8 or bf16, each a multiple of 64 bytes; a panel in which 4 bytes of a
//        column are neighbours, as gemm_int8_tile.h and gemm_tile.h have it
//   out: a tile of sums, rows x kPanel: int32, exact, of panels without an offset; or float32, one
//        chain for all of k, as vdpbf16ps has it
//   used by gemm.h and gemm_int8.h where uses_amx(): Linux gives tiles to a process
//   that asks for them
//
// Written as instructions: GCC's own intrinsics are the same text behind half a second of headers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemm_tile.h"

#if defined(__AMX_TILE__) && defined(__linux__)
#define TTX_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ttx::detail {

constexpr int kAmxRows = 32;

// How many k of a type one tile takes.
template <class T>
constexpr long kAmxDepth = 64 / sizeof(T);

// Whether the compiler's target multiplies a type in tiles.
template <class T>
constexpr bool kHasAmx = false;
#if defined(TTX_AMX) && defined(__AMX_INT8__)
template <>
constexpr bool kHasAmx<std::int8_t> = true;
#endif
#if defined(TTX_AMX) && defined(__AMX_BF16__) && defined(__AVX512BF16__)  // panels are in pairs
template <>
constexpr bool kHasAmx<bf16> = true;
#endif

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
#define TTX_TILE_MULTIPLY(sum, a, w)                                         \
  if constexpr (std::is_same_v<T, bf16>)                                     \
    asm volatile("tdpbf16ps %%tmm" #w ", %%tmm" #a ", %%tmm" #sum ::);       \
  else                                                                       \
    asm volatile("tdpbssd %%tmm" #w ", %%tmm" #a ", %%tmm" #sum ::)

template <class T, class Sum>
void multiply_amx(AmxTiles& tiles, int rows, const T* a, long lda, const T* panel, long depth,
                  NextPanel next, Sum* tile) {
  tiles.shape_for(rows);
  constexpr long size = sizeof(T), width = 4 * kPanel, half = 4 * kLanes / size;
  bool both = rows > 16;
  TTX_TILE_ZERO(0);
  TTX_TILE_ZERO(1);
  if (both) {
    TTX_TILE_ZERO(2);
    TTX_TILE_ZERO(3);
  }
  for (long k = 0; k < depth; k += kAmxDepth<T>, panel += kAmxDepth<T> * kPanel) {
    for (long line = 0; line < next.bytes_per_k * kAmxDepth<T>; line += 64)
      __builtin_prefetch(next.address + next.bytes_per_k * k + line, 0, 2);
    TTX_TILE_LOAD(6, panel, width);
    TTX_TILE_LOAD(4, a + k, lda * size);
    TTX_TILE_MULTIPLY(0, 4, 6);
    TTX_TILE_LOAD(7, panel + half, width);
    TTX_TILE_MULTIPLY(1, 4, 7);
    if (both) {
      TTX_TILE_LOAD(5, a + 16 * lda + k, lda * size);
      TTX_TILE_MULTIPLY(2, 5, 6);
      TTX_TILE_MULTIPLY(3, 5, 7);
    }
  }
  constexpr long row_nbytes = kPanel * sizeof(Sum);
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

struct AmxTiles {};

template <class T, class Sum>  // never called
void multiply_amx(AmxTiles&, int, const T*, long, const T*, long, NextPanel, Sum*);
#endif

// Whether this process may multiply a type in tiles.
template <class T>
inline bool uses_amx() { return kHasAmx<T> && amx_is_usable(); }

}  // namespace ttx::detail
