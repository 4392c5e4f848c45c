// MKL's packed GEMM as torch's own library carries it, found at run time.
//   in:  nothing to link: the symbols are looked up in the libtorch_cpu already in the process
//   out: ttx::mkl() with its functions, or null ones where this torch was built without MKL
//   example:  if (ttx::mkl().has_packed()) size = ttx::mkl().pack_size(...);
//
// Integers are declared 64 bits wide: in x86-64 calls a callee with 32-bit integers reads the lower
// half of the same register or stack slot, so both of MKL's integer interfaces work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace ttx {

struct Mkl {
  using Int = std::int64_t;
  static constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112, kPacked = 151, kMatrixB = 162;
  using PackSize = std::size_t (*)(int which, Int m, Int n, Int k);
  using Pack = void (*)(int layout, int which, int trans, Int m, Int n,
                        Int k, float alpha, const float* src, Int ld, float* dst);
  using Compute = void (*)(int layout, int trans_a, int trans_b, Int m,
                           Int n, Int k, const float* a, Int lda,
                           const float* b, Int ldb, float beta, float* c, Int ldc);
  using Bf16 = void (*)(int layout, int trans_a, int trans_b, Int m, Int n,
                        Int k, float alpha, const void* a, Int lda, const void* b,
                        Int ldb, float beta, float* c, Int ldc);

  PackSize pack_size = nullptr;
  Pack pack = nullptr;
  Compute compute = nullptr;
  Bf16 bf16_gemm = nullptr;

  bool has_packed() const { return pack_size != nullptr && pack != nullptr && compute != nullptr; }
};

inline const Mkl& mkl() {
  static const Mkl found = [] {
    Mkl m;
#if defined(__x86_64__) && defined(__unix__)
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) torch = RTLD_DEFAULT;
    m.pack_size = reinterpret_cast<Mkl::PackSize>(dlsym(torch, "cblas_sgemm_pack_get_size"));
    m.pack = reinterpret_cast<Mkl::Pack>(dlsym(torch, "cblas_sgemm_pack"));
    m.compute = reinterpret_cast<Mkl::Compute>(dlsym(torch, "cblas_sgemm_compute"));
    m.bf16_gemm = reinterpret_cast<Mkl::Bf16>(dlsym(torch, "cblas_gemm_bf16bf16f32"));
#endif
    return m;
  }();
  return found;
}

// The same weight packed by MKL; float32 only. C is A W^T alone: bias and the rest come after.
class MklWeight {
 public:
  MklWeight(const float* w, long n, long k)
      : n(n), k(k), memory_(mkl().has_packed() ? mkl().pack_size(Mkl::kMatrixB, kRows, n, k) : 0) {
    if (mkl().has_packed())
      mkl().pack(Mkl::kRowMajor, Mkl::kMatrixB, Mkl::kTrans, kRows, n, k, 1.0f, w, k, data());
  }
  bool is_packed() const { return mkl().has_packed(); }
  void multiply(const float* a, long lda, long m, float* c, long ldc) const {
    mkl().compute(Mkl::kRowMajor, Mkl::kNoTrans, Mkl::kPacked, m, n, k, a, lda, data(), k, 0.0f, c,
                  ldc);
  }
  const long n, k;

 private:
  static constexpr long kRows = 128;  // MKL's layout does not depend on the rows it was packed for
  float* data() const { return memory_.as<float>(); }
  WeightMemory memory_;
};

}  // namespace ttx
