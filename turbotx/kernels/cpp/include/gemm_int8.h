// C = finish(scales * (A W^T)): a linear layer of int8 by int8, its sums exact in int32.
//   in:  A [m][k], int8 with a scale a row, or float, bf16 or f16 rows that are quantised first; W
//        int8 [n][k], packed once, with a scale an output column
//   out: C [m][n] of the finish's type: float32 after the sums, rounded once
//   example:  ttx::PackedInt8 w(weight, n, k);
//             ttx::linear_int8(w, rows, weight_scales, c, n, ttx::Epilogue<float>{.bias = bias});
//
// |a| and |w| are at most 127, so that sums of up to 2^31 / 127^2 = 133,144 products fit in int32.
// A row that holds NaN or an infinity gets the scale NaN, and so a result of NaN.
#pragma once

#include <limits>

#include "gemm.h"
#include "gemm_int8_tile.h"
#include "libm.h"

namespace ttx {

class PackedInt8 {
 public:
  PackedInt8(const std::int8_t* w, long n, long k) : PackedInt8(w, n, k, k, 1) {}
  // Element (output j, input i) is w[j * stride_n + i * stride_k]; n counts the columns of C.
  PackedInt8(const std::int8_t* w, long n, long k, long stride_n, long stride_k, bool gated = false)
      : PackedInt8(n, k, gated) {
    WeightPart<std::int8_t> all{w, gated ? 2 * n : n, stride_n, stride_k};
    fill(&all, 1);
  }
  // The same of parts, whose rows follow each other.
  PackedInt8(const WeightPart<std::int8_t>* parts, long count, long n, long k, bool gated)
      : PackedInt8(n, k, gated) {
    fill(parts, count);
  }
  // Panels that lie elsewhere already, and stay there.
  PackedInt8(const std::int8_t* panels, long n, long k, bool gated, std::true_type)
      : n(n), k(k), group(gated ? 2 : 1), amx(detail::uses_amx<std::int8_t>()), depth(padded(k, amx)),
        offset(amx ? 0 : detail::kWeightOffset), panels_(panels) {}
  long groups() const { return (n + detail::kPanel - 1) / detail::kPanel; }
  long panel_size() const { return depth * detail::kPanel; }
  const std::int8_t* panel(long p) const { return panels_ + p * panel_size(); }
  const long n, k, group;
  const bool amx;
  const long depth;   // k, padded by zeros to what is multiplied at once
  const int offset;   // what the panels hold on top of W

 private:
  PackedInt8(long n, long k, bool gated)
      : n(n), k(k), group(gated ? 2 : 1), amx(detail::uses_amx<std::int8_t>()), depth(padded(k, amx)),
        offset(amx ? 0 : detail::kWeightOffset), memory_(group * groups() * panel_size()),
        panels_(memory_.as<const std::int8_t>()) {}

  // Elements come by rows of the weight, which lie in the panels `quad` at a time.
  void fill(const WeightPart<std::int8_t>* parts, long count) {
    std::int8_t* out = memory_.as<std::int8_t>();
    share_rows(group * groups(), true, [=, this](long begin, long end) {
      for (long p = begin; p < end; ++p) {
        auto columns = columns_of(parts, count, p, group, n);
        std::int8_t* panel = out + p * panel_size();
        if (offset == 0) detail::pack_panel<detail::kQuad>(columns, k, depth, panel);
        else detail::pack_panel<detail::kQuad, detail::kWeightOffset>(columns, k, depth, panel);
      }
    });
  }

  static long padded(long k, bool amx) {
    long unit = amx ? detail::kAmxDepth<std::int8_t> : detail::kQuad;
    return (k + unit - 1) / unit * unit;
  }
  WeightMemory memory_;
  const std::int8_t* panels_;
};

// Activations: int8 rows and their scales, null where `whole`, whose scales are 1; or rows of T to be
// quantised, where `scales` is null.
struct Int8Rows {
  const void* a;
  long lda, m;
  const float* scales;
  bool whole = false;
};

namespace detail {

constexpr float kSmallest = 0x1p-100f;  // rows of smaller numbers are quantised as if it were one

// q = round(x / scale), scale = the row's largest magnitude / 127, both as `row_scale` and
// `quantize_rows` of ir/quantized_ops.py compute them in float32.
template <class T>
float quantize_row(const T* x, long k, long depth, std::int8_t* q) {
  std::int32_t largest = 0;  // magnitudes as bits: NaN is above infinity, that above all numbers
#pragma omp simd reduction(max : largest)
  for (long i = 0; i < k; ++i) {
    std::int32_t magnitude = __builtin_bit_cast(std::int32_t, to_float(x[i])) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  float peak = __builtin_bit_cast(float, largest);
  bool finite = largest < 0x7f800000;
  float scale = (peak > kSmallest ? peak : kSmallest) / 127.0f;
  float inverse = 1.0f / scale;
  if (finite) {
#pragma omp simd
    for (long i = 0; i < k; ++i)
      q[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(libm::nearbyint(to_float(x[i]) * inverse)));
  }
  for (long i = finite ? k : 0; i < depth; ++i) q[i] = 0;
  return finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

inline std::int32_t sum_of(const std::int8_t* a, long k) {
  std::int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (long i = 0; i < k; ++i) total += a[i];
  return total;
}

// Makes float32 sums of int32 ones before they are finished.
template <class Finish>
struct Int8Finish {
  const float* rows;            // their scales
  const std::int32_t* offsets;  // a row: what the panels' offset has added to its sums
  const float* scales;          // of the weight's columns, [n], or [2n] where gated
  long gated;                   // a factor's scales lie so far behind its gate's
  Finish finish;

  TTX_INLINE auto columns(long column, int count) const {
    vec scale = load_some(scales + column, count);
    vec factor_scale = load_some(scales + gated + column, count);
    return [=, rows = rows, offsets = offsets, map = finish.columns(column, count)](
               int_vec x, int_vec factor, long row) __attribute__((always_inline)) {
      auto scaled = [=](int_vec sums, vec by) {
        return __builtin_convertvector(sums - offsets[row], vec) * (by * broadcast(rows[row]));
      };
      return map(scaled(x, scale), scaled(factor, factor_scale), row);
    };
  }
};

// Some groups of panels times some rows, as multiply_panels does it in float.
template <class T, class Finish>
void multiply_panels_int8(const PackedInt8& w, Range groups, Range rows, const std::int8_t* a,
                          long lda, T* c, long ldc, const Finish& finish) {
  constexpr int most = kAmxRows > kGemmRows ? kAmxRows : kGemmRows, size = most * kPanel;
  alignas(64) std::int32_t tile[2 * size];
  long m = rows.end - rows.begin;
  long tiles = w.amx ? (m + kAmxRows - 1) / kAmxRows : count_tiles(m, lda);
  [[maybe_unused]] AmxTiles registers;
  for (long g = groups.begin; g < groups.end; ++g) {
    bool is_last = g + 1 == groups.end;
    const char* next = reinterpret_cast<const char*>(w.panel((is_last ? g : g + 1) * w.group));
    long share = is_last ? 0 : w.panel_size() / tiles;
    for (long t = 0; t < tiles; ++t) {
      long first = rows.begin + m * t / tiles, end = rows.begin + m * (t + 1) / tiles;
      if (w.amx) {
        first = rows.begin + t * kAmxRows;
        end = first + kAmxRows < rows.end ? first + kAmxRows : rows.end;
      }
      int count = static_cast<int>(end - first);
      const std::int8_t* from = a + first * lda;
      for (long p = 0; p < w.group; ++p, next += share) {
        const std::int8_t* panel = w.panel(g * w.group + p);
        NextPanel ahead{next, share / w.depth};
        if (tiles == 1 && !w.amx) ahead = read_once(panel, kPanel);
        if constexpr (kHasAmx<std::int8_t>)
          if (w.amx) {
            multiply_amx(registers, count, from, lda, panel, w.depth, ahead, tile + p * size);
            continue;
          }
        multiply_rows_int8(count, from, lda, panel, w.depth, ahead, tile + p * size);
      }
      finish_tile(tile, tile + (w.group - 1) * size, first, count, g * kPanel, w.n, c, ldc, finish);
    }
  }
}

}  // namespace detail

// T is the type of C, of what the finish reads, and of the rows where they are not int8 yet.
template <class T, class Finish = Epilogue<T>>
void linear_int8(const PackedInt8& w, const Int8Rows& x, const float* weight_scales, T* c, long ldc,
                 const Finish& finish = {}) {
  if (x.m == 0 || w.n == 0) return;
  // As in `linear`, whose multiply-adds take four times as long.
  int threads = usable_threads(x.m * w.n * w.k * w.group, 200000);
  const auto* given = static_cast<const std::int8_t*>(x.a);
  bool narrow = x.scales != nullptr || x.whole, copied = !narrow || w.depth != w.k;
  long lda = copied ? w.depth : x.lda, blocks = (x.m + 255) / 256;
  // One piece of memory: rows, their scales, their offsets; kept 64 bytes apart.
  long row_floats = copied ? (x.m * w.depth + 63) / 64 * 16 : 0, padded = (x.m + 15) / 16 * 16;
  float* scratch = detail::thread_scratch(row_floats + 2 * padded);
  auto* rows = reinterpret_cast<std::int8_t*>(scratch);
  float* scales = scratch + row_floats;
  auto* offsets = reinterpret_cast<std::int32_t*>(scales + padded);
  const std::int8_t* a = copied ? rows : given;
  share_rows(x.m, threads > 1, [=, &w, &x](long begin, long end) {
    for (long r = begin; r < end; ++r) {
      std::int8_t* row = rows + r * w.depth;
      if (!narrow) {
        scales[r] = detail::quantize_row(static_cast<const T*>(x.a) + r * x.lda, w.k, w.depth, row);
      } else {
        scales[r] = x.whole ? 1.0f : x.scales[r];
        if (copied) {
          std::memcpy(row, given + r * x.lda, w.k);
          std::memset(row + w.k, 0, w.depth - w.k);
        }
      }
      offsets[r] = w.offset == 0 ? 0 : w.offset * detail::sum_of(a + r * lda, w.k);
    }
  });
  detail::Int8Finish<Finish> scaled{scales, offsets, weight_scales, w.group == 2 ? w.n : 0, finish};
  share(threads, [&](long t) {
    detail::Range groups{w.groups() * t / threads, w.groups() * (t + 1) / threads};
    for (long b = 0; b < blocks; ++b) {
      detail::Range some{x.m * b / blocks, x.m * (b + 1) / blocks};
      detail::multiply_panels_int8(w, groups, some, a, lda, c, ldc, scaled);
    }
  });
}

}  // namespace ttx
