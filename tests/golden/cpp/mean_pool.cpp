extern "C" int fused_mul_sum_clamp_div(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  const float* m = static_cast<const float*>(args[1]);
  float* div = static_cast<float*>(args[2]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  const int64_t x_d2 = sizes[2];
  #pragma omp parallel for collapse(2) if (batch * seq * x_d2 > 16384)
  for (int64_t row1 = 0; row1 < batch; ++row1) {
    for (int64_t row = 0; row < x_d2; ++row) {
      const float c = 1e-09f;
      double wide_sum = 0;
      double wide_sum1 = 0;
      #pragma omp simd reduction(+:wide_sum) reduction(+:wide_sum1)
      for (int64_t col = 0; col < seq; ++col) {
        const float x_ = ttx::read(x + col * x_d2 + row + row1 * seq * x_d2);
        const float x1 = ttx::read(m + col + row1 * seq);
        const float mul = x_ * x1;
        wide_sum += mul;
        wide_sum1 += x1;
      }
      const float sum = static_cast<float>(wide_sum);
      const float sum1 = static_cast<float>(wide_sum1);
      const float maximum = ttx::maximum(sum1, c);
      const float div_ = sum / maximum;
      ttx::write(div + row + row1 * x_d2, div_);
    }
  }
  return 0;
}
