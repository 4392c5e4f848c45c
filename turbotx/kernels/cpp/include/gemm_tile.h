// The inner product of the few-token GEMM: some rows of A times one panel of packed weights.
//   in:  A row by row, a panel of kPanel output columns packed k by k
//   out: a float32 tile, rows x kPanel, for the epilogue to finish
//   used by gemm.h; ROWS is compile-time so that ROWS x 2 vector accumulators stay in registers
#pragma once

#include "simd.h"

namespace ttx::detail {

constexpr int kPanel = 2 * kLanes;
constexpr int kGemmRows = kRegisters >= 32 ? 12 : 6;  // 12 x 2 accumulators of 32, 6 x 2 of 16
constexpr int kBestRows = kRegisters >= 32 ? 8 : 6;   // Zen 4: 8 x 2 reach 99 % of the peak, 12 93

// How a weight type lies in a panel: `step` consecutive k of one column are neighbours.
template <class T>
struct PanelLayout { static constexpr int step = 1; };
#ifdef __AVX512BF16__
template <>
struct PanelLayout<bf16> { static constexpr int step = 2; };  // what vdpbf16ps multiplies at once
#endif

template <class T>
constexpr long padded_depth(long k) {
  return (k + PanelLayout<T>::step - 1) / PanelLayout<T>::step * PanelLayout<T>::step;
}

// While a panel is multiplied memory is fetched, `bytes_per_k` of it for each k: the next panel, into
// the second-level cache; or, where panels are read `once`, what follows kAhead bytes later.
struct NextPanel { const char* address; long bytes_per_k; bool once = false; };

// Weights that are read once go past the outer caches, where they would push out what stays from one
// call to the next. With pages of 2 MB (weight_memory.h) that took a tenth to a fifth of BERT-base's time
// at 10 tokens on Zen 5.
constexpr long kAhead = 16384;

TTX_INLINE void fetch(const NextPanel& next, long k) {
  const char* p = next.address + k * next.bytes_per_k;
  if (next.once) {
    __builtin_prefetch(p, 0, 0);
    __builtin_prefetch(p + 64, 0, 0);
  } else {
    __builtin_prefetch(p, 0, 2);
    __builtin_prefetch(p + 64, 0, 2);
  }
}

TTX_INLINE NextPanel read_once(const void* panel, long bytes_per_k) {
  return {static_cast<const char*>(panel) + kAhead, bytes_per_k, true};
}

// Sums run over at most this many k before they are added to the tile: the rounding errors of a
// chain grow with its length, and libraries cut theirs (MKL at 192). Costs 1 % on Zen 4.
constexpr long kChain = 128;

template <int ROWS>
TTX_INLINE void add_to_tile(const vec (&sum)[ROWS][2], bool is_first, float* tile) {
#pragma GCC unroll 24
  for (int i = 0; i < 2 * ROWS; ++i) {
    float* p = tile + i * kLanes;
    store_vec(p, is_first ? sum[i / 2][i % 2] : load_vec(p) + sum[i / 2][i % 2]);
  }
}

// A is float32 (the caller widens 16-bit rows first), the panel of any storage type.
template <class W, int ROWS>
void multiply_panel(const float* a, long lda, const W* panel, long depth, NextPanel next,
                    float* tile) {
  for (long begin = 0; begin < depth; begin += kChain) {
    long end = begin + kChain < depth ? begin + kChain : depth;
    vec sum[ROWS][2] = {};
    for (long k = begin; k < end; ++k, panel += kPanel) {
      fetch(next, k);
      vec left = load_vec(panel), right = load_vec(panel + kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        vec x = broadcast(a[r * lda + k]);
        sum[r][0] += x * left;
        sum[r][1] += x * right;
      }
    }
    add_to_tile<ROWS>(sum, begin == 0, tile);
  }
}

// Adds K consecutive k of some rows, `a` the first one's, times weights that are widened on the way:
// widen(i, half) makes those of the i-th k for either half of a panel. Sums of a row take turns.
template <int K, int WAYS, int ROWS, class Widen>
TTX_INLINE void add_widened(vec (&sum)[WAYS][ROWS][2], const float* a, long lda, Widen widen) {
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) {
    vec left = widen(i, 0), right = widen(i, 1);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      vec x = broadcast(a[r * lda + i]);
      sum[i % WAYS][r][0] += x * left;
      sum[i % WAYS][r][1] += x * right;
    }
  }
}

// Whether vdpbf16ps, two multiply-adds, is as fast as one: so on Zen 4 and 5, while it takes four times
// as long on Sapphire Rapids, where numbers that have to be widened anyway become floats instead.
inline bool pairs_are_fast() {
#ifdef __AVX512BF16__
  static const bool is_amd = __builtin_cpu_is("amd");
  return is_amd;
#else
  return false;
#endif
}

#ifdef __AVX512BF16__
// sum[i] += a0 * w[2i] + a1 * w[2i + 1]. Written as an instruction: its intrinsic takes half a
// second of headers to compile, and the compilers disagree about its types.
TTX_INLINE void multiply_pairs(vec& sum, int_vec pair, int_vec weights) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pair), "v"(weights));
}

// As add_widened, of bf16: widen(i, half) makes k 2i and 2i + 1 as pairs.
template <int K, int WAYS, int ROWS, class Widen>
TTX_INLINE void add_widened_pairs(vec (&sum)[WAYS][ROWS][2], const bf16* a, long lda, Widen widen) {
#pragma GCC unroll 4
  for (int i = 0; i < K / 2; ++i) {
    int_vec left = widen(i, 0), right = widen(i, 1);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * lda + 2 * i, sizeof pair);
      multiply_pairs(sum[i % WAYS][r][0], int_vec{} + pair, left);
      multiply_pairs(sum[i % WAYS][r][1], int_vec{} + pair, right);
    }
  }
}

template <int ROWS, class Pair>
TTX_INLINE void add_pairs(vec (&sum)[ROWS][2], const bf16* panel, Pair pair) {
  int_vec left, right;
  std::memcpy(&left, panel, sizeof left);
  std::memcpy(&right, panel + kPanel, sizeof right);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    int_vec both = int_vec{} + pair(r);
    multiply_pairs(sum[r][0], both, left);
    multiply_pairs(sum[r][1], both, right);
  }
}

// bf16 times bf16, two k at once. An odd last k of A is paired with zero, not with what follows.
// One chain for all of k: a bf16 result keeps 8 bits.
template <int ROWS>
void multiply_panel(const bf16* a, long lda, const bf16* panel, long depth, NextPanel next,
                    float* tile) {
  vec sum[ROWS][2] = {};
  long k = 0;
  for (; k + 2 <= depth; k += 2, panel += 2 * kPanel) {
    fetch(next, k);
    add_pairs<ROWS>(sum, panel, [&](int r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * lda + k, sizeof pair);
      return pair;
    });
  }
  if (k < depth)
    add_pairs<ROWS>(sum, panel, [&](int r) { return std::int32_t{a[r * lda + k].bits}; });
  add_to_tile<ROWS>(sum, true, tile);
}
#endif

}  // namespace ttx::detail
