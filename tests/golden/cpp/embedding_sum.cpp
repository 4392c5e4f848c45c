// computes cpp/test_printer.py:LINE: embedding, add
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
  const int64_t blocks = (seq + 4095) / 4096;
  ttx::share_rows(i_d0 * i_d1 * blocks, i_d0 * i_d1 * seq > 16384, [=, &status](int64_t at, int64_t last) {
    int64_t block = at % blocks;
    int64_t row = at / blocks % i_d1;
    int64_t row1 = at / blocks / i_d1;
    for (; at < last; ++at) {
      const int64_t begin = block * 4096;
      const int64_t end = begin + 4096 < seq ? begin + 4096 : seq;
      int64_t k_ = ttx::read(i + i_d1 * row1 + row);
      if ((k_ < 0 || k_ >= batch)) {
        __atomic_store_n(&status, 1, __ATOMIC_RELAXED);
        k_ = 0;
      }
      for (int64_t col = begin; col < end; ++col) {
        const float x = ttx::read(t + col + k_ * seq);
        const float x1 = ttx::read(p + col + row * seq);
        const float add_ = x + x1;
        ttx::write(add + col + i_d1 * row1 * seq + row * seq, add_);
      }
      if (++block == blocks) { block = 0; if (++row == i_d1) { row = 0; ++row1; } }
    }
  });
  return status;
}
