// computes cpp/test_printer.py:LINE: mul, mul, add
// computes cpp/test_printer.py:LINE: neg, cat
extern "C" int fused_neg_cat_mul_add(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  const float* cos = static_cast<const float*>(args[1]);
  const float* sin = static_cast<const float*>(args[2]);
  float* add = static_cast<float*>(args[3]);
  const int64_t batch = sizes[0];
  const int64_t x_d1 = sizes[1];
  const int64_t x_d2 = sizes[2];
  const int64_t x_d3 = sizes[3];
  const int64_t blocks = (x_d3 + 4095) / 4096;
  ttx::share_rows(batch * x_d1 * x_d2 * blocks, batch * x_d1 * x_d2 * x_d3 > 16384, [=](int64_t at, int64_t last) {
    int64_t block = at % blocks;
    int64_t row = at / blocks % x_d2;
    int64_t row1 = at / blocks / x_d2 % x_d1;
    int64_t row2 = at / blocks / x_d2 / x_d1;
    for (; at < last; ++at) {
      const int64_t begin = block * 4096;
      const int64_t end = begin + 4096 < x_d3 ? begin + 4096 : x_d3;
      const int64_t i1 = x_d3 - ((x_d3 / 2));
      #pragma omp simd
      for (int64_t col = begin; col < end; ++col) {
        const float x_ = ttx::read(x + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3);
        const float x1 = ttx::read(cos + col + row * x_d3);
        const float mul = ttx::product(x_, x1);
        const int64_t i = col;
        const bool ge = i >= i1;
        const float x2 = ge ? ttx::read(x + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3 - x_d3 + ((x_d3 / 2))) : float(0);
        const bool lt = i < i1;
        const float x3 = lt ? ttx::read(x + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3 + ((x_d3 / 2))) : float(0);
        const float neg = -x3;
        const float where_ = lt ? neg : x2;
        const float x4 = ttx::read(sin + col + row * x_d3);
        const float mul1 = ttx::product(where_, x4);
        const float add_ = mul + mul1;
        ttx::write(add + col + row * x_d3 + row1 * x_d2 * x_d3 + row2 * x_d1 * x_d2 * x_d3, add_);
      }
      if (++block == blocks) { block = 0; if (++row == x_d2) { row = 0; if (++row1 == x_d1) { row1 = 0; ++row2; } } }
    }
  });
  return 0;
}
