// computes embedding, add
extern "C" int fused_embedding_add(void* const* args, const int64_t* sizes) {
  const int64_t* i = static_cast<const int64_t*>(args[0]);
  const float* t = static_cast<const float*>(args[1]);
  const float* p = static_cast<const float*>(args[2]);
  float* add = static_cast<float*>(args[3]);
  const int64_t batch = sizes[0];
  const int64_t i_d0 = sizes[1];
  const int64_t i_d1 = sizes[2];
  const int64_t seq = sizes[3];
  int status = 0;
  #pragma omp parallel for collapse(3) if (i_d0 * i_d1 * seq > 16384)
  for (int64_t row1 = 0; row1 < i_d0; ++row1) {
    for (int64_t row = 0; row < i_d1; ++row) {
      for (int64_t begin = 0; begin < seq; begin += 4096) {
        const int64_t end = begin + 4096 < seq ? begin + 4096 : seq;
        int64_t k_ = ttx::read(i + i_d1 * row1 + row);
        if ((k_ < 0 || k_ >= batch)) {
          #pragma omp atomic write
          status = 1;
          k_ = 0;
        }
        for (int64_t col = begin; col < end; ++col) {
          const float x = ttx::read(t + col + k_ * seq);
          const float x1 = ttx::read(p + col + row * seq);
          const float add_ = x + x1;
          ttx::write(add + col + i_d1 * row1 * seq + row * seq, add_);
        }
      }
    }
  }
  return status;
}
