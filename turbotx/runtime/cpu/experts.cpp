// Products over a packed weight for each expert, and the order of rows by their experts.
//   in:  a dtype: 0 is float32, 1 bfloat16, 2 float16; weights, rows and where each expert's rows end
//   out: packed weights, and each row times its expert's
#include <cstdint>

#include "experts.h"

namespace {

// False where the ends are none of p.m rows.
struct Experts {
  virtual ~Experts() = default;
  virtual bool multiply(const int32_t* ends, const void* a, long lda, long m, ttx::Activation activation,
                        void* c, long ldc) = 0;
};

template <class T>
struct TypedExperts : Experts {
  ttx::PackedExperts<T> packed;
  bool multiply(const int32_t* ends, const void* a, long lda, long m, ttx::Activation activation,
                void* c, long ldc) override {
    if (!ttx::are_ends(ends, static_cast<long>(packed.size()), m)) return false;
    ttx::Epilogue<T> finish{.activation = activation,
                            .gated = packed[0]->group == 2 ? packed[0]->n : 0};
    ttx::grouped_linear(packed, ends, static_cast<const T*>(a), lda, m, static_cast<T*>(c), ldc,
                        finish);
    return true;
  }
};

template <class T>
Experts* pack(const void* w, long experts, long n, long k, long se, long sn, long sk, bool gated) {
  auto made = std::make_unique<TypedExperts<T>>();
  for (long e = 0; e < experts; ++e)
    made->packed.push_back(std::make_unique<ttx::PackedWeight<T>>(
        static_cast<const T*>(w) + e * se, gated ? n / 2 : n, k, sn, sk, gated));
  return made.release();
}

}  // namespace

extern "C" {

// Element (output j, input i) of expert e is at w[e * se + j * sn + i * sk].
void* ttx_pack_experts(int dtype, const void* w, int64_t experts, int64_t n, int64_t k, int64_t se,
                       int64_t sn, int64_t sk, int gated) {
  try {
    if (dtype == 0) return pack<float>(w, experts, n, k, se, sn, sk, gated);
    if (dtype == 1) return pack<ttx::bf16>(w, experts, n, k, se, sn, sk, gated);
    return pack<ttx::f16>(w, experts, n, k, se, sn, sk, gated);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void ttx_free_experts(void* experts) { delete static_cast<Experts*>(experts); }

// args: a, a packed weight for each expert, where each one's rows end, out; sizes: m, lda, ldc, the
// activation. 1 where the ends are not those of m rows.
int ttx_grouped_linear(void* const* args, const int64_t* sizes) {
  Experts* experts = static_cast<Experts*>(args[1]);
  auto activation = static_cast<ttx::Activation>(sizes[3]);
  bool fits = experts->multiply(static_cast<const int32_t*>(args[2]), args[0], sizes[1], sizes[0],
                                activation, args[3], sizes[2]);
  return fits ? 0 : 1;
}

// args: the expert of each row; out: which row stands where, where each row stands, where each
// expert's rows end; sizes: rows, experts.
int ttx_route(void* const* args, const int64_t* sizes) {
  ttx::route(static_cast<const int64_t*>(args[0]), sizes[0], sizes[1],
             static_cast<int64_t*>(args[1]), static_cast<int64_t*>(args[2]),
             static_cast<int32_t*>(args[3]));
  return 0;
}

}  // extern "C"
