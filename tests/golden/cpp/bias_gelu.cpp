// computes cpp/test_printer.py:LINE: add, gelu
extern "C" int fused_add_gelu(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  const float* b = static_cast<const float*>(args[1]);
  float* gelu = static_cast<float*>(args[2]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  const int64_t x_d2 = sizes[2];
  const int64_t blocks = (x_d2 + 4095) / 4096;
  ttx::share_rows((batch * seq) * blocks, batch * seq * x_d2 > 16384, [=](int64_t at, int64_t last) {
    int64_t block = at % blocks;
    int64_t row = at / blocks;
    for (; at < last; ++at) {
      const int64_t begin = block * 4096;
      const int64_t end = begin + 4096 < x_d2 ? begin + 4096 : x_d2;
      const float c = 0.5f;
      const float c1 = 0.7071067811865476f;
      const float c2 = 1.0f;
      #pragma omp simd
      for (int64_t col = begin; col < end; ++col) {
        const float x_ = ttx::read(x + col + row * x_d2);
        const float x1 = ttx::read(b + col);
        const float add = x_ + x1;
        const float mul = c * add;
        const float mul1 = add * c1;
        const float erf = ttx::rounded(ttx::erf(mul1));
        const float add1 = c2 + erf;
        const float mul2 = mul * add1;
        ttx::write(gelu + col + row * x_d2, mul2);
      }
      if (++block == blocks) { block = 0; ++row; }
    }
  });
  return 0;
}
