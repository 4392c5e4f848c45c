// AMX tiles: the registers of up to 16 rows of 64 bytes that x86 servers multiply matrices in.
//   in:  nothing; Linux gives tiles to a process that asks for them
//   out: amx_is_usable(), the shapes of tiles for up to 32 rows, and their instructions
//   used by gemm_int8_amx.h and gemm_bf16_amx.h, for the same four tiles of sums
//
// Written as instructions: GCC's own intrinsics are the same text behind half a second of headers.
#pragma once

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__linux__)
#define TTX_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ttx::detail {

constexpr int kAmxRows = 32;

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
#else
inline bool amx_is_usable() { return false; }
#endif

}  // namespace ttx::detail
