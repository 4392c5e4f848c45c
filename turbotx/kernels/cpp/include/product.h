// Products over packed weights as the runtime's launches call them, whatever the weight's dtype.
//   in:  a weight as Python describes it; rows of activations, and what follows the product
//   out: objects behind plain C functions, which each library of products has
//   used by runtime/cpu/products.cpp, quantized.cpp and experts.cpp
#pragma once

#include <cstdint>
#include <vector>

#include "epilogue.h"
#include "gemm.h"

namespace ttx {

// What a launch asks of a weight: C = epilogue(A W^T), m rows.
struct Product {
  const void* a;
  long lda, m;
  const void* bias;
  const void* residual;
  long ld_residual;
  Activation activation;
  void* c;
  long ldc;
  const float* x_scale = nullptr;  // of int8 rows; null where a quantised weight is given floats
  const float* weight_scale = nullptr;
  int dtype = 0;  // of all but a quantised weight, by the numbers of ttx_pack_weight
  int rows = 0;  // of a quantised weight: 1 where floats are multiplied as they are, 2 int8 of scale 1
};

// args: a, packed weight, bias or null, out, residual or null; sizes: m, lda, ldc, the residual's
// row stride, the activation.
inline Product product_of(void* const* args, const std::int64_t* sizes) {
  return {.a = args[0], .lda = sizes[1], .m = sizes[0], .bias = args[2], .residual = args[4],
          .ld_residual = sizes[3], .activation = static_cast<Activation>(sizes[4]),
          .c = args[3], .ldc = sizes[2]};
}

// One weight, packed: one token streams it in order as many do.
struct Weight {
  virtual ~Weight() = default;
  virtual void multiply(const Product& p) = 0;
  virtual const void* panels() const = 0;
};

template <class T, class Kept>
Epilogue<T> finish_of(const Product& p, const Kept& packed) {
  return {.bias = static_cast<const T*>(p.bias),
          .activation = p.activation,
          .residual = static_cast<const T*>(p.residual),
          .ld_residual = p.ld_residual,
          .gated = packed.group == 2 ? packed.n : 0};
}

// Rows of a weight as Python says them.
struct PartRecord { const void* w; std::int64_t rows, stride_n, stride_k; };

// A weight of elements T that Packed keeps, packed from parts or over panels that were packed before.
template <class Packed, class T>
struct PackedPanels : Weight {
  Packed packed;
  PackedPanels(const std::vector<WeightPart<T>>& parts, long n, long k, bool gated)
      : packed(parts.data(), static_cast<long>(parts.size()), n, k, gated) {}
  PackedPanels(const void* panels, long n, long k, bool gated)
      : packed(static_cast<const T*>(panels), n, k, gated, std::true_type()) {}
  const void* panels() const override { return packed.panel(0); }
};

// call(T()) for the storage type T of a dtype: 0 is float32, 1 bfloat16, 2 float16.
template <class Call>
auto with_dtype(int dtype, const Call& call) {
  if (dtype == 0) return call(float());
  if (dtype == 1) return call(bf16());
  return call(f16());
}

// Kept is made of the parts' rows, which together make the weight of n outputs.
template <class T, class Kept>
Weight* pack(const PartRecord* parts, std::int64_t count, long n, long k, bool gated) {
  std::vector<WeightPart<T>> typed;
  for (const PartRecord* p = parts; p < parts + count; ++p)
    typed.push_back({static_cast<const T*>(p->w), p->rows, p->stride_n, p->stride_k});
  return new Kept(typed, n, k, gated);
}

}  // namespace ttx

extern "C" {

__attribute__((used, weak)) const void* ttx_weight_panels(const void* weight) {
  return static_cast<const ttx::Weight*>(weight)->panels();
}

__attribute__((used, weak)) void ttx_free_weight(void* weight) {
  delete static_cast<ttx::Weight*>(weight);
}

}  // extern "C"
