// computes cpp/test_printer.py:LINE: mul, pow, mean, add, rsqrt, mul
extern "C" int fused_mean_add_rsqrt_mul(void* const* args, const int64_t* sizes) {
  const ttx::bf16* w = static_cast<const ttx::bf16*>(args[0]);
  const ttx::bf16* x = static_cast<const ttx::bf16*>(args[1]);
  ttx::bf16* mul = static_cast<ttx::bf16*>(args[2]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  ttx::share_rows(batch, batch * seq > 16384, [=](int64_t row, int64_t last) {
    for (; row < last; ++row) {
      const int64_t i = seq;
      const float cast = ttx::cast<float>(i);
      const float c = 1e-06f;
      double wide_sum = 0;
      #pragma omp simd reduction(+:wide_sum)
      for (int64_t col = 0; col < seq; ++col) {
        const float x1 = ttx::read(x + col + row * seq);
        const float mul1 = ttx::product(x1, x1);
        wide_sum += mul1;
      }
      const float sum = static_cast<float>(wide_sum);
      const float div = sum / cast;
      const float add = div + c;
      const float rsqrt = ttx::rsqrt(add);
      #pragma omp simd
      for (int64_t col = 0; col < seq; ++col) {
        const float x_ = ttx::read(w + col);
        const float x1 = ttx::read(x + col + row * seq);
        const float mul_ = x_ * x1;
        const float mul2 = mul_ * rsqrt;
        ttx::write(mul + col + row * seq, mul2);
      }
    }
  });
  return 0;
}
