// What a GEMM does to its float32 sums before it stores them, rounded once after all of it.
//   in:  vectors of sums of some columns, and for a gated layer the sums of its factor
//   out: activation(x + bias) [* (factor + its bias)] [+ residual]
//   example:  ttx::linear(w, a, k, m, c, n, ttx::Epilogue<float>{.bias = b, .activation = gelu});
#pragma once

#include "simd.h"
#include "vecmath.h"

namespace ttx {

enum class Activation { none, relu, gelu, gelu_tanh, silu, tanh };

// Bits of accuracy that what is rounded to T can do with.
template <class T>
constexpr int kPrecision = std::is_same_v<T, bf16> ? 12 : 24;

template <class T>
struct Epilogue {
  const T* bias = nullptr;
  Activation activation = Activation::none;
  const T* residual = nullptr;
  long ld_residual = 0;
  long gated = 0;  // columns of a gated layer's output: its factor's bias lies so far behind

  // What maps sums of the columns column .. column + count, of which lanes past count are ignored.
  TTX_INLINE auto columns(long column, int count) const {
    // x + -0 is x, whatever it is.
    vec shift = broadcast(-0.0f), factor_shift = shift;
    if (bias != nullptr) shift = load_some(bias + column, count);
    if (bias != nullptr && gated > 0) factor_shift = load_some(bias + gated + column, count);
    const T* added = residual == nullptr ? nullptr : residual + column;
    return [=, activation = activation, ld = ld_residual, gated = gated > 0](
               vec x, vec factor, long row) __attribute__((always_inline)) {
      x += shift;
      if (activation == Activation::gelu) x = ttx::gelu<kPrecision<T>>(x);
      else if (activation == Activation::relu) x = x < vec{} ? vec{} : x;
      else if (activation == Activation::gelu_tanh) x = ttx::gelu_tanh(x);
      else if (activation == Activation::silu) x = ttx::silu(x);
      else if (activation == Activation::tanh) x = ttx::tanh(x);
      if (gated) x *= factor + factor_shift;
      if (added != nullptr) x += load_some(added + row * ld, count);
      return x;
    };
  }
};

}  // namespace ttx
