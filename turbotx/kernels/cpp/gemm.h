// C = finish(A W^T): a linear layer over weights packed once, its output written in place.
//   in:  A [m][k] with row stride lda; W as torch's Linear keeps it, [n][k], or by any two strides;
//        float, bf16 or f16, both the same type
//   out: C [m][n] with row stride ldc; sums are float32, rounded once after the epilogue
//   example:  ttx::PackedWeight<float> w(weight, n, k);  // a copy: the weight itself is free to go
//             ttx::linear(w, a, k, m, c, n, ttx::Epilogue<float>{.bias = bias});
//
// Two engines share the handle: this file's own, which reads every weight once per call, in order,
// the threads sharing out the columns; and MKL's packed sgemm where torch has it (mkl.h).
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "gemm_tile.h"
#include "mkl.h"
#include "scratch.h"
#include "vecmath.h"

#ifdef _OPENMP
#include <omp.h>
#endif
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

  TTX_INLINE vec operator()(vec x, long row, long column) const {
    if (bias != nullptr) x += load_vec(bias + column);
    if (activation == Activation::gelu) x = ttx::gelu(x);
    else if (activation == Activation::relu) x = x < vec{} ? vec{} : x;
    else if (activation == Activation::gelu_tanh) x = ttx::gelu_tanh(x);
    else if (activation == Activation::silu) x = ttx::silu(x);
    if (residual != nullptr) x += load_vec(residual + row * ld_residual + column);
    return x;
  }
  TTX_INLINE vec part(vec x, long row, long column, int count) const {
    Epilogue here = *this;
    alignas(64) T columns[kLanes], rows[kLanes];
    for (int i = 0; i < count; ++i) {
      columns[i] = bias != nullptr ? bias[column + i] : T{};
      rows[i] = residual != nullptr ? residual[row * ld_residual + column + i] : T{};
    }
    for (int i = count; i < kLanes; ++i) columns[i] = rows[i] = T{};
    if (bias != nullptr) here.bias = columns;
    if (residual != nullptr) here.residual = rows;
    here.ld_residual = 0;
    return here(x, 0, 0);
  }
};

// Memory for weights: 2 MB pages where the system gives them, so that streaming misses no TLB.
struct FreeMemory { void operator()(void* p) const { std::free(p); } };
using Memory = std::unique_ptr<char, FreeMemory>;

inline Memory allocate_weights(std::size_t nbytes) {
  constexpr std::size_t huge = std::size_t{2} << 20;
  std::size_t unit = nbytes >= huge ? huge : 64;
  std::size_t rounded = (nbytes + unit - 1) / unit * unit;
  Memory memory(static_cast<char*>(std::aligned_alloc(unit, rounded ? rounded : unit)));
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (unit == huge) madvise(memory.get(), rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

// W packed for this file's engine: panels of kPanel columns, each padded_depth(k) deep.
template <class T>
class PackedWeight {
 public:
  PackedWeight(const T* w, long n, long k) : PackedWeight(w, n, k, k, 1) {}
  // Element (output j, input i) is w[j * stride_n + i * stride_k].
  PackedWeight(const T* w, long n, long k, long stride_n, long stride_k) : n(n), k(k) {
    constexpr int step = detail::PanelLayout<T>::step;
    memory_ = allocate_weights(sizeof(T) * panels() * panel_size());
    T* out = reinterpret_cast<T*>(memory_.get());
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
  const T* panel(long p) const {
    return reinterpret_cast<const T*>(memory_.get()) + p * panel_size();
  }
  const long n, k;

 private:
  Memory memory_;
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
  if constexpr (ROWS > 1)
    multiply_rows_of<A, W, ROWS - 1>(rows, a, lda, panel, depth, next, tile);
}

template <class T, class Finish>
void finish_tile(const float* tile, long row, int rows, long column, long n, T* c, long ldc,
                 const Finish& finish) {
  for (int r = 0; r < rows; ++r)
    for (int half = 0; half < kPanel; half += kLanes) {
      long j = column + half;
      vec x = load_vec(tile + r * kPanel + half);
      T* out = c + (row + r) * ldc + j;
      if (j + kLanes <= n) store_vec(out, finish(x, row + r, j));
      else if (j < n) {
        int count = static_cast<int>(n - j);
        store_part(out, finish.part(x, row + r, j, count), count);
      }
    }
}

// Panels [begin, end): each one times every row of A while the next is on its way from memory.
template <class A, class T, class Finish>
void multiply_panels(const PackedWeight<T>& w, long begin, long end, const A* a, long lda, long m,
                     T* c, long ldc, const Finish& finish) {
  alignas(64) float tile[kGemmRows * kPanel];
  // One pass over the panel while all rows fit it; else tiles of 8, which run closest to the peak.
  long tiles = m <= kGemmRows ? 1 : (m + 7) / 8;
  long panel_nbytes = w.panel_size() * static_cast<long>(sizeof(T));
  for (long p = begin; p < end; ++p) {
    const T* panel = w.panel(p);
    const char* next = reinterpret_cast<const char*>(p + 1 < end ? w.panel(p + 1) : panel);
    long share = p + 1 < end ? panel_nbytes / tiles : 0;
    for (long t = 0; t < tiles; ++t) {
      long first = m * t / tiles;
      int rows = static_cast<int>(m * (t + 1) / tiles - first);
      multiply_rows_of<A, T>(rows, a + first * lda, lda, panel, w.k,
                             {next + t * share, share / w.k}, tile);
      finish_tile(tile, first, rows, p * kPanel, w.n, c, ldc, finish);
    }
  }
}

}  // namespace detail

// finish(x, row, column) maps a vector of sums; finish.part(x, row, column, count) the last few.
template <class T, class Finish = Epilogue<T>>
void linear(const PackedWeight<T>& w, const T* a, long lda, long m, T* c, long ldc,
            const Finish& finish = {}) {
  if (m == 0 || w.n == 0) return;
  constexpr bool direct = std::is_same_v<T, float> || detail::PanelLayout<T>::step == 2;
  const float* wide = nullptr;
  if constexpr (!direct) {
    float* copy = detail::thread_scratch(m * w.k);
    for (long r = 0; r < m; ++r)
      for (long i = 0; i < w.k; ++i) copy[r * w.k + i] = to_float(a[r * lda + i]);
    wide = copy;
  }
  int threads = 1;
#ifdef _OPENMP
  // A second thread pays from about 50,000 multiply-adds or 100 KB of weights on (Zen 4).
  threads = m * w.n * w.k < 50000 || omp_in_parallel() ? 1 : omp_get_max_threads();
#endif
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    long begin = w.panels() * t / threads, end = w.panels() * (t + 1) / threads;
    if constexpr (direct) detail::multiply_panels(w, begin, end, a, lda, m, c, ldc, finish);
    else detail::multiply_panels(w, begin, end, wide, w.k, m, c, ldc, finish);
  }
}

// The same weight packed by MKL; float32 only. C is A W^T alone: bias and the rest come after.
class MklWeight {
 public:
  MklWeight(const float* w, long n, long k) : n(n), k(k) {
    const Mkl& lib = mkl();
    if (!lib.has_packed()) return;
    memory_ = allocate_weights(lib.pack_size(Mkl::kMatrixB, kRows, n, k));
    lib.pack(Mkl::kRowMajor, Mkl::kMatrixB, Mkl::kTrans, kRows, n, k, 1.0f, w, k, data());
  }
  bool is_packed() const { return memory_ != nullptr; }
  void multiply(const float* a, long lda, long m, float* c, long ldc) const {
    mkl().compute(Mkl::kRowMajor, Mkl::kNoTrans, Mkl::kPacked, m, n, k, a, lda, data(), k, 0.0f, c,
                  ldc);
  }
  const long n, k;

 private:
  static constexpr long kRows = 128;  // MKL's layout does not depend on the rows it was packed for
  float* data() const { return reinterpret_cast<float*>(memory_.get()); }
  Memory memory_;
};

}  // namespace ttx
