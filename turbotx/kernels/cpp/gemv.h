// y = W x + bias for one row of activations, W read once from where the module keeps it.
//   in:  x [k]; W as [n][k] (a Linear's) or [k][n]; float, bf16 or f16, all the same type
//   out: y [n]; sums are float32 in many short chains, so that one token is no less exact than many
//   example:  ttx::multiply_vector(x, w, n, k, /*rows_are_outputs=*/true, bias, y);
#pragma once

#include "simd.h"

namespace ttx {

namespace detail {

// ROWS outputs at once: dot products along contiguous rows of W, four chains each.
template <class T, int ROWS>
void dot_rows(const T* x, const T* w, long k, const T* bias, T* y) {
  vec sum[ROWS][4] = {};
  long i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c) {
      vec part = load_vec(x + i + c * kLanes);
      for (int r = 0; r < ROWS; ++r) sum[r][c] += part * load_vec(w + r * k + i + c * kLanes);
    }
  for (; i < k; i += kLanes) {
    int count = static_cast<int>(k - i < kLanes ? k - i : kLanes);
    vec part = load_some(x + i, count);
    for (int r = 0; r < ROWS; ++r) sum[r][0] += part * load_some(w + r * k + i, count);
  }
  for (int r = 0; r < ROWS; ++r) {
    float total = sum_lanes((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]));
    y[r] = from_float<T>(bias == nullptr ? total : total + to_float(bias[r]));
  }
}

// `count` neighbouring outputs from the columns of W, eight chains each.
template <class T>
void add_columns(const T* x, const T* w, long n, long k, int count, const T* bias, T* y) {
  vec sum[8] = {};
  for (long i = 0; i < k; ++i)
    sum[i % 8] += broadcast(to_float(x[i])) * load_some(w + i * n, count);
  vec total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  if (bias != nullptr) total += load_some(bias, count);
  store_some(y, total, count);
}

}  // namespace detail

template <class T>
void multiply_vector(const T* x, const T* w, long n, long k, bool rows_are_outputs, const T* bias,
                     T* y) {
  if (rows_are_outputs) {
#pragma omp parallel for schedule(static) if (n * k > 50000)
    for (long j = 0; j < n; j += 4) {
      const T* b = bias == nullptr ? nullptr : bias + j;
      if (j + 4 <= n) detail::dot_rows<T, 4>(x, w + j * k, k, b, y + j);
      else
        for (long r = j; r < n; ++r)
          detail::dot_rows<T, 1>(x, w + r * k, k, bias == nullptr ? nullptr : bias + r, y + r);
    }
    return;
  }
#pragma omp parallel for schedule(static) if (n * k > 50000)
  for (long j = 0; j < n; j += kLanes) {
    int count = static_cast<int>(n - j < kLanes ? n - j : kLanes);
    detail::add_columns(x, w + j, n, k, count, bias == nullptr ? nullptr : bias + j, y + j);
  }
}

}  // namespace ttx
