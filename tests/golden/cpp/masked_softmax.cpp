// computes cpp/test_printer.py:LINE: scalar_tensor, mul, where, softmax
extern "C" int fused_scalar_tensor_mul_where_softmax(void* const* args, const int64_t* sizes) {
  const bool* m = static_cast<const bool*>(args[0]);
  const float* x = static_cast<const float*>(args[1]);
  float* softmax = static_cast<float*>(args[2]);
  const int64_t batch = sizes[0];
  const int64_t x_d1 = sizes[1];
  const int64_t x_d2 = sizes[2];
  const int64_t x_d3 = sizes[3];
  ttx::share_rows(batch * (x_d1 * x_d2), batch * x_d1 * x_d2 * x_d3 > 16384, [=](int64_t at, int64_t last) {
    int64_t row = at % (x_d1 * x_d2);
    int64_t row1 = at / (x_d1 * x_d2);
    for (; at < last; ++at) {
      float* scratch = ttx::detail::thread_scratch(2 * ((x_d3 + 15) / 16 * 16));
      float* kept_where_ = reinterpret_cast<float*>(scratch);
      float* kept_largest_exp = reinterpret_cast<float*>(scratch + 1 * ((x_d3 + 15) / 16 * 16));
      const float c = -std::numeric_limits<float>::infinity();
      const float c1 = 0.125f;
      float largest = -std::numeric_limits<float>::infinity();
      int largest_nan = 0;
      #pragma omp simd reduction(max:largest) reduction(|:largest_nan)
      for (int64_t col = 0; col < x_d3; ++col) {
        const bool k_ = ttx::read(m + col + row1 * x_d3);
        const float x_ = ttx::read(x + col + row * x_d3 + row1 * x_d1 * x_d2 * x_d3);
        const float mul = x_ * c1;
        const float where_ = k_ ? c : mul;
        kept_where_[col] = where_;
        largest = where_ > largest ? where_ : largest;
        largest_nan |= where_ != where_;
      }
      if (largest_nan) largest = std::numeric_limits<float>::quiet_NaN();
      double wide_total = 0;
      for (int64_t begin = 0; begin < x_d3; begin += 256) {
        const int64_t end = begin + 256 < x_d3 ? begin + 256 : x_d3;
        float part_total = 0;
        #pragma omp simd reduction(+:part_total)
        for (int64_t col = begin; col < end; ++col) {
          const float where_ = kept_where_[col];
          const float largest_below = where_ - largest;
          const float largest_exp = ttx::rounded(ttx::exp(largest_below));
          kept_largest_exp[col] = largest_exp;
          part_total += largest_exp;
        }
        wide_total += part_total;
      }
      const float total = static_cast<float>(wide_total);
      #pragma omp simd
      for (int64_t col = 0; col < x_d3; ++col) {
        const float largest_exp = kept_largest_exp[col];
        const float div = largest_exp / total;
        ttx::write(softmax + col + row * x_d3 + row1 * x_d1 * x_d2 * x_d3, div);
      }
      if (++row == (x_d1 * x_d2)) { row = 0; ++row1; }
    }
  });
  return 0;
}
