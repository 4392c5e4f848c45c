// The inner product of the int8 GEMM: some rows of int8 activations times one panel of weights.
//   in:  A row by row, at least padded_depth_int8(k) bytes long; a panel of kPanel columns, four
//        consecutive k of one column side by side
//   out: an int32 tile, rows x kPanel, of exact sums: a * (w + kWeightOffset)
//   used by gemm_int8.h; ROWS is compile-time so that the accumulators stay in registers
//
// vpdpbusd multiplies unsigned by signed: with it the panel holds w + 128, so that activations stay
// as they are and are spread over the lanes by their load; 128 times a row's own sum comes off again.
#pragma once

#include "gemm_tile.h"

namespace ttx::detail {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define TTX_VNNI 1
constexpr int kWeightOffset = 128;
#else
constexpr int kWeightOffset = 0;
#endif

constexpr int kQuad = 4;  // k of one column that are neighbours

typedef std::int16_t short_vec __attribute__((vector_size(kLanes * 4)));

#ifdef TTX_VNNI
// sum[i] += the four products of a[4i ..] and w[4i ..], w unsigned.
TTX_INLINE void multiply_quads(int_vec& sum, int_vec quad, int_vec weights) {
#ifdef __AVX512VNNI__
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(quad));
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(quad));
#endif
}
#elif defined(__AVX2__)
// Two vpmaddwd of int16 pairs: vpmaddubsw would saturate. The pairs are the even and the odd bytes.
TTX_INLINE void multiply_quads(int_vec& sum, int_vec quad, int_vec weights) {
  auto shorts = [](int_vec x) { return __builtin_bit_cast(short_vec, x); };
  auto even = [&](int_vec x) { return (shorts(x) << 8) >> 8; };  // bytes 0 and 2 of each quad
  auto odd = [&](int_vec x) { return shorts(x) >> 8; };
  int_vec low, high;
  asm("vpmaddwd %2, %1, %0" : "=x"(low) : "x"(even(quad)), "x"(even(weights)));
  asm("vpmaddwd %2, %1, %0" : "=x"(high) : "x"(odd(quad)), "x"(odd(weights)));
  sum += low + high;
}
#else
TTX_INLINE void multiply_quads(int_vec& sum, int_vec quad, int_vec weights) {
#pragma GCC unroll 4
  for (int shift = 24; shift >= 0; shift -= 8) sum += ((quad << shift) >> 24) * ((weights << shift) >> 24);
}
#endif

template <int ROWS>
void multiply_panel_int8(const std::int8_t* a, long lda, const std::int8_t* panel, long depth,
                         NextPanel next, std::int32_t* tile) {
  int_vec sum[ROWS][2] = {};
  for (long k = 0; k < depth; k += kQuad, panel += kQuad * kPanel) {
    fetch(next, k);
    int_vec left, right;
    std::memcpy(&left, panel, sizeof left);
    std::memcpy(&right, panel + kQuad * kLanes, sizeof right);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      std::int32_t quad;
      std::memcpy(&quad, a + r * lda + k, sizeof quad);
      int_vec spread = int_vec{} + quad;
      multiply_quads(sum[r][0], spread, left);
      multiply_quads(sum[r][1], spread, right);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < 2 * ROWS; ++i) std::memcpy(tile + i * kLanes, &sum[i / 2][i % 2], sizeof(int_vec));
}

template <int ROWS = kGemmRows>
void multiply_rows_int8(int rows, const std::int8_t* a, long lda, const std::int8_t* panel,
                        long depth, NextPanel next, std::int32_t* tile) {
  if (rows == ROWS) return multiply_panel_int8<ROWS>(a, lda, panel, depth, next, tile);
  constexpr int fewer = ROWS > kBestRows ? ROWS - 2 : ROWS - 1;
  if constexpr (fewer > 0) multiply_rows_int8<fewer>(rows, a, lda, panel, depth, next, tile);
}

}  // namespace ttx::detail
