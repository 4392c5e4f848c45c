// computes cpp/test_printer.py:LINE: add, layer_norm
extern "C" int fused_add_layer_norm(void* const* args, const int64_t* sizes) {
  const float* arg0 = static_cast<const float*>(args[0]);
  const float* arg1 = static_cast<const float*>(args[1]);
  const float* weight = static_cast<const float*>(args[2]);
  const float* bias = static_cast<const float*>(args[3]);
  float* layer_norm = static_cast<float*>(args[4]);
  const int64_t batch = sizes[0];
  const int64_t seq = sizes[1];
  ttx::share_rows(batch * seq, batch * seq * 384 > 16384, [=](int64_t row, int64_t last) {
    for (; row < last; ++row) {
      float* scratch = ttx::detail::thread_scratch(384);
      float* kept_mean_away = reinterpret_cast<float*>(scratch);
      const int64_t mean_size = 384;
      const double mean_count = ttx::cast<double>(mean_size);
      const double m20_zero = 0.0;
      const float c1 = 384.0f;
      const float c2 = 1e-05f;
      double mean_total = 0;
      for (int64_t begin = 0; begin < 384; begin += 128) {
        float part_mean_total = 0;
        #pragma omp simd reduction(+:part_mean_total)
        for (int64_t col = begin; col < begin + 128; ++col) {
          const float x = ttx::read(arg0 + col + row * 384);
          const float x1 = ttx::read(arg1 + col + row * 384);
          const float add = x + x1;
          part_mean_total += add;
        }
        mean_total += part_mean_total;
      }
      const double mean_wide = mean_total / mean_count;
      const float mean_near = ttx::cast<float>(mean_wide);
      const double mean_again = ttx::cast<double>(mean_near);
      double m20_raw = 0;
      double mean_drift = 0;
      for (int64_t begin = 0; begin < 384; begin += 128) {
        float part_m20_raw = 0;
        float part_mean_drift = 0;
        #pragma omp simd reduction(+:part_m20_raw) reduction(+:part_mean_drift)
        for (int64_t col = begin; col < begin + 128; ++col) {
          const float x = ttx::read(arg0 + col + row * 384);
          const float x1 = ttx::read(arg1 + col + row * 384);
          const float add = x + x1;
          const float mean_away = add - mean_near;
          kept_mean_away[col] = mean_away;
          const float mean_square = ttx::product(mean_away, mean_away);
          part_m20_raw += mean_square;
          part_mean_drift += mean_away;
        }
        m20_raw += part_m20_raw;
        mean_drift += part_mean_drift;
      }
      const double mean_off = mean_drift / mean_count;
      const double mean_exact = mean_again + mean_off;
      const float mean = ttx::cast<float>(mean_exact);
      const float mean_rest = ttx::cast<float>(mean_off);
      const double m20_lost = ttx::product(mean_drift, mean_off);
      const double m20_apart = m20_raw - m20_lost;
      const double m20_wide = ttx::maximum(m20_apart, m20_zero);
      const float m20 = ttx::cast<float>(m20_wide);
      const float div = m20 / c1;
      const float add1 = div + c2;
      const float rsqrt = ttx::rsqrt(add1);
      #pragma omp simd
      for (int64_t col = 0; col < 384; ++col) {
        const float mean_away = kept_mean_away[col];
        const float mean_centred = mean_away - mean_rest;
        const float mul = mean_centred * rsqrt;
        const float x2 = ttx::read(weight + col);
        const float x3 = ttx::read(bias + col);
        const float fma = ttx::fma(mul, x2, x3);
        ttx::write(layer_norm + col + row * 384, fma);
      }
    }
  });
  return 0;
}
