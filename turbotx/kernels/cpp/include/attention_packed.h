// attention.h over many sequences on one axis of tokens, each by itself.
//   in:  q, k, v as attention.h reads them, of one batch row; AttentionShape's bounds: sequence n of
//        `batch` has the rows [bounds[n], bounds[n + 1]), and starts: its place in the bias
//   out: as attention.h writes it; no row sees a neighbour's keys
//   example:  s.bounds = bounds;  ttx::packed_attention<float, 64>(q, k, v, out, s);
//
// Sequences are taken as they are, no two together: a batch costs the squares of its lengths.
#pragma once

#include "attention.h"

namespace ttx {
namespace detail {

// Sequence n as a batch of one, its rows, masks and bias at its own place.
template <class T>
AttentionShape sequence_shape(const AttentionShape& s, long n) {
  AttentionShape one = s;
  one.batch = 1;
  one.q_len = one.k_len = s.bounds[n + 1] - s.bounds[n];
  if (s.key_mask != nullptr) one.key_mask = s.key_mask + s.bounds[n];
  one.bias = bias_from<T>(s, s.starts[n] * (s.bias_q + s.bias_k));
  return one;
}

}  // namespace detail

template <class T, int D>
void packed_attention(const T* q, const T* k, const T* v, T* out, const AttentionShape& s) {
  using namespace detail;
  long pairs = 0, group = s.heads / s.kv_heads, heads = s.batch * s.kv_heads;
  for (long n = 0; n < s.batch; ++n) {
    long length = s.bounds[n + 1] - s.bounds[n];
    pairs += length * length;
  }
  if (pairs == 0) return;
  int threads = usable_threads(pairs * s.heads * D, 150000);  // as in attention.h
  long parts = heads >= 4L * threads ? 1 : (4L * threads + heads - 1) / heads;
  share_by_one(threads, heads * parts, [&](long unit) {
    long part = unit % parts, n = unit / parts / s.kv_heads, kv_head = unit / parts % s.kv_heads;
    AttentionShape one = sequence_shape<T>(s, n);
    long begin = s.bounds[n], rows = group * one.q_len, tiles = (rows + kTileRows - 1) / kTileRows;
    if (tiles * part / parts == tiles * (part + 1) / parts) return;
    HeadOperands<T> head =
        prepare_head<T, D>(one, k + begin * s.k.row, v + begin * s.v.row, 0, kv_head, rows);
    attend_tiles<T, D>(one, head, q + begin * s.q.row, out + begin * s.out.row, 0, kv_head * group,
                       rows, tiles * part / parts, tiles * (part + 1) / parts);
  });
}

}  // namespace ttx
