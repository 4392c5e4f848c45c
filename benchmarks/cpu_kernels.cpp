// The C++ building blocks with the call shapes that benchmarks/cpu_kernels.py reaches by ctypes.
//   in:  tensors' addresses and sizes; out: the headers' functions, nothing added
//   example:  void* w = pack_float(weight, n, k);  linear_float(w, a, k, m, c, n, nullptr, 0);
#include "attention.h"
#include "gemm.h"
#include "mkl.h"

using namespace ttx;

template <class T, int D>
void attend(const void* qkv, void* out, long batch, long heads, long seq) {
  const T* q = static_cast<const T*>(qkv);
  long hidden = heads * D;
  AttentionShape s;
  s.batch = batch;
  s.heads = s.kv_heads = heads;
  s.q_len = s.k_len = seq;
  s.q = s.k = s.v = {seq * 3 * hidden, D, 3 * hidden};
  s.out = {seq * hidden, D, hidden};
  s.scale = 1.0f / __builtin_sqrtf(D);
  attention<T, D>(q, q + hidden, q + 2 * hidden, static_cast<T*>(out), s);
}

#define GEMM(T)                                                                               \
  extern "C" void* pack_##T(const void* w, long n, long k) {                                  \
    return new PackedWeight<T>(static_cast<const T*>(w), n, k);                               \
  }                                                                                           \
  extern "C" void free_##T(void* w) { delete static_cast<PackedWeight<T>*>(w); }              \
  extern "C" void linear_##T(void* w, const void* a, long lda, long m, void* c, long ldc,     \
                             const void* bias, int activation) {                              \
    Epilogue<T> finish;                                                                       \
    finish.bias = static_cast<const T*>(bias);                                                \
    finish.activation = static_cast<Activation>(activation);                                  \
    linear(*static_cast<PackedWeight<T>*>(w), static_cast<const T*>(a), lda, m,               \
           static_cast<T*>(c), ldc, finish);                                                  \
  }                                                                                           \
  extern "C" void attend_##T##_32(const void* x, void* o, long b, long h, long s) {           \
    attend<T, 32>(x, o, b, h, s);                                                             \
  }                                                                                           \
  extern "C" void attend_##T##_64(const void* x, void* o, long b, long h, long s) {           \
    attend<T, 64>(x, o, b, h, s);                                                             \
  }
GEMM(float)
GEMM(bf16)

extern "C" void* pack_mkl(const float* w, long n, long k) {
  return mkl().has_packed() ? new MklWeight(w, n, k) : nullptr;
}
extern "C" void free_mkl(void* w) { delete static_cast<MklWeight*>(w); }
extern "C" void linear_mkl(void* w, const float* a, long lda, long m, float* c, long ldc) {
  static_cast<MklWeight*>(w)->multiply(a, lda, m, c, ldc);
}

#define MAP(NAME)                                                              \
  extern "C" void map_##NAME(const float* __restrict x, float* __restrict y, long n) { \
    share_rows(n, true, [=](long begin, long end) {                            \
      _Pragma("omp simd")                                                      \
      for (long i = begin; i < end; ++i) y[i] = ttx::NAME(x[i]);               \
    });                                                                        \
  }
MAP(exp) MAP(log) MAP(erf) MAP(tanh) MAP(sigmoid) MAP(silu) MAP(gelu) MAP(gelu_tanh) MAP(softplus)
MAP(expm1) MAP(log1p) MAP(sin) MAP(cos) MAP(rsqrt)

template <class T>
void copy_through_float(const T* __restrict x, T* __restrict y, long n) {
  share_rows(n, true, [=](long begin, long end) {
#pragma omp simd
    for (long i = begin; i < end; ++i) store(y + i, load(x + i));
  });
}
extern "C" void copy_bf16(const bf16* x, bf16* y, long n) { copy_through_float(x, y, n); }
extern "C" void copy_f16(const f16* x, f16* y, long n) { copy_through_float(x, y, n); }
