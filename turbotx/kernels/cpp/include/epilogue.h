// What a GEMM does to its float32 sums before it stores them, rounded once after all of it.
//   in:  a vector of sums of one row, and for a gated layer the sums of its factor
//   out: activation(x + bias) [* (factor + its bias)] [+ residual]
//   example:  ttx::linear(w, a, k, m, c, n, ttx::Epilogue<float>{.bias = b, .activation = gelu});
#pragma once

#include "simd.h"
#include "vecmath.h"

namespace ttx {

enum class Activation { none, relu, gelu, gelu_tanh, silu, tanh };

template <class T>
struct Epilogue {
  const T* bias = nullptr;
  Activation activation = Activation::none;
  const T* residual = nullptr;
  long ld_residual = 0;
  long gated = 0;  // columns of a gated layer's output: its factor's bias lies so far behind

  // x holds columns column .. column + count of a row; lanes past count are ignored.
  TTX_INLINE vec operator()(vec x, vec factor, long row, long column, int count) const {
    if (bias != nullptr) x += load_some(bias + column, count);
    if (activation == Activation::gelu) x = ttx::gelu(x);
    else if (activation == Activation::relu) x = x < vec{} ? vec{} : x;
    else if (activation == Activation::gelu_tanh) x = ttx::gelu_tanh(x);
    else if (activation == Activation::silu) x = ttx::silu(x);
    else if (activation == Activation::tanh) x = ttx::tanh(x);
    if (gated > 0) {
      if (bias != nullptr) factor += load_some(bias + gated + column, count);
      x *= factor;
    }
    if (residual != nullptr) x += load_some(residual + row * ld_residual + column, count);
    return x;
  }
};

}  // namespace ttx
