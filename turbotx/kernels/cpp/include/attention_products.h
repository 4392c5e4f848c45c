// The two matrix products of attention for every batch and head, scores in memory between them.
//   in:  q, k, v as attention.h reads them, in place through AttentionShape's strides
//   out: scores [batch][heads][q_len][k_len] of float, dense; out through its own strides
//   example:  ttx::attention_scores<bf16, 64>(q, k, scores, s);
//             ttx::attention_values<bf16, 64>(shares, v, out, s);  // shares as scores, of bf16
//
// Built from attention.h's tiles. Parallel over batch and key heads, and over rows where these are
// few. Rows of a key head's group are one range: row r is query r % q_len of its head r / q_len.
#pragma once

#include <cstring>
#include <type_traits>

#include "attention_tile.h"
#include "scratch.h"
#include "threads.h"

namespace ttx {
namespace detail {

struct RowRange { long batch, kv_head, begin, end; };  // rows half-open

// Calls work(range) on every thread's share of the rows of all key heads.
template <class Work>
void for_row_ranges(const AttentionShape& s, long depth, const Work& work) {
  long rows = s.heads / s.kv_heads * s.q_len, heads = s.batch * s.kv_heads;
  int threads = usable_threads(heads * rows * s.k_len * depth, 150000);  // as in attention.h
  long parts = heads % threads == 0 || heads >= 4L * threads ? 1 : 2L * threads;
  long tiles = (rows + kTileRows - 1) / kTileRows;
  share_by_one(threads, heads * parts, [&](long unit) {
    long head = unit / parts, part = unit % parts;
    long begin = tiles * part / parts * kTileRows, end = tiles * (part + 1) / parts * kTileRows;
    if (begin < end) work(RowRange{head / s.kv_heads, head % s.kv_heads, begin, end < rows ? end : rows});
  });
}

// scores = q k^T of one key head's rows, keys packed; rows past the end repeat the last one.
template <class T, int D>
void score_rows(const AttentionShape& s, const T* q, const float* keys, float* scores,
                const RowRange& range) {
  constexpr int ROWS = kTileRows;
  alignas(64) float query[ROWS * D], block[ROWS * kScoreStride];
  long first_head = range.kv_head * (s.heads / s.kv_heads);
  for (long first = range.begin; first < range.end; first += ROWS) {
    float* out[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      long flat = first + r < range.end ? first + r : range.end - 1;
      long head = first_head + flat / s.q_len, i = flat % s.q_len;
      const T* row = q + range.batch * s.q.batch + head * s.q.head + i * s.q.row;
      for (int d = 0; d < D; ++d) query[r * D + d] = to_float(row[d]);
      out[r] = scores + ((range.batch * s.heads + head) * s.q_len + i) * s.k_len;
    }
    for (long begin = 0; begin < s.k_len; begin += kKeyBlock) {
      long count = begin + kKeyBlock < s.k_len ? kKeyBlock : s.k_len - begin;
      score_block<D, ROWS>(query, keys + begin * D, count, block);
      for (int r = 0; r < ROWS && first + r < range.end; ++r)
        std::memcpy(out[r] + begin, block + r * kScoreStride, sizeof(float) * count);
    }
  }
}

// out = shares v of one key head's rows.
template <class T, int D>
void weigh_rows(const AttentionShape& s, const T* shares, const float* values, long value_stride,
                T* out, const RowRange& range) {
  constexpr int ROWS = kTileRows;
  alignas(64) float block[ROWS * kScoreStride], sums[ROWS * padded(D)];
  Softmax kept[ROWS];
  for (Softmax& row : kept) row.keep = 1.0f;
  long first_head = range.kv_head * (s.heads / s.kv_heads);
  for (long first = range.begin; first < range.end; first += ROWS) {
    for (long begin = 0; begin < s.k_len; begin += kKeyBlock) {
      long count = begin + kKeyBlock < s.k_len ? kKeyBlock : s.k_len - begin;
      for (int r = 0; r < ROWS; ++r) {
        long flat = first + r < range.end ? first + r : range.end - 1;
        long head = first_head + flat / s.q_len, i = flat % s.q_len;
        const T* row = shares + ((range.batch * s.heads + head) * s.q_len + i) * s.k_len + begin;
        for (long j = 0; j < count; ++j) block[r * kScoreStride + j] = to_float(row[j]);
      }
      weigh_block<D, ROWS>(block, values + begin * value_stride, value_stride, count,
                           begin == 0 ? Earlier::none : Earlier::scaled,
                           kept, sums);
    }
    for (int r = 0; r < ROWS && first + r < range.end; ++r) {
      long head = first_head + (first + r) / s.q_len, i = (first + r) % s.q_len;
      T* row = out + range.batch * s.out.batch + head * s.out.head + i * s.out.row;
      for (int d = 0; d < D; ++d) store(row + d, s.k_len > 0 ? sums[r * padded(D) + d] : 0.0f);
    }
  }
}

}  // namespace detail

template <class T, int D>
void attention_scores(const T* q, const T* k, float* scores, const AttentionShape& s) {
  using namespace detail;
  if (s.batch * s.heads * s.q_len * s.k_len == 0) return;
  for_row_ranges(s, D, [&](const RowRange& range) {
    float* keys = thread_scratch((s.k_len + kLanes - 1) / kLanes * kLanes * D);
    pack_keys<T, D>(k + range.batch * s.k.batch + range.kv_head * s.k.head, s.k.row, s.k_len, keys);
    score_rows<T, D>(s, q, keys, scores, range);
  });
}

template <class T, int D>
void attention_values(const T* shares, const T* v, T* out, const AttentionShape& s) {
  using namespace detail;
  if (s.batch * s.heads * s.q_len == 0) return;
  constexpr bool in_place = std::is_same_v<T, float> && D % kLanes == 0;
  for_row_ranges(s, D, [&](const RowRange& range) {
    const T* head = v + range.batch * s.v.batch + range.kv_head * s.v.head;
    if constexpr (in_place) {
      weigh_rows<T, D>(s, shares, head, s.v.row, out, range);
    } else {
      float* values = thread_scratch(s.k_len * padded(D));
      pack_values<T, D>(head, s.v.row, s.k_len, values);
      weigh_rows<T, D>(s, shares, values, padded(D), out, range);
    }
  });
}

}  // namespace ttx
