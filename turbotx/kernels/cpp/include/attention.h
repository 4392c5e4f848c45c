// softmax(scale * q k^T + masks) v for every batch and head, keys visited block by block.
//   in:  q [batch][heads][q_len][D], k and v [batch][kv_heads][k_len][D] of float, bf16 or f16,
//        read in place through AttentionShape's strides (a packed QKV GEMM's output, say)
//   out: [batch][heads][q_len][D] through its own strides; rows that see no key are 0,
//        or NaN or the mean of all values where AttentionShape says so
//   example:  ttx::AttentionShape s{...};  // attention_shape.h
//             ttx::attention<float, 64>(qkv, qkv + hidden, qkv + 2 * hidden, out, s);
//
// Arithmetic is float32 throughout. Parallel over batch, head and query rows; small calls stay on
// the calling thread. Scratch memory belongs to the thread, grows to the largest call and stays.
#pragma once

#include <limits>
#include <type_traits>

#include "attention_tile.h"
#include "scratch.h"
#include "threads.h"

namespace ttx {
namespace detail {

struct KeyRange { long begin, end; };  // half-open

// The keys that a batch row has.
inline long count_keys(const AttentionShape& s, long batch) {
  long count = s.lengths == nullptr || s.lengths[batch] > s.k_len ? s.k_len : s.lengths[batch];
  return count < 0 ? 0 : count;
}

// The keys that query row i sees of `count`, masks aside.
inline KeyRange visible_keys(const AttentionShape& s, long i, long count) {
  long position = i + s.diagonal, begin = 0, end = count;
  if (s.window_left >= 0 && position - s.window_left > begin) begin = position - s.window_left;
  long right = s.causal ? 0 : s.window_right;
  if (right >= 0 && position + right + 1 < end) end = position + right + 1;
  end = end < 0 ? 0 : end;
  return {begin < end ? begin : end, end};
}

// One head's keys, values and hidden keys, ready for the tiles.
struct HeadOperands {
  const float* keys;
  const float* values;
  long value_stride;
  const float* hidden;  // 0 or -inf per key, or null
  long count;           // of keys
};

// A bias in units of log2, finite where it was: the most negative float of a mask hides a key only
// beside others, while -inf hides it always.
inline float scaled_bias(float b) {
  const float most = std::numeric_limits<float>::max();
  float scaled = b * kLog2E;
  float bounded = scaled > most ? most : scaled < -most ? -most : scaled;
  return b <= most && b >= -most ? bounded : b;
}

template <class T>
void add_bias_row(const AttentionShape& s, const char* base, long offset, KeyRange keys,
                  float* row) {
  long count = keys.end - keys.begin, step = s.bias_k;
  if (s.bias_kind == Bias::boolean) {
    const bool* b = reinterpret_cast<const bool*>(base) + offset + keys.begin * step;
    for (long j = 0; j < count; ++j) row[j] = b[j * step] ? row[j] : kMinusInf;
  } else if (s.bias_kind == Bias::float32) {
    const float* b = reinterpret_cast<const float*>(base) + offset + keys.begin * step;
    if (step == 1)
      for (long j = 0; j < count; ++j) row[j] += scaled_bias(b[j]);
    else
      for (long j = 0; j < count; ++j) row[j] += scaled_bias(b[j * step]);
  } else {
    const T* b = reinterpret_cast<const T*>(base) + offset + keys.begin * step;
    for (long j = 0; j < count; ++j) row[j] += scaled_bias(to_float(b[j * step]));
  }
}

// Bounds a row of scores, in units of log2, by the softcap; lanes past `count` stay hidden.
[[gnu::noinline]] inline void cap_row(float softcap, long count, float* row) {
  vec bound = broadcast(softcap * kLog2E), inverse = broadcast(1.0f / (softcap * kLog2E));
  long end = (count + kLanes - 1) / kLanes * kLanes;
  for (long j = 0; j < end; j += kLanes)
    store_vec(row + j, bound * ttx::tanh<vec>(load_vec(row + j) * inverse));
  for (long j = count; j < end; ++j) row[j] = kMinusInf;
}

// Adds the masks to one row of scores of keys.begin .. keys.end.
template <class T>
[[gnu::noinline]] void mask_row(const AttentionShape& s, const HeadOperands& head, long batch,
                                long q_head, long i, KeyRange keys, float* row) {
  if (s.bias_kind != Bias::none)
    add_bias_row<T>(s, static_cast<const char*>(s.bias),
                    batch * s.bias_batch + q_head * s.bias_head + i * s.bias_q, keys, row);
  if (head.hidden != nullptr)
    for (long j = keys.begin; j < keys.end; ++j) row[j - keys.begin] += head.hidden[j];
  KeyRange seen = visible_keys(s, i, head.count);
  for (long j = keys.begin; j < seen.begin && j < keys.end; ++j) row[j - keys.begin] = kMinusInf;
  for (long j = seen.end > keys.begin ? seen.end : keys.begin; j < keys.end; ++j)
    row[j - keys.begin] = kMinusInf;
}

// What a query gets that sees no key; `alone`: nor has it a sink.
template <class T, int D>
[[gnu::noinline]] void store_blind(const AttentionShape& s, const HeadOperands& head, bool alone,
                                   T* row) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  bool some = alone && s.k_len > 0;
  for (int d = 0; d < D; ++d) {
    double sum = 0.0;
    if (some && s.blind_mean)
      for (long j = 0; j < head.count; ++j) sum += head.values[j * head.value_stride + d];
    float mean = static_cast<float>(sum / (head.count > 0 ? head.count : 1));
    store(row + d, some && s.blind_nan ? nan : mean);
  }
}

// Rows [first, first + rows) of a key head's group: row r is query r % q_len of its head r / q_len.
// Rows past `rows` up to ROWS repeat the last one and are not stored.
template <class T, int D, int ROWS>
void attend_rows(const AttentionShape& s, const HeadOperands& head, const T* q, T* out, long batch,
                 long first_head, long first, int rows) {
  alignas(64) float query[ROWS * D], scores[ROWS * kScoreStride], sums[ROWS * padded(D)];
  Softmax softmax[ROWS];
  long q_head[ROWS], index[ROWS];
  KeyRange all{head.count, 0};
  for (int r = 0; r < ROWS; ++r) {
    long flat = first + (r < rows ? r : rows - 1);
    q_head[r] = first_head + flat / s.q_len;
    index[r] = flat % s.q_len;
    if (s.sinks != nullptr && s.sinks[q_head[r]] > kMinusInf)
      softmax[r] = Softmax{s.sinks[q_head[r]] * kLog2E, 1.0f};
    const T* row = q + batch * s.q.batch + q_head[r] * s.q.head + index[r] * s.q.row;
    for (int d = 0; d < D; ++d) query[r * D + d] = to_float(row[d]) * (s.scale * kLog2E);
    KeyRange seen = visible_keys(s, index[r], head.count);
    if (seen.begin < all.begin) all.begin = seen.begin;
    if (seen.end > all.end) all.end = seen.end;
  }
  bool masked = s.bias_kind != Bias::none || head.hidden != nullptr || s.causal ||
                s.window_left >= 0 || s.window_right >= 0;
  long start = all.begin / kLanes * kLanes;
  for (long begin = start; begin < all.end; begin += kKeyBlock) {
    KeyRange keys{begin, begin + kKeyBlock < all.end ? begin + kKeyBlock : all.end};
    long count = keys.end - keys.begin, panels = (count + kLanes - 1) / kLanes;
    score_block<D, ROWS>(query, head.keys + begin * D, count, scores);
    for (int r = 0; r < ROWS; ++r) {
      float* row = scores + r * kScoreStride;
      if (s.softcap != 0.0f) cap_row(s.softcap, count, row);
      if (masked) mask_row<T>(s, head, batch, q_head[r], index[r], keys, row);
      exponentiate(row, panels, softmax[r]);
    }
    weigh_block<D, ROWS>(scores, head.values + begin * head.value_stride, head.value_stride, count,
                         begin == start, softmax, sums);
  }
  for (int r = 0; r < rows; ++r) {
    T* row = out + batch * s.out.batch + q_head[r] * s.out.head + index[r] * s.out.row;
    if (start < all.end && softmax[r].total != 0.0f) {
      float factor = 1.0f / softmax[r].total;
      for (int d = 0; d < D; ++d) store(row + d, sums[r * padded(D) + d] * factor);
    } else {
      store_blind<T, D>(s, head, softmax[r].total == 0.0f, row);
    }
  }
}

// The smallest tile that holds the rows: 1, 2, 4, 6 or 8, so that few are compiled.
template <class T, int D, int ROWS = kTileRows>
void attend_rows_of(int rows, const AttentionShape& s, const HeadOperands& head, const T* q, T* out,
                    long batch, long first_head, long first) {
  constexpr int fewer = ROWS > 2 ? ROWS - 2 : ROWS - 1;
  if constexpr (fewer > 0)
    if (rows <= fewer)
      return attend_rows_of<T, D, fewer>(rows, s, head, q, out, batch, first_head, first);
  attend_rows<T, D, ROWS>(s, head, q, out, batch, first_head, first, rows);
}

// Packs one key head into the thread's scratch.
template <class T, int D>
HeadOperands prepare_head(const AttentionShape& s, const T* k, const T* v, long batch,
                          long kv_head) {
  constexpr bool in_place = std::is_same_v<T, float> && D % kLanes == 0;
  long count = count_keys(s, batch), padded_keys = (count + kLanes - 1) / kLanes * kLanes;
  long value_size = in_place ? 0 : count * padded(D);
  float* scratch = thread_scratch(padded_keys * D + value_size + count);
  const T* head_k = k + batch * s.k.batch + kv_head * s.k.head;
  const T* head_v = v + batch * s.v.batch + kv_head * s.v.head;
  pack_keys<T, D>(head_k, s.k.row, count, scratch);
  HeadOperands head{scratch, scratch + padded_keys * D, padded(D), nullptr, count};
  if constexpr (in_place) {
    head.values = head_v;
    head.value_stride = s.v.row;
  } else {
    pack_values<T, D>(head_v, s.v.row, count, scratch + padded_keys * D);
  }
  if (s.key_mask != nullptr) {
    float* hidden = scratch + padded_keys * D + value_size;
    const bool* mask = s.key_mask + batch * s.key_mask_stride;
    for (long j = 0; j < count; ++j) hidden[j] = mask[j] ? 0.0f : kMinusInf;
    head.hidden = hidden;
  }
  return head;
}

}  // namespace detail

template <class T, int D>
void attention(const T* q, const T* k, const T* v, T* out, const AttentionShape& s) {
  using namespace detail;
  if (s.batch * s.heads * s.q_len == 0) return;
  long group = s.heads / s.kv_heads, rows = group * s.q_len, heads = s.batch * s.kv_heads;
  // Below this many multiply-adds a second thread costs more than it brings (2 cores, Zen 4).
  int threads = usable_threads(heads * rows * s.k_len * D, 150000);
  // Heads alone keep the threads busy if there are enough of them; else their rows are split too.
  bool enough = heads % threads == 0 || heads >= 4L * threads;
  long parts = enough ? 1 : (4L * threads + heads - 1) / heads;
  long most = (rows + 4 * kTileRows - 1) / (4 * kTileRows);
  parts = parts < most ? parts : most;
  long tiles = (rows + kTileRows - 1) / kTileRows;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (long unit = 0; unit < heads * parts; ++unit) {
    long head_index = unit / parts, part = unit % parts;
    long batch = head_index / s.kv_heads, kv_head = head_index % s.kv_heads;
    HeadOperands head = prepare_head<T, D>(s, k, v, batch, kv_head);
    for (long tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
      long first = tile * kTileRows, left = rows - first;
      attend_rows_of<T, D>(static_cast<int>(left < kTileRows ? left : kTileRows), s, head, q, out,
                           batch, kv_head * group, first);
    }
  }
}

}  // namespace ttx
