// computes cpp/test_printer.py:LINE: mul, clone
extern "C" int fused_mul_clone(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  float* clone = static_cast<float*>(args[1]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  const int64_t blocks = (batch * seq * 8 + 4095) / 4096;
  ttx::share_rows(blocks, batch * seq * 8 > 16384, [=](int64_t block, int64_t last) {
    for (; block < last; ++block) {
      const int64_t begin = block * 4096;
      const int64_t end = begin + 4096 < batch * seq * 8 ? begin + 4096 : batch * seq * 8;
      const float c = 2.0f;
      #pragma omp simd
      for (int64_t col = begin; col < end; ++col) {
        const float x_ = ttx::read(x + col);
        const float mul = x_ * c;
        ttx::write(clone + col, mul);
      }
    }
  });
  return 0;
}
