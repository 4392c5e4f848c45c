// y = finish(W x) for one row of activations, W read once from where the module keeps it.
//   in:  x [k]; W as [n][k] (a Linear's) or [k][n]; float, bf16 or f16, all the same type
//   out: y [n]; sums are float32 in many short chains, so that one token is no less exact than many
//   example:  ttx::multiply_vector(x, w, n, k, /*rows_are_outputs=*/true, y, ttx::Epilogue<T>{});
#pragma once

#include "epilogue.h"

namespace ttx {

namespace detail {

// ROWS outputs at once: dot products along contiguous rows of W, four chains each.
template <class T, int ROWS>
void dot_rows(const T* x, const T* w, long k, float* y) {
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
  for (int r = 0; r < ROWS; ++r)
    y[r] = sum_lanes((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]));
}

template <class T>
vec dot_some(const T* x, const T* w, long k, int count) {
  alignas(64) float y[kLanes] = {};
  int r = 0;
  for (; r + 4 <= count; r += 4) dot_rows<T, 4>(x, w + r * k, k, y + r);
  for (; r < count; ++r) dot_rows<T, 1>(x, w + r * k, k, y + r);
  return load_vec(y);
}

// `count` neighbouring outputs from columns of W that lie `stride` apart, eight chains each.
template <class T>
vec add_columns(const T* x, const T* w, long stride, long k, int count) {
  vec sum[8] = {};
  for (long i = 0; i < k; ++i)
    sum[i % 8] += broadcast(to_float(x[i])) * load_some(w + i * stride, count);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

}  // namespace detail

// n counts the outputs; W of a gated layer has 2n, the factor's after the gate's.
template <class T>
void multiply_vector(const T* x, const T* w, long n, long k, bool rows_are_outputs, T* y,
                     const Epilogue<T>& finish) {
  bool gated = finish.gated > 0;
  long stride = gated ? 2 * n : n;
  auto sums = [&](long j, int count) {
    return rows_are_outputs ? detail::dot_some(x, w + j * k, k, count)
                            : detail::add_columns(x, w + j, stride, k, count);
  };
#pragma omp parallel for schedule(static) if (stride * k > 50000)
  for (long j = 0; j < n; j += kLanes) {
    int count = static_cast<int>(n - j < kLanes ? n - j : kLanes);
    vec x = sums(j, count), factor = gated ? sums(n + j, count) : x;
    store_some(y + j, finish(x, factor, 0, j, count), count);
  }
}

}  // namespace ttx
