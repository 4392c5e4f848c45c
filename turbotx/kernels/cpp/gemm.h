// C = finish(A W^T): a linear layer over weights packed once, its output written in place.
//   in:  A [m][k] with row stride lda; W as torch's Linear keeps it, [n][k], or by any two strides;
//        float, bf16 or f16, both the same type
//   out: C [m][n] with row stride ldc; sums are float32, rounded once after the epilogue
//   example:  ttx::PackedWeight<float> w(weight, n, k);  // a copy: the weight itself is free to go
//             ttx::linear(w, a, k, m, c, n, ttx::Epilogue<float>{.bias = bias});
//
// The engine reads weights in order while the threads share out the columns. On Zen 4 it is ahead
// of MKL's packed sgemm (MklWeight, below) at every size and of oneDNN up to 256 tokens, and beside
// it at 1,024 (benchmarks/results/cpu_kernels.json); its sums are at least as accurate as MKL's.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "gemm_tile.h"
#include "mkl.h"
#include "scratch.h"
#include "threads.h"
#include "vecmath.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ttx {

enum class Activation { none, relu, gelu, gelu_tanh, silu };

// What happens to a float32 sum before it is stored: + bias, activation, + residual, in that order.
template <class T>
struct Epilogue {
  const T* bias = nullptr;
  Activation activation = Activation::none;
  const T* residual = nullptr;
  long ld_residual = 0;

  // x holds columns column .. column + count of a row; lanes past count are ignored.
  TTX_INLINE vec operator()(vec x, long row, long column, int count) const {
    if (bias != nullptr) x += load_some(bias + column, count);
    if (activation == Activation::gelu) x = ttx::gelu(x);
    else if (activation == Activation::relu) x = x < vec{} ? vec{} : x;
    else if (activation == Activation::gelu_tanh) x = ttx::gelu_tanh(x);
    else if (activation == Activation::silu) x = ttx::silu(x);
    if (residual != nullptr) x += load_some(residual + row * ld_residual + column, count);
    return x;
  }
};

// Memory for weights: 2 MB pages where the system gives them, so that streaming misses no TLB.
class WeightMemory {
 public:
  WeightMemory() = default;
  explicit WeightMemory(std::size_t nbytes) {
    constexpr std::size_t huge = std::size_t{2} << 20;
    std::size_t unit = nbytes >= 4 * huge ? huge : 64;
    std::size_t rounded = (nbytes + unit - 1) / unit * unit;
    data_ = std::aligned_alloc(unit, rounded > 0 ? rounded : unit);
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (unit == huge) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
  }
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;
  ~WeightMemory() { std::free(data_); }
  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

// W packed for this file's engine: panels of kPanel columns, each padded_depth(k) deep.
template <class T>
class PackedWeight {
 public:
  PackedWeight(const T* w, long n, long k) : PackedWeight(w, n, k, k, 1) {}
  // Element (output j, input i) is w[j * stride_n + i * stride_k].
  PackedWeight(const T* w, long n, long k, long stride_n, long stride_k)
      : n(n), k(k), memory_(sizeof(T) * panels() * panel_size()) {
    constexpr int step = detail::PanelLayout<T>::step;
    T* out = memory_.template as<T>();
#pragma omp parallel for schedule(static)
    for (long p = 0; p < panels(); ++p)
      for (long i = 0; i < detail::padded_depth<T>(k); ++i)
        for (int c = 0; c < detail::kPanel; ++c) {
          long j = p * detail::kPanel + c;
          T value = j < n && i < k ? w[j * stride_n + i * stride_k] : T{};
          out[p * panel_size() + (i / step * detail::kPanel + c) * step + i % step] = value;
        }
  }
  long panels() const { return (n + detail::kPanel - 1) / detail::kPanel; }
  long panel_size() const { return detail::padded_depth<T>(k) * detail::kPanel; }
  const T* panel(long p) const { return memory_.template as<const T>() + p * panel_size(); }
  const long n, k;

 private:
  WeightMemory memory_;
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

template <class T, class Finish>
void finish_tile(const float* tile, long row, int rows, long column, long n, T* c, long ldc,
                 const Finish& finish) {
  for (int r = 0; r < rows; ++r)
    for (int half = 0; half < kPanel; half += kLanes) {
      long j = column + half;
      if (j >= n) continue;
      int count = static_cast<int>(n - j < kLanes ? n - j : kLanes);
      vec x = finish(load_vec(tile + r * kPanel + half), row + r, j, count);
      store_some(c + (row + r) * ldc + j, x, count);
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

// Some panels times some rows: each panel times every row while the next is on its way from memory.
template <class A, class T, class Finish>
void multiply_panels(const PackedWeight<T>& w, Range panels, Range rows, const A* a, long lda, T* c,
                     long ldc, const Finish& finish) {
  alignas(64) float tile[kGemmRows * kPanel];
  long m = rows.end - rows.begin, tiles = count_tiles(m, lda * static_cast<long>(sizeof(A)));
  long panel_nbytes = w.panel_size() * static_cast<long>(sizeof(T));
  for (long p = panels.begin; p < panels.end; ++p) {
    const T* panel = w.panel(p);
    bool is_last = p + 1 == panels.end;
    const char* next = reinterpret_cast<const char*>(is_last ? panel : w.panel(p + 1));
    long share = is_last ? 0 : panel_nbytes / tiles;
    for (long t = 0; t < tiles; ++t) {
      long first = rows.begin + m * t / tiles, end = rows.begin + m * (t + 1) / tiles;
      int count = static_cast<int>(end - first);
      multiply_rows_of<A, T>(count, a + first * lda, lda, panel, w.k,
                             {next + t * share, share / w.k}, tile);
      finish_tile(tile, first, count, p * kPanel, w.n, c, ldc, finish);
    }
  }
}

}  // namespace detail

// finish(x, row, column, count) maps a vector of sums, of which the first `count` lanes are stored.
template <class T, class Finish = Epilogue<T>>
void linear(const PackedWeight<T>& w, const T* a, long lda, long m, T* c, long ldc,
            const Finish& finish = {}) {
  if (m == 0 || w.n == 0) return;
  // A second thread pays from about 50,000 multiply-adds on (Zen 4).
  int threads = usable_threads(m * w.n * w.k, 50000);
  constexpr bool direct = std::is_same_v<T, float> || detail::PanelLayout<T>::step == 2;
  const float* wide = nullptr;
  if constexpr (!direct) {
    float* copy = detail::thread_scratch(m * w.k);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long r = 0; r < m; ++r)
      for (long i = 0; i < w.k; ++i) copy[r * w.k + i] = to_float(a[r * lda + i]);
    wide = copy;
  }
  // Some 256 rows at a time: few enough for the second-level cache, enough to hide the weights.
  long blocks = (m + 255) / 256;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    detail::Range panels{w.panels() * t / threads, w.panels() * (t + 1) / threads};
    for (long b = 0; b < blocks; ++b) {
      detail::Range rows{m * b / blocks, m * (b + 1) / blocks};
      if constexpr (direct) detail::multiply_panels(w, panels, rows, a, lda, c, ldc, finish);
      else detail::multiply_panels(w, panels, rows, wide, w.k, c, ldc, finish);
    }
  }
}

// The same weight packed by MKL; float32 only. C is A W^T alone: bias and the rest come after.
class MklWeight {
 public:
  MklWeight(const float* w, long n, long k)
      : n(n), k(k), memory_(mkl().has_packed() ? mkl().pack_size(Mkl::kMatrixB, kRows, n, k) : 0) {
    if (mkl().has_packed())
      mkl().pack(Mkl::kRowMajor, Mkl::kMatrixB, Mkl::kTrans, kRows, n, k, 1.0f, w, k, data());
  }
  bool is_packed() const { return mkl().has_packed(); }
  void multiply(const float* a, long lda, long m, float* c, long ldc) const {
    mkl().compute(Mkl::kRowMajor, Mkl::kNoTrans, Mkl::kPacked, m, n, k, a, lda, data(), k, 0.0f, c,
                  ldc);
  }
  const long n, k;

 private:
  static constexpr long kRows = 128;  // MKL's layout does not depend on the rows it was packed for
  float* data() const { return memory_.as<float>(); }
  WeightMemory memory_;
};

}  // namespace ttx
