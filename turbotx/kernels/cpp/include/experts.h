// Experts: rows in the order of their experts, and each row times its expert's weight.
//   in:  the expert that each row was given to; A [m][k] in that order, W [experts][n][k]
//   out: each row's place, its inverse and where each expert's rows end; C [m][n] as gemm.h's
//   example:  ttx::route(chosen, m, 8, order, place, ends);
//             ttx::grouped_linear(w, ends, a, k, m, c, n, ttx::Epilogue<float>{});
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "gemm.h"

namespace ttx {

// A counting sort in two sweeps: rows of one expert keep their own order. Chosen experts are known
// to be 0 .. experts - 1.
inline void route(const std::int64_t* chosen, long m, long experts, std::int64_t* order,
                  std::int64_t* place, std::int32_t* ends) {
  std::memset(ends, 0, sizeof *ends * experts);
  for (long r = 0; r < m; ++r) ++ends[chosen[r]];
  std::int32_t begin = 0;
  for (long e = 0; e < experts; ++e) {
    std::int32_t count = ends[e];
    ends[e] = begin;
    begin += count;
  }
  for (long r = 0; r < m; ++r) {
    std::int32_t at = ends[chosen[r]]++;
    place[r] = at;
    order[at] = r;
  }
}

// One packed weight an expert.
template <class T>
using PackedExperts = std::vector<std::unique_ptr<PackedWeight<T>>>;

// Whether ends are those of rows 0 .. m in order.
inline bool are_ends(const std::int32_t* ends, long experts, long m) {
  std::int32_t before = 0;
  for (long e = 0; e < experts; before = ends[e++])
    if (ends[e] < before || ends[e] > m) return false;
  return true;
}

// Threads share all panels of all experts that have rows, in one range: a panel costs its rows, and
// as much as a tile of them for bringing it from memory. Rows behind the last end become zero.
template <class T, class Finish>
void grouped_linear(const PackedExperts<T>& w, const std::int32_t* ends, const T* a, long lda, long m,
                    T* c, long ldc, const Finish& finish) {
  if (m == 0 || w.empty() || w[0]->n == 0) return;
  const long experts = static_cast<long>(w.size()), groups = w[0]->groups(), k = w[0]->k;
  const long last = ends[experts - 1];
  auto cost = [&](long e) {
    long rows = ends[e] - (e > 0 ? ends[e - 1] : 0);
    return rows > 0 ? rows + detail::kBestRows : 0;
  };
  long total = 0;
  for (long e = 0; e < experts; ++e) total += cost(e) * groups;
  int threads = usable_threads(last * w[0]->n * k * w[0]->group, 50000);
  const float* wide = detail::widen_rows<T>(a, lda, last, k, threads > 1);
  share(threads, [&](long t) {
    const long from = total * t / threads, to = total * (t + 1) / threads;
    auto first_behind = [&](long at, long each) {  // the first panels that begin at `at` or behind
      long g = at <= 0 ? 0 : (at + each - 1) / each;
      return g < groups ? g : groups;
    };
    long before = 0;
    for (long e = 0; e < experts && before < to; ++e) {
      const long each = cost(e);
      if (each == 0) continue;
      detail::Range mine{first_behind(from - before, each), first_behind(to - before, each)};
      before += each * groups;
      if (mine.begin >= mine.end) continue;
      const long begin = e > 0 ? ends[e - 1] : 0, count = ends[e] - begin, blocks = (count + 255) / 256;
      for (long b = 0; b < blocks; ++b) {
        detail::Range rows{begin + count * b / blocks, begin + count * (b + 1) / blocks};
        if constexpr (detail::kReadsRows<T>)
          detail::multiply_panels(*w[e], mine, rows, a, lda, c, ldc, finish);
        else
          detail::multiply_panels(*w[e], mine, rows, wide, k, c, ldc, finish);
      }
    }
  });
  for (long r = last; r < m; ++r) std::memset(static_cast<void*>(c + r * ldc), 0, sizeof(T) * w[0]->n);
}

}  // namespace ttx
