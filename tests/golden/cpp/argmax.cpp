// computes cpp/test_printer.py:LINE: argmax
extern "C" int fused_argmax(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  int64_t* argmax = static_cast<int64_t*>(args[1]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  ttx::share_rows(batch, batch * seq > 16384, [=](int64_t row, int64_t last) {
    for (; row < last; ++row) {
      const int64_t i = seq;
      float max = -std::numeric_limits<float>::infinity();
      int max_nan = 0;
      #pragma omp simd reduction(max:max) reduction(|:max_nan)
      for (int64_t col = 0; col < seq; ++col) {
        const float x_ = ttx::read(x + col + row * seq);
        max = x_ > max ? x_ : max;
        max_nan |= x_ != x_;
      }
      if (max_nan) max = std::numeric_limits<float>::quiet_NaN();
      int64_t min = std::numeric_limits<int64_t>::max();
      #pragma omp simd reduction(min:min)
      for (int64_t col = 0; col < seq; ++col) {
        const float x_ = ttx::read(x + col + row * seq);
        const bool eq = x_ == max;
        const bool isnan = ttx::isnan(x_);
        const bool or_ = eq | isnan;
        const int64_t i1 = col;
        const int64_t where_ = or_ ? i1 : i;
        min = where_ < min ? where_ : min;
      }
      ttx::write(argmax + row, min);
    }
  });
  return 0;
}
