// softmax(scale * q k^T + masks) v for every batch and head, keys visited block by block.
//   in:  q [batch][heads][q_len][D], k and v [batch][kv_heads][k_len][D] of float, bf16 or f16,
//        read in place through AttentionShape's strides (a packed QKV GEMM's output, say)
//   out: [batch][heads][q_len][D] through its own strides; rows that see no key are 0,
//        or NaN or the mean of all values where AttentionShape says so
//   example:  ttx::AttentionShape s{...};  // attention_shape.h
//             ttx::attention<float, 64>(qkv, qkv + hidden, qkv + 2 * hidden, out, s);
//
// Arithmetic is float32 throughout. Parallel over batch, head and query rows, and over parts of the
// keys where few rows have many (attention_split.h); small calls stay on the calling thread. Scratch
// memory belongs to the thread, grows to the largest call and stays.
#pragma once

#include "attention_head.h"
#include "attention_split.h"
#include "threads.h"

namespace ttx {

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
  if (!enough && parts == 1 && s.k_len >= 2 * kPartKeys)
    return attend_split<T, D>(q, k, v, out, s, threads);
  share_by_one(threads, heads * parts, [&](long unit) {
    long head_index = unit / parts, part = unit % parts;
    long batch = head_index / s.kv_heads, kv_head = head_index % s.kv_heads;
    HeadOperands<T> head = prepare_head<T, D>(s, k, v, batch, kv_head, rows);
    attend_tiles<T, D>(s, head, q, out, batch, kv_head * group, rows, tiles * part / parts,
                       tiles * (part + 1) / parts);
  });
}

}  // namespace ttx
