// computes mul, neg, cat, mul, add
extern "C" int fused_neg_cat_mul_add(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  const float* cos = static_cast<const float*>(args[1]);
  const float* sin = static_cast<const float*>(args[2]);
  float* add = static_cast<float*>(args[3]);
  const int64_t batch = sizes[0];
  const int64_t x_d1 = sizes[1];
  const int64_t x_d2 = sizes[2];
  const int64_t x_d3 = sizes[3];
  #pragma omp parallel for collapse(4) if (batch * x_d1 * x_d2 * x_d3 > 16384)
  for (int64_t row2 = 0; row2 < batch; ++row2) {
    for (int64_t row1 = 0; row1 < x_d1; ++row1) {
      for (int64_t row = 0; row < x_d2; ++row) {
        for (int64_t begin = 0; begin < x_d3; begin += 4096) {
          const int64_t end = begin + 4096 < x_d3 ? begin + 4096 : x_d3;
          const int64_t i1 = x_d3 - ((x_d3 / 2));
          #pragma omp simd
          for (int64_t col = begin; col < end; ++col) {
            const float x_ = ttx::read(x + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3);
            const float x1 = ttx::read(cos + col + row * x_d3);
            const float mul = x_ * x1;
            const int64_t i = col;
            const bool ge = i >= i1;
            const float x2 = ge ? ttx::read(x + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3 - x_d3 + ((x_d3 / 2))) : float(0);
            const bool lt = i < i1;
            const float x3 = lt ? ttx::read(x + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3 + ((x_d3 / 2))) : float(0);
            const float neg = -x3;
            const float where_ = lt ? neg : x2;
            const float x4 = ttx::read(sin + col + row * x_d3);
            const float mul1 = where_ * x4;
            const float add_ = mul + mul1;
            ttx::write(add + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3, add_);
          }
        }
      }
    }
  }
  return 0;
}
