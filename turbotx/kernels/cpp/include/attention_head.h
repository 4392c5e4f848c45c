// One key head of attention: its query rows over its keys and values, tile by tile.
//   in:  q, k, v and an AttentionShape, which head of which batch row, which tiles of its queries
//   out: the rows of these tiles, or with AttentionShape's parts what they make of these keys alone
//   used by attention.h and attention_packed.h
#pragma once

#include <limits>
#include <type_traits>

#include "attention_tile.h"
#include "scratch.h"

namespace ttx::detail {

struct KeyRange { long begin, end; };  // half-open

// Up to so many query rows of a key head read keys and values where they lie: packing them, to be
// read by whole vectors of keys, is as much work as scoring some rows. 16-bit ones are widened for
// each row anew. (Sapphire Rapids, 900 keys: 1.2 to 2 x as fast for one row, 1.1 x for 4 of float.)
template <class T>
constexpr int kRowsInPlace = sizeof(T) == 4 ? 4 : 2;

// The keys that a batch row has.
inline long count_keys(const AttentionShape& s, long batch) {
  if (s.lengths == nullptr) return s.k_len;
  long count = s.lengths[batch] - s.first_key;
  return count < 0 ? 0 : count > s.k_len ? s.k_len : count;
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
template <class T>
struct HeadOperands {
  const float* keys;    // packed, or null where they are read row by row
  const float* values;  // the same
  long value_stride;
  bool values_packed;
  const T* key_rows;
  const T* value_rows;
  long key_row_stride, value_row_stride;
  const float* hidden;  // 0 or -inf per key, or null
  long count;           // of keys
  // Where rows lie in blocks of block_len, a multiple of kLanes: where they begin; else null.
  const int64_t *key_blocks, *value_blocks;
  long block_len;
};

// Calls run(j, rows of T from key j on, how many lie there side by side) for all keys of a range.
template <class T, class Run>
TTX_INLINE void for_pieces(const T* rows, long row_stride, const int64_t* blocks, long block_len,
                           KeyRange keys, Run run) {
  if (blocks == nullptr) return run(keys.begin, rows + keys.begin * row_stride,
                                    keys.end - keys.begin);
  for (long j = keys.begin; j < keys.end;) {
    long block = j / block_len, end = (block + 1) * block_len;
    end = end < keys.end ? end : keys.end;
    run(j, rows + blocks[block] + (j - block * block_len) * row_stride, end - j);
    j = end;
  }
}

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
[[gnu::noinline]] void mask_row(const AttentionShape& s, const HeadOperands<T>& head, long batch,
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
[[gnu::noinline]] void store_blind(const AttentionShape& s, const HeadOperands<T>& head,
                                   bool alone, T* row) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  bool some = alone && s.k_len > 0;
  for (int d = 0; d < D; ++d) {
    double sum = 0.0;
    if (some && s.blind_mean)
      for_pieces(head.value_rows, head.value_row_stride, head.value_blocks, head.block_len,
                 {0, head.count}, [&](long, const T* rows, long here) {
                   for (long j = 0; j < here; ++j)
                     sum += to_float(rows[j * head.value_row_stride + d]);
                 });
    float mean = static_cast<float>(sum / (head.count > 0 ? head.count : 1));
    store(row + d, some && s.blind_nan ? nan : mean);
  }
}

// Some query rows on their way over the keys.
template <int D, int ROWS>
struct QueryTile {
  alignas(64) float query[ROWS * D], sums[ROWS * padded(D)];
  Softmax softmax[ROWS];
  long q_head[ROWS], index[ROWS];
  KeyRange all;  // the keys that one of them sees at least, from a multiple of kLanes on
  bool is_first;
};

// Rows [first, first + rows) of a key head's group: row r is query r % q_len of its head r / q_len.
// Rows past `rows` up to ROWS repeat the last one and are not stored.
template <class T, int D, int ROWS>
void begin_tile(const AttentionShape& s, const HeadOperands<T>& head, const T* q, long batch,
                long first_head, long first, int rows, QueryTile<D, ROWS>& tile) {
  KeyRange all{head.count, 0};
  for (int r = 0; r < ROWS; ++r) {
    long flat = first + (r < rows ? r : rows - 1), q_head = first_head + flat / s.q_len;
    tile.q_head[r] = q_head;
    tile.index[r] = flat % s.q_len;
    bool sinks = s.sinks != nullptr && s.sinks[q_head] > kMinusInf;
    tile.softmax[r] = sinks ? Softmax{s.sinks[q_head] * kLog2E, 1.0f} : Softmax{};
    const T* row = q + batch * s.q.batch + q_head * s.q.head + tile.index[r] * s.q.row;
    for (int d = 0; d < D; ++d) tile.query[r * D + d] = to_float(row[d]) * (s.scale * kLog2E);
    KeyRange seen = visible_keys(s, tile.index[r], head.count);
    if (seen.begin < all.begin) all.begin = seen.begin;
    if (seen.end > all.end) all.end = seen.end;
  }
  tile.all = {all.begin / kLanes * kLanes, all.end};
  tile.is_first = true;
}

// Takes one block of keys, at most kKeyBlock, from a multiple of kLanes on.
template <class T, int D, int ROWS>
[[gnu::noinline]] void attend_block(const AttentionShape& s, const HeadOperands<T>& head,
                                    long batch, KeyRange keys, QueryTile<D, ROWS>& tile) {
  constexpr bool may_read_rows = ROWS <= kRowsInPlace<T> && D % kLanes == 0;
  alignas(64) float scores[ROWS * kScoreStride];
  bool masked = s.bias_kind != Bias::none || head.hidden != nullptr || s.causal ||
                s.window_left >= 0 || s.window_right >= 0;
  long begin = keys.begin, count = keys.end - begin, panels = (count + kLanes - 1) / kLanes;
  Earlier before = tile.is_first ? Earlier::none : Earlier::scaled;
  bool in_place = false;
  tile.is_first = false;
  if constexpr (may_read_rows) {
    in_place = head.keys == nullptr;
    if (in_place)
      for_pieces(head.key_rows, head.key_row_stride, head.key_blocks, head.block_len, keys,
                 [&](long j, const T* rows, long here) {
                   score_rows<T, D, ROWS>(tile.query, rows, head.key_row_stride, here,
                                          scores + (j - begin));
                 });
  }
  if (!in_place) score_block<D, ROWS>(tile.query, head.keys + begin * D, count, scores);
  for (int r = 0; r < ROWS; ++r) {
    float* row = scores + r * kScoreStride;
    if (s.softcap != 0.0f) cap_row(s.softcap, count, row);
    if (masked) mask_row<T>(s, head, batch, tile.q_head[r], tile.index[r], keys, row);
  }
  exponentiate<ROWS>(scores, panels, tile.softmax);
  auto weigh = [&](const auto* values, long stride, const int64_t* blocks) {
    for_pieces(values, stride, blocks, head.block_len, keys,
               [&](long j, const auto* rows, long here) {
                 weigh_block<D, ROWS>(scores + (j - begin), rows, stride, here, before,
                                      tile.softmax, tile.sums);
                 before = Earlier::kept;
               });
  };
  if constexpr (may_read_rows && !std::is_same_v<T, float>)
    if (in_place) return weigh(head.value_rows, head.value_row_stride, head.value_blocks);
  weigh(head.values, head.value_stride, head.values_packed ? nullptr : head.value_blocks);
}

// A row over a part of the keys only: its sums, its maximum and its total.
template <int D>
struct PartOfRow {
  alignas(64) float sums[padded(D)];
  float maximum, total;
};

inline long row_index(const AttentionShape& s, long batch, long q_head, long i) {
  return (batch * s.heads + q_head) * s.q_len + i;
}

template <class T, int D, int ROWS>
void store_tile(const AttentionShape& s, const HeadOperands<T>& head, T* out, long batch, int rows,
                const QueryTile<D, ROWS>& tile) {
  for (int r = 0; r < rows; ++r) {
    if (s.parts != nullptr) {
      auto& part = static_cast<PartOfRow<D>*>(s.parts)[row_index(s, batch, tile.q_head[r],
                                                                 tile.index[r])];
      for (int d = 0; d < padded(D); ++d)
        part.sums[d] = tile.is_first ? 0.0f : tile.sums[r * padded(D) + d];
      part.maximum = tile.softmax[r].maximum;
      part.total = tile.softmax[r].total;
      continue;
    }
    T* row = out + batch * s.out.batch + tile.q_head[r] * s.out.head + tile.index[r] * s.out.row;
    float total = tile.softmax[r].total;
    if (!tile.is_first && total != 0.0f) {
      float factor = 1.0f / total;
      for (int d = 0; d < D; ++d) store(row + d, tile.sums[r * padded(D) + d] * factor);
    } else {
      store_blind<T, D>(s, head, total == 0.0f, row);
    }
  }
}

template <class T, int D, int ROWS>
void attend_rows(const AttentionShape& s, const HeadOperands<T>& head, const T* q, T* out,
                 long batch, long first_head, long first, int rows) {
  QueryTile<D, ROWS> tile;
  begin_tile<T>(s, head, q, batch, first_head, first, rows, tile);
  for (long begin = tile.all.begin; begin < tile.all.end; begin += kKeyBlock) {
    long end = begin + kKeyBlock < tile.all.end ? begin + kKeyBlock : tile.all.end;
    attend_block<T>(s, head, batch, {begin, end}, tile);
  }
  store_tile<T>(s, head, out, batch, rows, tile);
}

// The smallest tile that holds the rows: 1, 2, 4, 6 or 8, so that few are compiled.
template <class T, int D, int ROWS = kTileRows>
void attend_rows_of(int rows, const AttentionShape& s, const HeadOperands<T>& head, const T* q,
                    T* out, long batch, long first_head, long first) {
  constexpr int fewer = ROWS > 2 ? ROWS - 2 : ROWS - 1;
  if constexpr (fewer > 0)
    if (rows <= fewer)
      return attend_rows_of<T, D, fewer>(rows, s, head, q, out, batch, first_head, first);
  attend_rows<T, D, ROWS>(s, head, q, out, batch, first_head, first, rows);
}

// How many tiles take a block of keys in turn where a head's keys and values are more than the
// first-level cache holds several times: 128 rows of 64, so that what they carry is about 64 KB.
// (Sapphire Rapids, one core, float: 54 -> 74 GFLOP/s at 1,024 keys, 60 -> 150 at 32,768.)
template <int D>
constexpr int kStripTiles = D <= 64 ? 16 : D <= 128 ? 8 : 4;
constexpr long kStripBytes = 1 << 18;  // of keys and values, from which strips pay

// Whole tiles, each with all keys in blocks of kKeyBlock from its own first one: a tile for itself,
// or where keys are many, each block for all tiles of a strip before the next.
template <class T, int D>
[[gnu::noinline]] void attend_strip(const AttentionShape& s, const HeadOperands<T>& head,
                                    const T* q, T* out, long batch, long first_head, long first,
                                    int count) {
  QueryTile<D, kTileRows> tiles[kStripTiles<D>];
  KeyRange all{head.count, 0};
  for (int t = 0; t < count; ++t) {
    begin_tile<T>(s, head, q, batch, first_head, first + t * kTileRows, kTileRows, tiles[t]);
    if (tiles[t].all.begin < all.begin) all.begin = tiles[t].all.begin;
    if (tiles[t].all.end > all.end) all.end = tiles[t].all.end;
  }
  for (long begin = all.begin; begin < all.end; begin += kKeyBlock)
    for (int t = 0; t < count; ++t) {
      KeyRange own = tiles[t].all;
      long from = begin > own.begin ? begin : own.begin;
      long end = begin + kKeyBlock < own.end ? begin + kKeyBlock : own.end;
      if (from < end) attend_block<T>(s, head, batch, {from, end}, tiles[t]);
    }
  for (int t = 0; t < count; ++t) store_tile<T>(s, head, out, batch, kTileRows, tiles[t]);
}

// Tiles [begin, end) of the query rows of one key head, of which there are `rows`.
template <class T, int D>
void attend_tiles(const AttentionShape& s, const HeadOperands<T>& head, const T* q, T* out,
                  long batch, long first_head, long rows, long begin, long end) {
  bool is_long = head.count * (D + padded(D)) * static_cast<long>(sizeof(float)) > kStripBytes;
  for (long tile = begin; tile < end;) {
    long first = tile * kTileRows, left = rows - first, whole = left / kTileRows;
    long strip = whole < end - tile ? whole : end - tile;
    if (strip > kStripTiles<D>) strip = kStripTiles<D>;
    if (is_long && strip > 1) {
      attend_strip<T, D>(s, head, q, out, batch, first_head, first, static_cast<int>(strip));
      tile += strip;
      continue;
    }
    attend_rows_of<T, D>(static_cast<int>(left < kTileRows ? left : kTileRows), s, head, q, out,
                         batch, first_head, first);
    ++tile;
  }
}

constexpr long kDenseValues = 512;  // keys, from which values are copied to lie side by side

// Packs one key head, which so many query rows meet, into the thread's scratch, where that pays.
template <class T, int D>
HeadOperands<T> prepare_head(const AttentionShape& s, const T* k, const T* v, long batch,
                             long kv_head, long rows) {
  constexpr bool may_stay = std::is_same_v<T, float> && D % kLanes == 0;
  bool packs = rows > kRowsInPlace<T> || D % kLanes != 0;
  long count = count_keys(s, batch);
  // Rows of a projection's output lie pages apart: many queries would miss the TLB for them.
  bool in_place = may_stay && (count < kDenseValues || rows < 4 * kTileRows);
  long key_size = packs ? (count + kLanes - 1) / kLanes * kLanes * D : 0;
  long value_size = packs && !in_place ? count * padded(D) : 0;
  float* scratch = thread_scratch(key_size + value_size + count);
  const int64_t* k_blocks = s.k_blocks == nullptr ? nullptr : s.k_blocks + batch * s.columns;
  const int64_t* v_blocks = s.v_blocks == nullptr ? nullptr : s.v_blocks + batch * s.columns;
  const T* head_k = k + (k_blocks == nullptr ? batch * s.k.batch : 0) + kv_head * s.k.head;
  const T* head_v = v + (v_blocks == nullptr ? batch * s.v.batch : 0) + kv_head * s.v.head;
  HeadOperands<T> head{packs ? scratch : nullptr, scratch + key_size, padded(D), true, head_k,
                       head_v, s.k.row, s.v.row, nullptr, count, k_blocks, v_blocks, s.block_len};
  if (packs)
    for_pieces(head_k, s.k.row, k_blocks, s.block_len, {0, count},
               [&](long j, const T* rows, long here) {
                 pack_keys<T, D>(rows, s.k.row, here, scratch + j * D);
               });
  if constexpr (may_stay)
    if (in_place) {
      head.values = head_v;
      head.value_stride = s.v.row;
      head.values_packed = false;
    }
  if (packs && !in_place)
    for_pieces(head_v, s.v.row, v_blocks, s.block_len, {0, count},
               [&](long j, const T* rows, long here) {
                 pack_values<T, D>(rows, s.v.row, here, scratch + key_size + j * padded(D));
               });
  if (s.key_mask != nullptr) {
    float* hidden = scratch + key_size + value_size;
    const bool* mask = s.key_mask + batch * s.key_mask_stride;
    long seen = 0;
    for (long j = 0; j < count; ++j) {
      hidden[j] = mask[j] ? 0.0f : kMinusInf;
      seen += mask[j];
    }
    if (seen < count) head.hidden = hidden;  // a mask that hides nothing costs nothing more
  }
  return head;
}

}  // namespace ttx::detail
