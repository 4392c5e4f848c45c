// One tile of attention: a few query rows against one head's keys, in registers.
//   in:  query rows times scale * log2(e), keys packed lane by lane, values row by row; float32
//   out: the rows' weighted sums of values, their maxima and sums, carried from key block to block
//   used by attention.h; ROWS and D are compile-time so that the accumulators are registers
#pragma once

#include <limits>

#include "attention_shape.h"
#include "simd.h"
#include "vecmath.h"

namespace ttx::detail {

constexpr int kTileRows = kRegisters >= 32 ? 8 : 4;  // 8 x 2 accumulators of 32, or 4 x 2 of 16
constexpr int kKeyBlock = 512;  // 8 rows of scores take 16 KB, half a first-level cache
constexpr int kScoreStride = kKeyBlock + kLanes;  // off the power of two: rows land in other sets
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

constexpr int padded(int d) { return (d + kLanes - 1) / kLanes * kLanes; }

// Packed keys: panels of kLanes keys, each D rows of kLanes floats; the last panel padded with 0.
template <class T, int D>
void pack_keys(const T* k, long row_stride, long count, float* packed) {
  constexpr int whole = D / kLanes * kLanes;
  for (long first = 0; first < count; first += kLanes, packed += D * kLanes) {
    int valid = static_cast<int>(count - first < kLanes ? count - first : kLanes);
    const T* rows = k + first * row_stride;
    for (int d = 0; d < whole; d += kLanes) {
      vec square[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane)
        square[lane] = lane < valid ? load_vec(rows + lane * row_stride + d) : vec{};
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_vec(packed + (d + i) * kLanes, square[i]);
    }
    for (int d = whole; d < D; ++d)
      for (int lane = 0; lane < kLanes; ++lane)
        packed[d * kLanes + lane] = lane < valid ? to_float(rows[lane * row_stride + d]) : 0.0f;
  }
}

// Values as float32 rows of padded(D), for the types and widths that cannot be read in place.
template <class T, int D>
void pack_values(const T* v, long row_stride, long count, float* packed) {
  for (long j = 0; j < count; ++j, v += row_stride, packed += padded(D)) {
    for (int d = 0; d < D; ++d) packed[d] = to_float(v[d]);
    for (int d = D; d < padded(D); ++d) packed[d] = 0.0f;
  }
}

template <int D, int ROWS, int PANELS>
TTX_INLINE void score_panels(const float* q, const float* keys, float* scores) {
  vec sum[ROWS][PANELS] = {};
  for (int d = 0; d < D; ++d) {
    vec key[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) key[p] = load_vec(keys + (p * D + d) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      vec x = broadcast(q[r * D + d]);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) sum[r][p] += x * key[p];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) store_vec(scores + r * kScoreStride + p * kLanes, sum[r][p]);
}

// scores[r][j] = q[r] . key j for `panels` panels, then -inf in the padding past `count`.
template <int D, int ROWS>
void score_block(const float* q, const float* keys, long count, float* scores) {
  long panels = (count + kLanes - 1) / kLanes, p = 0;
  for (; p + 2 <= panels; p += 2)
    score_panels<D, ROWS, 2>(q, keys + p * D * kLanes, scores + p * kLanes);
  if (p < panels) score_panels<D, ROWS, 1>(q, keys + p * D * kLanes, scores + p * kLanes);
  for (int r = 0; r < ROWS; ++r)
    for (long j = count; j < panels * kLanes; ++j) scores[r * kScoreStride + j] = kMinusInf;
}

// The same from keys that lie row by row, for so few queries that packing keys takes longer.
template <class T, int D, int ROWS>
void score_rows(const float* q, const T* keys, long row_stride, long count, float* scores) {
  for (long first = 0; first < count; first += kLanes) {
    long last = (count - first < kLanes ? count - first : kLanes) - 1;
    const T* rows = keys + first * row_stride;
    for (int r = 0; r < ROWS; ++r) {
      vec sums[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        const T* key = rows + (lane < last ? lane : last) * row_stride;
        vec sum = {};
        for (int d = 0; d < D; d += kLanes) sum += load_vec(q + r * D + d) * load_vec(key + d);
        sums[lane] = sum;
      }
      store_vec(scores + r * kScoreStride + first, sum_rows(sums));
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (long j = count; j % kLanes != 0; ++j) scores[r * kScoreStride + j] = kMinusInf;
}

struct Softmax { float maximum = kMinusInf, total = 0.0f, keep = 0.0f; };

// Turns rows of scores into 2^(score - maximum). A row carries the maximum and the total over the key
// blocks so far; its `keep` is what the earlier blocks' weighted values are to be scaled by. Each step
// is done for all rows before the next: reductions over lanes wait for each other within a row only.
template <int ROWS>
[[gnu::noinline]] void exponentiate(float* scores, long panels, Softmax (&rows)[ROWS]) {
  vec tops[ROWS], sums[ROWS];
  float bases[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const float* row = scores + r * kScoreStride;
    vec top = load_vec(row);
    for (long p = 1; p < panels; ++p) {
      vec x = load_vec(row + p * kLanes);
      top = x > top ? x : top;
    }
    tops[r] = top;
  }
  for (int r = 0; r < ROWS; ++r) {
    float block = max_lanes(tops[r]), earlier = rows[r].maximum;
    float next = block > earlier ? block : earlier;
    bases[r] = next == kMinusInf ? 0.0f : next;  // a row with every key hidden so far
    rows[r].keep = earlier == kMinusInf ? 0.0f : ttx::exp2(earlier - bases[r]);
    rows[r].maximum = next;
  }
  for (int r = 0; r < ROWS; ++r) {
    float* row = scores + r * kScoreStride;
    vec sum = {}, offset = broadcast(bases[r]);
    for (long p = 0; p < panels; ++p) {
      vec e = exp2_nonpositive(load_vec(row + p * kLanes) - offset);
      store_vec(row + p * kLanes, e);
      sum += e;
    }
    sums[r] = sum;
  }
  for (int r = 0; r < ROWS; ++r) rows[r].total = rows[r].total * rows[r].keep + sum_lanes(sums[r]);
}

// Sums over keys run over at most this many before they join the rest: shorter chains of roundings.
constexpr long kKeyChain = 128;

// What becomes of the sums in `out` when new ones come: dropped, scaled by keep, or added to.
enum class Earlier { none, scaled, kept };

template <int ROWS, int VECS, class V>
TTX_INLINE void weigh_columns(const float* weights, const V* values, long value_stride, long count,
                              Earlier earlier, const Softmax* rows, float* out, int out_stride) {
  vec sum[ROWS][VECS] = {};
  for (long j = 0; j < count; ++j, values += value_stride) {
    vec value[VECS];
#pragma GCC unroll 4
    for (int c = 0; c < VECS; ++c) value[c] = load_vec(values + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      vec w = broadcast(weights[r * kScoreStride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < VECS; ++c) sum[r][c] += w * value[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    float keep = earlier == Earlier::scaled ? rows[r].keep : 1.0f;
#pragma GCC unroll 4
    for (int c = 0; c < VECS; ++c) {
      float* p = out + r * out_stride + c * kLanes;
      store_vec(p, earlier == Earlier::none ? sum[r][c] : load_vec(p) * keep + sum[r][c]);
    }
  }
}

// out[r] = rows[r].keep * out[r] + sum over j of weights[r][j] * value j, or as `before` says.
template <int D, int ROWS, class V>
void weigh_block(const float* weights, const V* values, long value_stride, long count,
                 Earlier before, const Softmax* rows, float* out) {
  constexpr int vecs = padded(D) / kLanes;
  for (long j = 0; j < count; j += kKeyChain) {
    long here = count - j < kKeyChain ? count - j : kKeyChain;
    Earlier earlier = j > 0 ? Earlier::kept : before;
    const float* w = weights + j;
    const V* v = values + j * value_stride;
    int c = 0;
    if constexpr (ROWS <= 2)  // few sums wait for each other: more of them at a time
      for (; c + 4 <= vecs; c += 4)
        weigh_columns<ROWS, 4>(w, v + c * kLanes, value_stride, here, earlier, rows,
                               out + c * kLanes, padded(D));
    for (; c + 2 <= vecs; c += 2)
      weigh_columns<ROWS, 2>(w, v + c * kLanes, value_stride, here, earlier, rows,
                             out + c * kLanes, padded(D));
    if (c < vecs)
      weigh_columns<ROWS, 1>(w, v + c * kLanes, value_stride, here, earlier, rows,
                             out + c * kLanes, padded(D));
  }
}

}  // namespace ttx::detail
