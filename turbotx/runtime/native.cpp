// The runtime of compiled programs on a CPU: runs launches from a table, and owns packed weights.
//   in:  launches, each a function with the uniform signature int(void* const* args, const int64_t* sizes),
//        and where its arguments lie in the program's address table and size table
//   out: 0, or the launch that failed (from 1) and its error code as launch << 32 | code
#include <chrono>
#include <cstdint>

#include "attention.h"
#include "gemm.h"

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

struct Weight {
  virtual ~Weight() = default;
  virtual void multiply(const void* a, long lda, long m, const void* bias, void* c, long ldc) = 0;
};

template <class T>
struct OwnWeight : Weight {
  ttx::PackedWeight<T> packed;
  OwnWeight(const T* w, long n, long k, long sn, long sk) : packed(w, n, k, sn, sk) {}
  void multiply(const void* a, long lda, long m, const void* bias, void* c, long ldc) override {
    ttx::linear(packed, static_cast<const T*>(a), lda, m, static_cast<T*>(c), ldc,
                ttx::Epilogue<T>{.bias = static_cast<const T*>(bias)});
  }
};

struct LibraryWeight : Weight {
  ttx::MklWeight packed;
  LibraryWeight(const float* w, long n, long k) : packed(w, n, k) {}
  void multiply(const void* a, long lda, long m, const void* bias, void* c, long ldc) override {
    float* out = static_cast<float*>(c);
    packed.multiply(static_cast<const float*>(a), lda, m, out, ldc);
    if (bias == nullptr) return;
    const float* b = static_cast<const float*>(bias);
#pragma omp parallel for if (m * packed.n > 65536)
    for (long r = 0; r < m; ++r)
#pragma omp simd
      for (long j = 0; j < packed.n; ++j) out[r * ldc + j] += b[j];
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
    if (dtype == 0 && ttx::mkl().has_packed() && sk == 1 && sn == k)
      return new LibraryWeight(static_cast<const float*>(w), n, k);
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
