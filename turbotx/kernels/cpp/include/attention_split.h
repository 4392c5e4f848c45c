// Attention of few query rows over many keys, the keys shared out to threads in parts.
//   in:  as attention.h, and how many threads there are
//   out: as attention.h writes it, but for rounding: a row's parts are added in the order of keys
//   used by attention.h, for decoding steps of fewer key heads than threads, or not many more
#pragma once

#include "attention_head.h"
#include "threads.h"

namespace ttx::detail {

constexpr long kPartKeys = 256;  // at least so many keys a part

// The bias from so many elements on.
template <class T>
const void* bias_from(const AttentionShape& s, long elements) {
  long size = s.bias_kind == Bias::float32   ? sizeof(float)
              : s.bias_kind == Bias::boolean ? sizeof(bool)
                                             : sizeof(T);
  return s.bias == nullptr ? nullptr : static_cast<const char*>(s.bias) + elements * size;
}

// The keys [begin, end) as all there are; begin is that of a block if there are several.
template <class T>
AttentionShape part_shape(const AttentionShape& s, long begin, long end) {
  AttentionShape part = s;
  part.k_len = end - begin;
  part.first_key = begin;
  part.diagonal -= begin;
  part.bias = bias_from<T>(s, begin * s.bias_k);
  if (s.key_mask != nullptr) part.key_mask += begin;
  if (s.columns > 1) {
    if (s.k_blocks != nullptr) part.k_blocks += begin / s.block_len;
    if (s.v_blocks != nullptr) part.v_blocks += begin / s.block_len;
  }
  if (begin > 0) part.sinks = nullptr;  // one share, in the first part
  return part;
}

// One row of the output from what its parts of the keys have left.
template <class T, int D>
void add_parts(const AttentionShape& s, const T* k, const T* v, const PartOfRow<D>* parts,
               long count, long batch, long q_head, long i, T* out) {
  long index = row_index(s, batch, q_head, i), stride = s.batch * s.heads * s.q_len;
  float maximum = kMinusInf, total = 0.0f, sums[padded(D)] = {};
  for (long p = 0; p < count; ++p) {
    float own = parts[p * stride + index].maximum;
    maximum = own > maximum ? own : maximum;
  }
  for (long p = 0; p < count; ++p) {
    const PartOfRow<D>& part = parts[p * stride + index];
    float share = part.maximum == kMinusInf ? 0.0f : ttx::exp2(part.maximum - maximum);
    total += part.total * share;
    for (int d = 0; d < padded(D); ++d) sums[d] += part.sums[d] * share;
  }
  T* row = out + batch * s.out.batch + q_head * s.out.head + i * s.out.row;
  if (total != 0.0f) {
    for (int d = 0; d < D; ++d) store(row + d, sums[d] * (1.0f / total));
  } else {
    long kv_head = q_head / (s.heads / s.kv_heads);
    store_blind<T, D>(s, prepare_head<T, D>(s, k, v, batch, kv_head, 1), true, row);
  }
}

template <class T, int D>
[[gnu::noinline]] void attend_split(const T* q, const T* k, const T* v, T* out,
                                    const AttentionShape& s, int threads) {
  long heads = s.batch * s.kv_heads, group = s.heads / s.kv_heads, rows = group * s.q_len;
  long wanted = (4L * threads + heads - 1) / heads, most = s.k_len / kPartKeys;
  long grain = s.columns > 1 ? s.block_len : kLanes;
  long each = s.k_len / (wanted < most ? wanted : most);
  each = (each + grain - 1) / grain * grain;
  long count = (s.k_len + each - 1) / each, every = s.batch * s.heads * s.q_len;
  static thread_local Scratch kept;  // apart from the one that prepares heads
  auto* parts = reinterpret_cast<PartOfRow<D>*>(
      kept.reserve(count * every * static_cast<long>(sizeof(PartOfRow<D>) / sizeof(float))));
  share_by_one(threads, heads * count, [=, &s](long unit) {
    long p = unit % count, batch = unit / count / s.kv_heads, kv_head = unit / count % s.kv_heads;
    long begin = p * each, end = begin + each < s.k_len ? begin + each : s.k_len;
    AttentionShape part = part_shape<T>(s, begin, end);
    part.parts = parts + p * every;
    bool moved = s.columns > 1;
    HeadOperands<T> head = prepare_head<T, D>(
        part, k + (moved && s.k_blocks != nullptr ? 0 : begin * s.k.row),
        v + (moved && s.v_blocks != nullptr ? 0 : begin * s.v.row), batch, kv_head, rows);
    attend_tiles<T, D>(part, head, q, out, batch, kv_head * group, rows, 0,
                       (rows + kTileRows - 1) / kTileRows);
  });
  for (long batch = 0; batch < s.batch; ++batch)
    for (long q_head = 0; q_head < s.heads; ++q_head)
      for (long i = 0; i < s.q_len; ++i)
        add_parts<T, D>(s, k, v, parts, count, batch, q_head, i, out);
}

}  // namespace ttx::detail
