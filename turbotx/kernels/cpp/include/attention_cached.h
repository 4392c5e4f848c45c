// attention.h behind a decoder's cache, which gets the new keys and values first.
//   in:  as attention.h, but k and v are new rows, one a query; memory: of the cache, whose blocks
//        AttentionShape's k_blocks and v_blocks begin, [kv_heads][block_len][D] each
//   out: as attention.h writes it; the rows as the last of k_len positions
//   example:  s.k_blocks = keys;  ttx::cached_attention<float, 64>(q, k, v, out, memory, s);
#pragma once

#include "attention.h"
#include "cache_rows.h"

namespace ttx {
namespace detail {

template <class T, int D>
void append_keys(const T* rows, const AttentionStrides& strides, const int64_t* blocks, T* memory,
                 const AttentionShape& s) {
  constexpr long size = sizeof(T);
  append_rows({s.batch, s.kv_heads, s.q_len, D * size, reinterpret_cast<const char*>(rows),
               strides.batch * size, strides.head * size, strides.row * size, s.k_len - s.q_len,
               reinterpret_cast<char*>(memory), blocks, s.columns, s.block_len, size});
}

}  // namespace detail

template <class T, int D>
void cached_attention(const T* q, const T* k, const T* v, T* out, T* memory, AttentionShape s) {
  detail::append_keys<T, D>(k, s.k, s.k_blocks, memory, s);
  detail::append_keys<T, D>(v, s.v, s.v_blocks, memory, s);
  s.k = s.v = {0, s.block_len * D, D};
  attention<T, D>(q, memory, memory, out, s);
}

}  // namespace ttx
