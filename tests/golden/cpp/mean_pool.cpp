// computes cpp/test_printer.py:LINE: mul, sum, sum, clamp, div
extern "C" int fused_mul_sum_clamp_div(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  const float* m = static_cast<const float*>(args[1]);
  float* div = static_cast<float*>(args[2]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  const int64_t x_d2 = sizes[2];
  const int64_t blocks = (x_d2 + 63) / 64;
  ttx::share_rows(batch * blocks, batch * seq * x_d2 > 16384, [=](int64_t at, int64_t last) {
    int64_t block = at % blocks;
    int64_t row1 = at / blocks;
    for (; at < last; ++at) {
      const int64_t begin = block * 64;
      const int64_t count = x_d2 - begin < 64 ? x_d2 - begin : 64;
      float tile_sum[64];
      const float c = 1e-09f;
      double total_sum[64];
      ttx::fill(total_sum, double(0));
      double total_sum1[64];
      ttx::fill(total_sum1, double(0));
      for (int64_t col = 0; col < seq; ++col) {
        #pragma omp simd
        for (int64_t k = 0; k < count; ++k) {
          const int64_t row = begin + k;
          const float x_ = ttx::read(x + col * x_d2 + row + row1 * seq * x_d2);
          const float x1 = ttx::read(m + col + row1 * seq);
          const float mul = ttx::product(x_, x1);
          total_sum[k] += mul;
          total_sum1[k] += x1;
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        tile_sum[k] = static_cast<float>(total_sum[k]);
      }
      const float sum1 = float(total_sum1[0]);
      const float maximum = ttx::maximum(sum1, c);
      #pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        const int64_t row = begin + k;
        const float sum = tile_sum[k];
        const float div_ = sum / maximum;
        ttx::write(div + row + row1 * x_d2, div_);
      }
      if (++block == blocks) { block = 0; ++row1; }
    }
  });
  return 0;
}
