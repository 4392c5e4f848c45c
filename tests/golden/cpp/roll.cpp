// computes cpp/test_printer.py:LINE: arange, add, fmod, index_select
extern "C" int fused_arange_add_fmod_index_select(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  float* index_select = static_cast<float*>(args[1]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  int status = 0;
  const int64_t blocks = (seq + 4095) / 4096;
  ttx::share_rows(batch * blocks, batch * seq > 16384, [=, &status](int64_t at, int64_t last) {
    int64_t block = at % blocks;
    int64_t row = at / blocks;
    for (; at < last; ++at) {
      const int64_t begin = block * 4096;
      const int64_t end = begin + 4096 < seq ? begin + 4096 : seq;
      const int64_t i2 = row + (((batch - 1) % batch));
      const int64_t i3 = batch;
      int64_t fmod = ttx::fmod(i2, i3);
      if ((fmod < 0 || fmod >= batch)) {
        __atomic_store_n(&status, 1, __ATOMIC_RELAXED);
        fmod = 0;
      }
      for (int64_t col = begin; col < end; ++col) {
        const float x_ = ttx::read(x + col + fmod * seq);
        ttx::write(index_select + col + row * seq, x_);
      }
      if (++block == blocks) { block = 0; ++row; }
    }
  });
  return status;
}
