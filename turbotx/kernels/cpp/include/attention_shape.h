// What an attention call reads and writes: sizes, strides, masks.
//   in:  filled in by the caller, by name; the defaults mean "no mask"
//   out: read by ttx::attention (attention.h)
//   example:  ttx::AttentionShape s{.batch = 2, .heads = 12, .kv_heads = 12};  s.q_len = 40;
#pragma once

#include <cstdint>

namespace ttx {

// Strides count elements. head_dim is contiguous everywhere, keys in key_mask too.
struct AttentionStrides { long batch = 0, head = 0, row = 0; };

enum class Bias { none, boolean, float32, storage };  // storage: the type T of q, k and v

struct AttentionShape {
  long batch = 0, heads = 0, kv_heads = 0, q_len = 0, k_len = 0;  // heads is a multiple of kv_heads
  AttentionStrides q, k, v, out;
  float scale = 1.0f;                                             // multiplies q . k

  float softcap = 0.0f;                                           // scores become softcap *
                                                                  // tanh(score / it); 0: they stay

  const bool* key_mask = nullptr;                                 // [batch][k]: false hides the key
  long key_mask_stride = 0;                                       // between batches
  const int64_t* lengths = nullptr;                               // [batch]: keys there are, of
  long first_key = 0;                                             // which so many are left out
  void* parts = nullptr;                                          // attention_split.h: where sums
                                                                  // go instead of the output

  const void* bias = nullptr;                                     // added to scale * q . k; a
  Bias bias_kind = Bias::none;                                    // boolean one hides where false
  long bias_batch = 0, bias_head = 0, bias_q = 0, bias_k = 0;     // strides; 0 broadcasts

  const int64_t* k_blocks = nullptr;                              // [batch][columns]: where from k
  const int64_t* v_blocks = nullptr;                              // or v on, in elements, block_len
  long columns = 0, block_len = 0;                                // rows begin; null: by strides

  const int64_t* bounds = nullptr;                                // attention_packed.h: [batch + 1]
  const int64_t* starts = nullptr;                                // [batch]

  // Query i stands at key position i + diagonal: 0 is torch's is_causal, k_len - q_len lets the
  // last query see every key. It sees keys from position - window_left to position + window_right.
  bool causal = false;                                            // the same as window_right = 0
  long diagonal = 0;
  long window_left = -1, window_right = -1;                       // -1: no limit on that side

  bool blind_nan = false;                                         // a query that sees no key of
                                                                  // some gets NaN instead of 0,
  bool blind_mean = false;                                        // or the mean of all values

  const float* sinks = nullptr;                                   // [heads]: one more score, whose
                                                                  // share goes to no value
};

}  // namespace ttx
