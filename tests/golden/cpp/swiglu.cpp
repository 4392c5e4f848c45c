// computes cpp/test_printer.py:LINE: sigmoid, mul, mul
extern "C" int fused_sigmoid_mul(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  float* mul = static_cast<float*>(args[1]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  const int64_t blocks = (((seq + 1) / 2) + 4095) / 4096;
  ttx::share_rows(batch * blocks, (((seq + 1) / 2)) * batch > 16384, [=](int64_t at, int64_t last) {
    int64_t block = at % blocks;
    int64_t row = at / blocks;
    for (; at < last; ++at) {
      const int64_t begin = block * 4096;
      const int64_t end = begin + 4096 < ((seq + 1) / 2) ? begin + 4096 : ((seq + 1) / 2);
      #pragma omp simd
      for (int64_t col = begin; col < end; ++col) {
        const float x_ = ttx::read(x + col + row * seq);
        const float sigmoid = ttx::sigmoid(x_);
        const float mul_ = x_ * sigmoid;
        const float x1 = ttx::read(x + col + row * seq + (((seq + 1) / 2)));
        const float mul1 = mul_ * x1;
        ttx::write(mul + col + (((seq + 1) / 2)) * row, mul1);
      }
      if (++block == blocks) { block = 0; ++row; }
    }
  });
  return 0;
}
