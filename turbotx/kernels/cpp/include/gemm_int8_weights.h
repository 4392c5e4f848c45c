// C = finish(scales * (A W^T)): a linear layer of float rows by an int8 weight, sums in float32.
//   in:  A [m][k], float, bf16 or f16; W as `PackedInt8` of gemm_int8.h keeps it, a scale a column
//   out: C [m][n] of A's type: float32 sums, scaled, finished, rounded once
//   example:  ttx::PackedInt8 w(weight, n, k);
//             ttx::linear_int8_weights(w, a, lda, m, weight_scales, c, n, ttx::Epilogue<float>{});
//
// Of few rows W becomes floats in registers, or pairs of bf16, in which int8 is exact, anew for each tile
// of rows; a single tile waits for W's bytes. Of many rows each panel is widened once, and multiplied as
// a float weight's is: on Zen 5 in bf16 that is twice as slow for 16 rows, as fast for 128, and 12 %
// faster for 256.
#pragma once

#include "gemm_int8.h"

namespace ttx {

namespace detail {

// Bytes `which` (0 to 3) of the quads as floats; `flip` takes the panels' offset off.
TTX_INLINE vec widen_quads(int_vec quads, int which) {
  return __builtin_convertvector((quads << (24 - 8 * which)) >> 24, vec);
}

struct QuadPair { int_vec left, right; };

TTX_INLINE QuadPair load_quads(const std::int8_t* panel, std::int32_t flip) {
  QuadPair pair;
  std::memcpy(&pair.left, panel, sizeof pair.left);
  std::memcpy(&pair.right, panel + kQuad * kLanes, sizeof pair.right);
  return {pair.left ^ flip, pair.right ^ flip};
}

inline long padded_quads(long k) { return (k + kQuad - 1) / kQuad * kQuad; }

// What takes 128 off every byte of a panel that was stored plus 128.
inline std::int32_t flip_of(const PackedInt8& w) {
  return w.offset == 0 ? 0 : static_cast<std::int32_t>(0x80808080u);
}

template <int WAYS, int ROWS>
TTX_INLINE void add_quads(vec (&sum)[WAYS][ROWS][2], const float* a, long lda, QuadPair quads) {
  add_widened<kQuad>(sum, a, lda, [&](int i, int half) __attribute__((always_inline)) {
    return widen_quads(half ? quads.right : quads.left, i);
  });
}

#ifdef __AVX512BF16__
// Bytes `first` and first + 1 of the quads as two bf16: the low halves of such floats are zero.
TTX_INLINE int_vec widen_quads_pair(int_vec quads, int first) {
  auto bits = [&](int i) { return __builtin_bit_cast(uint_vec, widen_quads(quads, i)); };
  return __builtin_bit_cast(int_vec, bits(first) >> 16 | bits(first + 1));
}

template <int WAYS, int ROWS>
TTX_INLINE void add_quads(vec (&sum)[WAYS][ROWS][2], const bf16* a, long lda, QuadPair quads) {
  add_widened_pairs<kQuad>(sum, a, lda, [&](int i, int half) __attribute__((always_inline)) {
    return widen_quads_pair(half ? quads.right : quads.left, 2 * i);
  });
}
#endif

// As multiply_panel of gemm_tile.h. depth is a multiple of kQuad, past k of zeros. Few rows have more
// than one chain of sums each: additions that wait for each other would be slower than memory.
template <class A, int ROWS>
void multiply_panel_widened(const A* a, long lda, const std::int8_t* panel, long depth,
                            std::int32_t flip, NextPanel next, float* tile) {
  constexpr int ways = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
  for (long begin = 0; begin < depth; begin += kChain) {
    long end = begin + kChain < depth ? begin + kChain : depth;
    vec sum[ways][ROWS][2] = {};
    for (long k = begin; k < end; k += kQuad, panel += kQuad * kPanel) {
      fetch(next, k);
      add_quads<ways, ROWS>(sum, a + k, lda, load_quads(panel, flip));
    }
#pragma GCC unroll 4
    for (int way = 1; way < ways; ++way)
#pragma GCC unroll 4
      for (int i = 0; i < 2 * ROWS; ++i) sum[0][i / 2][i % 2] += sum[way][i / 2][i % 2];
    add_to_tile<ROWS>(sum[0], begin == 0, tile);
  }
}

template <class A, int ROWS = kGemmRows>
void multiply_rows_widened(int rows, const A* a, long lda, const std::int8_t* panel, long depth,
                           std::int32_t flip, NextPanel next, float* tile) {
  if (rows == ROWS) return multiply_panel_widened<A, ROWS>(a, lda, panel, depth, flip, next, tile);
  constexpr int fewer = ROWS > kBestRows ? ROWS - 2 : ROWS - 1;
  if constexpr (fewer > 0)
    multiply_rows_widened<A, fewer>(rows, a, lda, panel, depth, flip, next, tile);
}

// A panel as PackedWeight<W> has it: k by k, or, for vdpbf16ps, two k of a column side by side.
inline void widen_panel(const std::int8_t* panel, long depth, std::int32_t flip, float* out) {
  for (long k = 0; k < depth; k += kQuad, panel += kQuad * kPanel, out += kQuad * kPanel) {
    QuadPair quads = load_quads(panel, flip);
#pragma GCC unroll 4
    for (int i = 0; i < kQuad; ++i) {
      store_vec(out + i * kPanel, widen_quads(quads.left, i));
      store_vec(out + i * kPanel + kLanes, widen_quads(quads.right, i));
    }
  }
}
#ifdef __AVX512BF16__
TTX_INLINE void store_pairs(bf16* out, int_vec quads, int first) {
  int_vec pairs = widen_quads_pair(quads, first);
  std::memcpy(out, &pairs, sizeof pairs);
}
inline void widen_panel(const std::int8_t* panel, long depth, std::int32_t flip, bf16* out) {
  for (long k = 0; k < depth; k += kQuad, panel += kQuad * kPanel, out += kQuad * kPanel) {
    QuadPair quads = load_quads(panel, flip);
#pragma GCC unroll 2
    for (int i = 0; i < kQuad; i += 2) {
      store_pairs(out + i * kPanel, quads.left, i);
      store_pairs(out + i * kPanel + 2 * kLanes, quads.right, i);
    }
  }
}
#endif

// Multiplies sums by their columns' scales before they are finished.
template <class Finish>
struct ScaledFinish {
  const float* scales;  // [n], or [2n] where gated
  long gated;           // n where it is, else 0
  Finish finish;
  TTX_INLINE auto columns(long column, int count) const {
    vec scale = load_some(scales + column, count);
    vec factor_scale = load_some(scales + gated + column, count);
    return [=, map = finish.columns(column, count)](vec x, vec factor, long row)
        __attribute__((always_inline)) { return map(x * scale, factor * factor_scale, row); };
  }
};

// Some groups of panels, widened in registers, times rows of A that a quad may be read past the end of.
template <class A, class T, class Finish>
void multiply_few_rows(const PackedInt8& w, Range groups, long m, const A* a, long lda, T* c, long ldc,
                       const Finish& finish) {
  constexpr int size = kGemmRows * kPanel;
  alignas(64) float tile[2 * size];
  const long tiles = count_tiles(m, lda * static_cast<long>(sizeof(A)));
  for (long g = groups.begin; g < groups.end; ++g) {
    for (long t = 0; t < tiles; ++t) {
      const long first = m * t / tiles;
      const int count = static_cast<int>(m * (t + 1) / tiles - first);
      for (long p = 0; p < w.group; ++p) {
        const std::int8_t* panel = w.panel(g * w.group + p);
        NextPanel next = read_once(panel, kPanel);
        if (t > 0) next = {reinterpret_cast<const char*>(panel), 0};
        multiply_rows_widened(count, a + first * lda, lda, panel, padded_quads(w.k), flip_of(w), next,
                              tile + p * size);
      }
      finish_tile(tile, tile + (w.group - 1) * size, first, count, g * kPanel, w.n, c, ldc, finish);
    }
  }
}

// Some groups of panels times some rows of A; `room` takes a group's panels, widened to A's type.
template <class A, class T, class Finish>
void multiply_many_rows(const PackedInt8& w, Range groups, Range rows, const A* a, long lda, A* room,
                        T* c, long ldc, const Finish& finish) {
  constexpr int size = kGemmRows * kPanel;
  alignas(64) float tile[2 * size];
  long depth = padded_quads(w.k), m = rows.end - rows.begin;
  long tiles = count_tiles(m, lda * static_cast<long>(sizeof(A)));
  for (long g = groups.begin; g < groups.end; ++g) {
    for (long p = 0; p < w.group; ++p)
      widen_panel(w.panel(g * w.group + p), depth, flip_of(w), room + p * depth * kPanel);
    for (long t = 0; t < tiles; ++t) {
      long first = rows.begin + m * t / tiles, end = rows.begin + m * (t + 1) / tiles;
      int count = static_cast<int>(end - first);
      for (long p = 0; p < w.group; ++p)
        multiply_rows_of<A, A>(count, a + first * lda, lda, room + p * depth * kPanel, w.k,
                               {reinterpret_cast<const char*>(room), 0}, tile + p * size);
      finish_tile(tile, tile + (w.group - 1) * size, first, count, g * kPanel, w.n, c, ldc, finish);
    }
  }
}

constexpr long kFewRows = 64;

// Rows read as `Read`: copied where they are of another type, or, of few, where a quad would reach past
// their end. Each thread has room for a group's panels, widened, where rows are many.
template <class Read, class T, class Finish>
void linear_int8_weights_by(const PackedInt8& w, const T* a, long lda, long m, T* c, long ldc,
                            const Finish& finish) {
  const bool few = m <= kFewRows;
  const int threads = usable_threads(m * w.n * w.k * w.group, 50000);
  const long depth = padded_quads(w.k);
  const bool copied = !std::is_same_v<T, Read> || (few && depth != w.k);
  const auto floats = [](long count) { return (count * static_cast<long>(sizeof(Read)) + 63) / 64 * 16; };
  const long room = few ? 0 : floats(w.group * depth * kPanel), copy = copied ? floats(m * depth) : 0;
  float* scratch = thread_scratch(copy + threads * room);
  auto* made = reinterpret_cast<Read*>(scratch);
  if (copied)
    share_rows(m, threads > 1, [=, &w](long begin, long end) {
      for (long r = begin; r < end; ++r)
        for (long i = 0; i < depth; ++i)
          made[r * depth + i] = from_float<Read>(i < w.k ? to_float(a[r * lda + i]) : 0.0f);
    });
  const Read* read = made;
  if constexpr (std::is_same_v<T, Read>) read = copied ? made : a;
  const long ld = copied ? depth : lda, blocks = (m + 255) / 256;
  share(threads, [&](long t) {
    Range groups{w.groups() * t / threads, w.groups() * (t + 1) / threads};
    if (few) return multiply_few_rows(w, groups, m, read, ld, c, ldc, finish);
    auto* own = reinterpret_cast<Read*>(scratch + copy + t * room);
    for (long b = 0; b < blocks; ++b)
      multiply_many_rows(w, groups, {m * b / blocks, m * (b + 1) / blocks}, read, ld, own, c, ldc, finish);
  });
}

}  // namespace detail

// T is the type of A, of C, and of what the finish reads.
template <class T, class Finish = Epilogue<T>>
void linear_int8_weights(const PackedInt8& w, const T* a, long lda, long m,
                         const float* weight_scales, T* c, long ldc, const Finish& finish = {}) {
  if (m == 0 || w.n == 0) return;
  detail::ScaledFinish<Finish> scaled{weight_scales, w.group == 2 ? w.n : 0, finish};
  if constexpr (detail::kReadsRows<T> && !std::is_same_v<T, float>)
    if (detail::pairs_are_fast() && m > 2)  // one or two wait for W's bytes either way
      return detail::linear_int8_weights_by<T>(w, a, lda, m, c, ldc, scaled);
  detail::linear_int8_weights_by<float>(w, a, lda, m, c, ldc, scaled);
}

}  // namespace ttx
