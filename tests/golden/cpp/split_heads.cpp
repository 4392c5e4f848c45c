// computes mul
extern "C" int fused_mul(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  float* mul = static_cast<float*>(args[1]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  #pragma omp parallel for collapse(3) if (batch * seq * 8 > 16384)
  for (int64_t row2 = 0; row2 < batch; ++row2) {
    for (int64_t row1 = 0; row1 < 2; ++row1) {
      for (int64_t row = 0; row < seq; ++row) {
        const float c = 2.0f;
        #pragma omp simd
        for (int64_t col = 0; col < 4; ++col) {
          const float x_ = ttx::read(x + col + row * 8 + row1 * 4 + row2 * seq * 8);
          const float mul_ = x_ * c;
          ttx::write(mul + col + row * 4 + row1 * seq * 4 + row2 * seq * 8, mul_);
        }
      }
    }
  }
  return 0;
}
