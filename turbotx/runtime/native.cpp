// The runtime of compiled programs on a CPU: runs launches from a table, and owns packed weights.
//   in:  launches, each a function with the uniform signature int(void* const* args, const int64_t* sizes),
//        and where its arguments lie in the program's address table and size table
//   out: 0, or the launch that failed (from 1) and its error code as launch << 32 | code
#include <chrono>
#include <cstdint>

#include "attention.h"
#include "gemm.h"
#include "gemv.h"

namespace {

using Call = int (*)(void* const*, const int64_t*);

struct Launch {
  Call call;
  int32_t arg_count, size_count;
  const int32_t* slots;    // per argument: its place in the address table, or -1 for none
  const int32_t* offsets;  // per argument: the size that is its offset in bytes, or -1 for zero
  const int32_t* sizes;    // per size: its place in the size table
};

constexpr int kMaxArgs = 256;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One weight: packed for many tokens, and the module's own memory for one.
struct Weight {
  virtual ~Weight() = default;
  virtual void multiply(const void* a, long lda, long m, const void* bias, void* c, long ldc) = 0;
};

template <class T>
struct TypedWeight : Weight {
  const T* own;
  const long n, k;
  const bool rows_are_outputs, dense;
  TypedWeight(const T* w, long n, long k, long sn, long sk)
      : own(w), n(n), k(k), rows_are_outputs(sk == 1),
        dense((sk == 1 && sn == k) || (sn == 1 && sk == n)) {}
  virtual void multiply_rows(const T* a, long lda, long m, const T* bias, T* c, long ldc) = 0;
  void multiply(const void* a, long lda, long m, const void* bias, void* c, long ldc) override {
    const T *x = static_cast<const T*>(a), *b = static_cast<const T*>(bias);
    T* out = static_cast<T*>(c);
    if (m == 1 && dense) ttx::multiply_vector(x, own, n, k, rows_are_outputs, b, out);
    else multiply_rows(x, lda, m, b, out, ldc);
  }
};

template <class T>
struct OwnWeight : TypedWeight<T> {
  ttx::PackedWeight<T> packed;
  OwnWeight(const T* w, long n, long k, long sn, long sk)
      : TypedWeight<T>(w, n, k, sn, sk), packed(w, n, k, sn, sk) {}
  void multiply_rows(const T* a, long lda, long m, const T* bias, T* c, long ldc) override {
    ttx::linear(packed, a, lda, m, c, ldc, ttx::Epilogue<T>{.bias = bias});
  }
};

struct LibraryWeight : TypedWeight<float> {
  using Mkl = ttx::Mkl;
  static constexpr long kRows = 128;  // the layout does not depend on the rows it was packed for
  ttx::WeightMemory memory;
  LibraryWeight(const float* w, long n, long k, long sn, long sk)
      : TypedWeight(w, n, k, sn, sk), memory(ttx::mkl().pack_size(Mkl::kMatrixB, kRows, n, k)) {
    ttx::mkl().pack(Mkl::kRowMajor, Mkl::kMatrixB, rows_are_outputs ? Mkl::kTrans : Mkl::kNoTrans, kRows,
             n, k, 1.0f, w, rows_are_outputs ? sn : sk, data());
  }
  float* data() const { return memory.as<float>(); }
  void multiply_rows(const float* a, long lda, long m, const float* bias, float* c,
                     long ldc) override {
    ttx::mkl().compute(Mkl::kRowMajor, Mkl::kNoTrans, Mkl::kPacked, m, n, k, a, lda, data(), k,
                       0.0f, c, ldc);
    if (bias == nullptr) return;
#pragma omp parallel for if (m * n > 65536)
    for (long r = 0; r < m; ++r)
#pragma omp simd
      for (long j = 0; j < n; ++j) c[r * ldc + j] += bias[j];
  }
};

}  // namespace

extern "C" {

int64_t ttx_run(const Launch* launches, int64_t begin, int64_t end, void* const* table,
                const int64_t* sizes, int64_t* ticks) {
  void* args[kMaxArgs];
  int64_t values[kMaxArgs];
  for (int64_t i = begin; i < end; ++i) {
    const Launch& launch = launches[i];
    for (int k = 0; k < launch.arg_count; ++k) {
      char* address = launch.slots[k] < 0 ? nullptr : static_cast<char*>(table[launch.slots[k]]);
      if (address != nullptr && launch.offsets[k] >= 0) address += sizes[launch.offsets[k]];
      args[k] = address;
    }
    for (int k = 0; k < launch.size_count; ++k) values[k] = sizes[launch.sizes[k]];
    if (ticks != nullptr) ticks[2 * i] = now_ns();
    int code = launch.call(args, values);
    if (ticks != nullptr) ticks[2 * i + 1] = now_ns();
    if (code != 0) return (i + 1) << 32 | static_cast<uint32_t>(code);
  }
  return 0;
}

// dtype 0 is float32, 1 bfloat16, 2 float16; element (output j, input i) at w[j * sn + i * sk].
void* ttx_pack_weight(int dtype, const void* w, int64_t n, int64_t k, int64_t sn, int64_t sk) {
  try {
    if (dtype == 0 && ttx::mkl().has_packed() && (sk == 1 || sn == 1))
      return new LibraryWeight(static_cast<const float*>(w), n, k, sn, sk);
    if (dtype == 0) return new OwnWeight<float>(static_cast<const float*>(w), n, k, sn, sk);
    if (dtype == 1) return new OwnWeight<ttx::bf16>(static_cast<const ttx::bf16*>(w), n, k, sn, sk);
    return new OwnWeight<ttx::f16>(static_cast<const ttx::f16*>(w), n, k, sn, sk);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void ttx_free_weight(void* weight) { delete static_cast<Weight*>(weight); }

// args: a, packed weight, bias or null, out; sizes: m, lda, ldc.
int ttx_linear(void* const* args, const int64_t* sizes) {
  if (sizes[0] > 0)
    static_cast<Weight*>(args[1])->multiply(args[0], sizes[1], sizes[0], args[2], args[3], sizes[2]);
  return 0;
}

}  // extern "C"
