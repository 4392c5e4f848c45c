// computes sigmoid, mul, mul
extern "C" int fused_sigmoid_mul(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  float* mul = static_cast<float*>(args[1]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  #pragma omp parallel for collapse(2) if ((((seq + 1) / 2)) * batch > 16384)
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t begin = 0; begin < ((seq + 1) / 2); begin += 4096) {
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
    }
  }
  return 0;
}
