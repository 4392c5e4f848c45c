// computes fusion/test_fuse.py:LINE: mul, neg, cat, mul, add, clone
extern "C" int fused_cat_mul_add_clone(void* const* args, const int64_t* sizes) {
  const float* x = static_cast<const float*>(args[0]);
  const float* cos = static_cast<const float*>(args[1]);
  const float* sin = static_cast<const float*>(args[2]);
  float* clone = static_cast<float*>(args[3]);
  float* clone1 = static_cast<float*>(args[4]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  ttx::share_rows(batch * seq * 6, batch * seq * 48 > 16384, [=](int64_t at, int64_t last) {
    int64_t row = at % 6;
    int64_t row1 = at / 6 % seq;
    int64_t row2 = at / 6 / seq;
    for (; at < last; ++at) {
      const int64_t part = row;
      const int64_t first_part = int64_t(4);
      const bool in_first = part < first_part;
      const bool in_second = part >= first_part;
      const int64_t c = ttx::hidden(int64_t(4));
      #pragma omp simd
      for (int64_t col = 0; col < 8; ++col) {
        const float x_ = ttx::read(x + col + row * 8 + row1 * 64 + row2 * seq * 64);
        const float x1 = ttx::read(cos + col + row1 * 8);
        const float mul = ttx::product(x_, x1);
        const int64_t i = col;
        const bool ge = i >= c;
        const float x2 = ge ? ttx::read(x + col + row * 8 + row1 * 64 + row2 * seq * 64 - 4) : float(0);
        const bool lt = i < c;
        const float x3 = lt ? ttx::read(x + col + row * 8 + row1 * 64 + row2 * seq * 64 + 4) : float(0);
        const float neg = -x3;
        const float where_ = lt ? neg : x2;
        const float x4 = ttx::read(sin + col + row1 * 8);
        const float mul1 = ttx::product(where_, x4);
        const float add = mul + mul1;
        if (in_first) ttx::write(clone + col + row * 8 + row1 * 32 + row2 * seq * 32, add);
        if (in_second) ttx::write(clone1 + col + row * 8 + row1 * 16 + row2 * seq * 16 - 32, add);
      }
      if (++row == 6) { row = 0; if (++row1 == seq) { row1 = 0; ++row2; } }
    }
  });
  return 0;
}
