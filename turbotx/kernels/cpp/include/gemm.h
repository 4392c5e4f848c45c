// C = finish(A W^T): a linear layer over weights packed once, its output written in place.
//   in:  A [m][k] with row stride lda; W as torch's Linear keeps it, [n][k], or by any two strides;
//        float, bf16 or f16, both the same type
//   out: C [m][n] with row stride ldc; sums are float32, rounded once after the epilogue
//   example:  ttx::PackedWeight<float> w(weight, n, k);  // a copy: the weight itself is free to go
//             ttx::linear(w, a, k, m, c, n, ttx::Epilogue<float>{.bias = bias});
//
// The engine reads weights in order while the threads share out the columns. On Zen 4 it is ahead
// of MKL's packed sgemm at every size and of oneDNN up to 256 tokens, and beside
// it at 1,024 (benchmarks/results/cpu_kernels.json); its sums are at least as accurate as MKL's.
#pragma once

#include <type_traits>

#include "epilogue.h"
#include "gemm_amx.h"
#include "gemm_tile.h"
#include "pack_panel.h"
#include "scratch.h"
#include "threads.h"
#include "weight_memory.h"

namespace ttx {

// Rows of a weight: element (row j, column i) is w[j * stride_n + i * stride_k].
template <class T>
struct WeightPart { const T* w; long rows, stride_n, stride_k; };

// The columns of panel p of a weight of n outputs in parts, `group` panels for as many columns of C.
template <class T>
detail::PanelSource<T> columns_of(const WeightPart<T>* parts, long count, long p, long group, long n) {
  detail::PanelSource<T> found;
  for (int c = 0; c < detail::kPanel; ++c) {
    long j = p / group * detail::kPanel + c, row = j + p % group * n;
    const WeightPart<T>* part = parts;
    for (; part + 1 < parts + count && row >= part->rows; ++part) row -= part->rows;
    found.rows[c] = j < n ? part->w + row * part->stride_n : nullptr;
    found.steps[c] = part->stride_k;
  }
  return found;
}

// W packed for this file's engine: panels of kPanel columns, each padded_depth(k) deep.
//
// A gated layer's weight, [2n][k], makes n columns of activation(gate) * factor: panels of the gate
// and of the factor take turns, so that both sums of a column are at hand at once.
template <class T>
class PackedWeight {
 public:
  PackedWeight(const T* w, long n, long k) : PackedWeight(w, n, k, k, 1) {}
  // Element (output j, input i) is w[j * stride_n + i * stride_k]; n counts the columns of C.
  PackedWeight(const T* w, long n, long k, long stride_n, long stride_k, bool gated = false)
      : PackedWeight(n, k, gated) {
    WeightPart<T> all{w, gated ? 2 * n : n, stride_n, stride_k};
    fill(&all, 1);
  }
  // The same of parts, whose rows follow each other.
  PackedWeight(const WeightPart<T>* parts, long count, long n, long k, bool gated)
      : PackedWeight(n, k, gated) {
    fill(parts, count);
  }
  // Panels that lie elsewhere already, and stay there.
  PackedWeight(const T* panels, long n, long k, bool gated, std::true_type)
      : n(n), k(k), group(gated ? 2 : 1), panels_(panels) {}
  long groups() const { return (n + detail::kPanel - 1) / detail::kPanel; }
  long panel_size() const { return detail::padded_depth<T>(k) * detail::kPanel; }
  const T* panel(long p) const { return panels_ + p * panel_size(); }
  const long n, k, group;  // group: panels for kPanel columns of C, 2 where gated

 private:
  PackedWeight(long n, long k, bool gated)
      : n(n), k(k), group(gated ? 2 : 1), memory_(sizeof(T) * group * groups() * panel_size()),
        panels_(memory_.template as<const T>()) {}

  void fill(const WeightPart<T>* parts, long count) {
    constexpr int step = detail::PanelLayout<T>::step;
    T* out = memory_.template as<T>();
    share_rows(group * groups(), true, [=, this](long begin, long end) {
      for (long p = begin; p < end; ++p) {
        auto columns = columns_of(parts, count, p, group, n);
        detail::pack_panel<step>(columns, k, detail::padded_depth<T>(k), out + p * panel_size());
      }
    });
  }

  WeightMemory memory_;
  const T* panels_;
};

namespace detail {

template <class A, class W, int ROWS>
TTX_INLINE void multiply_rows(const A* a, long lda, const W* panel, long depth, NextPanel next,
                              float* tile) {
  if constexpr (std::is_same_v<A, float>) multiply_panel<W, ROWS>(a, lda, panel, depth, next, tile);
  else multiply_panel<ROWS>(a, lda, panel, depth, next, tile);
}

template <class A, class W, int ROWS = kGemmRows>
void multiply_rows_of(int rows, const A* a, long lda, const W* panel, long depth, NextPanel next,
                      float* tile) {
  if (rows == ROWS) return multiply_rows<A, W, ROWS>(a, lda, panel, depth, next, tile);
  constexpr int fewer = ROWS > kBestRows ? ROWS - 2 : ROWS - 1;
  if constexpr (fewer > 0) multiply_rows_of<A, W, fewer>(rows, a, lda, panel, depth, next, tile);
}

// `factor` is a second tile, of a gated layer, or the first again. Sums are float or int32.
template <class Sum, class T, class Finish>
void finish_tile(const Sum* tile, const Sum* factor, long row, int rows, long column, long n, T* c,
                 long ldc, const Finish& finish) {
  using Sums = std::conditional_t<std::is_same_v<Sum, float>, vec, int_vec>;
  for (long j = column; j < column + kPanel && j < n; j += kLanes, tile += kLanes, factor += kLanes) {
    auto finish_columns = [&](auto count) __attribute__((always_inline)) {
      auto map = finish.columns(j, count);
      for (int r = 0; r < rows; ++r) {
        Sums x, other;
        std::memcpy(&x, tile + r * kPanel, sizeof x);
        std::memcpy(&other, factor + r * kPanel, sizeof other);
        store_some(c + (row + r) * ldc + j, map(x, other, row + r), count);
      }
    };
    if (n - j >= kLanes) finish_columns(std::integral_constant<int, kLanes>{});
    else finish_columns(static_cast<int>(n - j));
  }
}

// How many tiles m rows are cut into: one, so that weights are read once, where a kernel takes them
// all (up to kBestRows, and the even numbers up to kGemmRows); else tiles of about kBestRows. Rows
// a multiple of 4 KB apart share a cache set, which holds kBestRows of them.
inline long count_tiles(long m, long row_nbytes) {
  bool single = m <= kBestRows || (m <= kGemmRows && m % 2 == 0 && row_nbytes % 4096 != 0);
  return single ? 1 : (m + kBestRows - 1) / kBestRows;
}

struct Range { long begin, end; };  // half-open

// Some groups of panels times some rows: each times every row while the next is on its way.
template <class A, class T, class Finish>
void multiply_panels(const PackedWeight<T>& w, Range groups, Range rows, const A* a, long lda, T* c,
                     long ldc, const Finish& finish) {
  constexpr bool may_amx = kHasAmx<T> && std::is_same_v<A, T>;
  constexpr int size = (may_amx ? kAmxRows : kGemmRows) * kPanel;
  alignas(64) float tile[2 * size];
  long m = rows.end - rows.begin, tiles = count_tiles(m, lda * static_cast<long>(sizeof(A)));
  bool amx = may_amx && m > 0 && w.k % kAmxDepth<T> == 0 && uses_amx<T>();
  if (amx) tiles = (m + kAmxRows - 1) / kAmxRows;
  [[maybe_unused]] AmxTiles registers;
  long panel_nbytes = w.panel_size() * static_cast<long>(sizeof(T));
  for (long g = groups.begin; g < groups.end; ++g) {
    bool is_last = g + 1 == groups.end;
    const char* next = reinterpret_cast<const char*>(w.panel((is_last ? g : g + 1) * w.group));
    long share = is_last ? 0 : panel_nbytes / tiles;
    for (long t = 0; t < tiles; ++t) {
      long first = rows.begin + m * t / tiles, end = rows.begin + m * (t + 1) / tiles;
      int count = static_cast<int>(end - first);
      for (long p = 0; p < w.group; ++p, next += share) {
        const T* panel = w.panel(g * w.group + p);
        NextPanel ahead{next, share / w.k};
        if (tiles == 1 && !amx) ahead = read_once(panel, panel_nbytes / w.k);
        if constexpr (may_amx)
          if (amx) {
            multiply_amx(registers, count, a + first * lda, lda, panel, w.k, ahead, tile + p * size);
            continue;
          }
        multiply_rows_of<A, T>(count, a + first * lda, lda, panel, w.k, ahead, tile + p * size);
      }
      finish_tile(tile, tile + (w.group - 1) * size, first, count, g * kPanel, w.n, c, ldc, finish);
    }
  }
}

// Whether the engine multiplies rows as they are stored; others are widened to float32 first.
template <class T>
constexpr bool kReadsRows = std::is_same_v<T, float> || PanelLayout<T>::step == 2;

// A copy of m rows in float32, side by side, in the calling thread's scratch; null where none is
// needed.
template <class T>
const float* widen_rows(const T* a, long lda, long m, long k, bool pays) {
  if constexpr (kReadsRows<T>) return nullptr;
  float* copy = thread_scratch(m * k);
  share_rows(m, pays, [=](long begin, long end) {
    for (long r = begin; r < end; ++r)
      for (long i = 0; i < k; ++i) copy[r * k + i] = to_float(a[r * lda + i]);
  });
  return copy;
}

}  // namespace detail

// finish.columns(column, count) is what maps (sums, the factor's sums, row) of `count` columns.
template <class T, class Finish = Epilogue<T>>
void linear(const PackedWeight<T>& w, const T* a, long lda, long m, T* c, long ldc,
            const Finish& finish = {}) {
  if (m == 0 || w.n == 0) return;
  // A second thread pays from about 50,000 multiply-adds on (Zen 4).
  int threads = usable_threads(m * w.n * w.k * w.group, 50000);
  [[maybe_unused]] const float* wide = detail::widen_rows<T>(a, lda, m, w.k, threads > 1);
  // Some 256 rows at a time: few enough for the second-level cache, enough to hide the weights.
  long blocks = (m + 255) / 256;
  share(threads, [&](long t) {
    detail::Range groups{w.groups() * t / threads, w.groups() * (t + 1) / threads};
    for (long b = 0; b < blocks; ++b) {
      detail::Range rows{m * b / blocks, m * (b + 1) / blocks};
      if constexpr (detail::kReadsRows<T>) detail::multiply_panels(w, groups, rows, a, lda, c, ldc, finish);
      else detail::multiply_panels(w, groups, rows, wide, w.k, c, ldc, finish);
    }
  });
}

}  // namespace ttx
