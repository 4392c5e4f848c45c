// C = finish(A W^T): a linear layer of float rows by a weight of int4, with a scale a group of inputs.
//   in:  A [m][k], float, bf16 or f16; W as rows of bytes, two numbers each (`pack_int4` of
//        ir/int4_ops.py), packed as panels; scales and offsets in panels of their own
//   out: C [m][n] of A's type: sums of a group in float32, scaled, added up, finished, rounded once
//   example:  ttx::PackedInt4 w(bytes, n, depth / 2);
//             ttx::linear_int4(w, {scale_panels, 32, depth / 32, k}, a, lda, m, c, n, finish);
//
// Eight k of a column are one dword: k = 0 2 4 6 in its low half, k = 1 3 5 7 in its high one, so that
// a table of the sixteen numbers gives floats as well as the pairs that vdpbf16ps multiplies.
#pragma once

#include "gemm.h"

namespace ttx {

namespace detail {

template <>
struct PanelLayout<std::uint8_t> { static constexpr int step = 4; };

constexpr int kOctet = 8;  // k of one column that are neighbours

}  // namespace detail

using PackedInt4 = PackedWeight<std::uint8_t>;  // its k counts bytes

// panels: [panel][groups][kPanel] as PackedWeight has them, bf16 or, if wide, float32; if shifted each
// group's offsets follow its scales: w = number * scale + offset. group: inputs, a multiple of 8;
// k: inputs before they were filled up to whole groups.
struct GroupScales {
  const void* panels;
  long group, groups, k;
  bool wide = false, shifted = false;
};

namespace detail {

TTX_INLINE vec load_scales(const GroupScales& s, long at) {
  return s.wide ? load_vec(static_cast<const float*>(s.panels) + at)
                : load_vec(static_cast<const bf16*>(s.panels) + at);
}

// Number `which` (0 to 7 by k) of each octet as a float, -8 to 7.
TTX_INLINE vec widen_int4(uint_vec octets, int which) {
  int nibble = which % 2 * 4 + which / 2;
#ifdef __AVX512F__
  constexpr vec table = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  vec out;
  asm("vpermps %2, %1, %0" : "=v"(out) : "v"(octets >> (4 * nibble)), "v"(table));  // low four bits
  return out;
#else
  return __builtin_convertvector(__builtin_bit_cast(int_vec, octets << (28 - 4 * nibble)) >> 28, vec);
#endif
}

template <int WAYS, int ROWS>
TTX_INLINE void add_octets(vec (&sum)[WAYS][ROWS][2], const float* a, long lda, uint_vec left,
                           uint_vec right) {
  add_widened<kOctet>(sum, a, lda, [&](int i, int half) __attribute__((always_inline)) {
    return widen_int4(half ? right : left, i);
  });
}

#ifdef __AVX512BF16__
typedef std::uint16_t short_lanes __attribute__((vector_size(kLanes * 4)));

// Numbers 2 * which and the next of each octet as two bf16. Of a word's five low bits that vpermw looks
// at, one belongs to another number: the table has all sixteen twice.
TTX_INLINE int_vec widen_int4_pair(uint_vec octets, int which) {
  constexpr short_lanes table = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
      0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
      0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
  int_vec out;
  short_lanes words = __builtin_bit_cast(short_lanes, octets) >> (4 * which);
  asm("vpermw %2, %1, %0" : "=v"(out) : "v"(words), "v"(table));
  return out;
}

template <int WAYS, int ROWS>
TTX_INLINE void add_octets(vec (&sum)[WAYS][ROWS][2], const bf16* a, long lda, uint_vec left,
                           uint_vec right) {
  add_widened_pairs<kOctet>(sum, a, lda, [&](int i, int half) __attribute__((always_inline)) {
    return widen_int4_pair(half ? right : left, i);
  });
}
#endif

// Some rows, filled up to whole groups by zeros, and of each the sums of its groups, [rows][groups],
// which offsets are multiplied by; null where there are none.
template <class A>
struct Int4Rows {
  const A* a;
  long lda;
  const float* sums;
};

// As multiply_panel of gemm_tile.h. Few rows have more than one chain of sums each: additions that wait
// for each other would be slower than memory.
template <class A, int ROWS>
void multiply_panel_int4(const Int4Rows<A>& x, const std::uint8_t* panel, const GroupScales& s,
                         long scales, NextPanel next, float* tile) {
  constexpr int ways = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
  for (long g = 0; g < s.groups; ++g) {
    vec sum[ways][ROWS][2] = {};
    for (long k = g * s.group; k < (g + 1) * s.group; k += kOctet, panel += kOctet / 2 * kPanel) {
      fetch(next, k);
      uint_vec left, right;
      std::memcpy(&left, panel, sizeof left);
      std::memcpy(&right, panel + kOctet / 2 * kLanes, sizeof right);
      add_octets<ways, ROWS>(sum, x.a + k, x.lda, left, right);
    }
#pragma GCC unroll 4
    for (int way = 1; way < ways; ++way)
#pragma GCC unroll 4
      for (int i = 0; i < 2 * ROWS; ++i) sum[0][i / 2][i % 2] += sum[way][i / 2][i % 2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vec scale = load_scales(s, scales + half * kLanes), offset = {};
      if (s.shifted) offset = load_scales(s, scales + kPanel + half * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        float* p = tile + (2 * r + half) * kLanes;
        vec made = sum[0][r][half] * scale;
        if (g > 0) made += load_vec(p);
        if (s.shifted) made += broadcast(x.sums[r * s.groups + g]) * offset;
        store_vec(p, made);
      }
    }
    scales += (1 + s.shifted) * kPanel;
  }
}

template <class A, int ROWS = kGemmRows>
void multiply_rows_int4(int rows, const Int4Rows<A>& x, const std::uint8_t* panel,
                        const GroupScales& s, long scales, NextPanel next, float* tile) {
  if (rows == ROWS) return multiply_panel_int4<A, ROWS>(x, panel, s, scales, next, tile);
  constexpr int fewer = ROWS > kBestRows ? ROWS - 2 : ROWS - 1;
  if constexpr (fewer > 0) multiply_rows_int4<A, fewer>(rows, x, panel, s, scales, next, tile);
}

// As multiply_panels of gemm.h.
template <class A, class T, class Finish>
void multiply_panels_int4(const PackedInt4& w, const GroupScales& s, Range groups, Range rows,
                          const Int4Rows<A>& x, T* c, long ldc, const Finish& finish) {
  constexpr int size = kGemmRows * kPanel;
  alignas(64) float tile[2 * size];
  long m = rows.end - rows.begin, tiles = count_tiles(m, x.lda * static_cast<long>(sizeof(A)));
  for (long g = groups.begin; g < groups.end; ++g) {
    bool is_last = g + 1 == groups.end;
    const char* next = reinterpret_cast<const char*>(w.panel((is_last ? g : g + 1) * w.group));
    long share = is_last ? 0 : w.panel_size() / tiles;
    for (long t = 0; t < tiles; ++t) {
      long first = rows.begin + m * t / tiles, end = rows.begin + m * (t + 1) / tiles;
      int count = static_cast<int>(end - first);
      Int4Rows<A> some{x.a + first * x.lda, x.lda, x.sums + first * s.groups};
      for (long p = g * w.group; p < (g + 1) * w.group; ++p, next += share) {
        NextPanel ahead{next, share / (s.groups * s.group)};
        if (tiles == 1) ahead = read_once(w.panel(p), kPanel / 2);
        multiply_rows_int4<A>(count, some, w.panel(p), s, p * s.groups * (1 + s.shifted) * kPanel, ahead,
                              tile + p % w.group * size);
      }
      finish_tile(tile, tile + (w.group - 1) * size, first, count, g * kPanel, w.n, c, ldc, finish);
    }
  }
}

// Reads rows as `Read`: copied where they are of another type, or are filled up.
template <class Read, class T, class Finish>
void linear_int4_by(const PackedInt4& w, const GroupScales& s, const T* a, long lda, long m, T* c,
                    long ldc, const Finish& finish) {
  int threads = usable_threads(m * w.n * s.k * w.group, 50000);
  const long depth = s.groups * s.group;
  const bool copied = !std::is_same_v<T, Read> || depth != s.k;
  const long row_floats = copied ? (m * depth * static_cast<long>(sizeof(Read)) + 63) / 64 * 16 : 0;
  float* scratch = thread_scratch(row_floats + (s.shifted ? m * s.groups : 0));
  auto* rows = reinterpret_cast<Read*>(scratch);
  float* sums = scratch + row_floats;
  if (copied || s.shifted)
    share_rows(m, threads > 1, [=, &s](long begin, long end) {
      for (long r = begin; r < end; ++r) {
        const T* from = a + r * lda;
        for (long i = 0; copied && i < depth; ++i)
          rows[r * depth + i] = from_float<Read>(i < s.k ? to_float(from[i]) : 0.0f);
        for (long g = 0; s.shifted && g < s.groups; ++g) {
          float sum = 0;
          for (long i = g * s.group; i < (g + 1) * s.group && i < s.k; ++i) sum += to_float(from[i]);
          sums[r * s.groups + g] = sum;
        }
      }
    });
  Int4Rows<Read> x{rows, depth, sums};
  if constexpr (std::is_same_v<T, Read>)
    if (!copied) x = {a, lda, sums};
  long blocks = (m + 255) / 256;
  share(threads, [&](long t) {
    Range groups{w.groups() * t / threads, w.groups() * (t + 1) / threads};
    for (long b = 0; b < blocks; ++b) {
      Range some{m * b / blocks, m * (b + 1) / blocks};
      multiply_panels_int4(w, s, groups, some, x, c, ldc, finish);
    }
  });
}

}  // namespace detail

// T is the type of A, of C, and of what the finish reads.
template <class T, class Finish = Epilogue<T>>
void linear_int4(const PackedInt4& w, const GroupScales& s, const T* a, long lda, long m, T* c,
                 long ldc, const Finish& finish = {}) {
  if (m == 0 || w.n == 0) return;
  if constexpr (detail::kReadsRows<T>)
    if (std::is_same_v<T, float> || detail::pairs_are_fast())
      return detail::linear_int4_by<T>(w, s, a, lda, m, c, ldc, finish);
  detail::linear_int4_by<float>(w, s, a, lda, m, c, ldc, finish);
}

}  // namespace ttx
