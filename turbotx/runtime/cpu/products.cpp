// Products over packed weights of floats.
//   in:  a dtype: 0 is float32, 1 bfloat16, 2 float16; the weight as parts, or as panels
//   out: a packed weight, and its product with rows of the same dtype
#include "product.h"

namespace {

template <class T>
struct FloatWeight : ttx::PackedPanels<ttx::PackedWeight<T>, T> {
  using ttx::PackedPanels<ttx::PackedWeight<T>, T>::PackedPanels;
  void multiply(const ttx::Product& p) override {
    const T* a = static_cast<const T*>(p.a);
    T* c = static_cast<T*>(p.c);
    ttx::linear(this->packed, a, p.lda, p.m, c, p.ldc, ttx::finish_of<T>(p, this->packed));
  }
};

}  // namespace

extern "C" {

// Rows of all parts make the weight of n outputs. Of a gated weight the first n rows are the gate, the
// others its factor.
void* ttx_pack_weight(int dtype, const ttx::PartRecord* parts, int64_t count, int64_t n, int64_t k,
                      int gated) {
  try {
    return ttx::with_dtype(dtype, [=]<class T>(T) {
      return ttx::pack<T, FloatWeight<T>>(parts, count, n, k, gated);
    });
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// The same over panels that were packed before, of this processor's layout; they must stay there.
void* ttx_map_weight(int dtype, const void* panels, int64_t n, int64_t k, int gated) {
  return ttx::with_dtype(dtype, [=]<class T>(T) -> ttx::Weight* {
    return new FloatWeight<T>(panels, n, k, gated);
  });
}

// How a dtype's panels are laid out: columns of a panel << 8 | neighbours of one column.
int64_t ttx_panel_layout(int dtype) {
  int step = ttx::with_dtype(dtype, []<class T>(T) -> int { return ttx::detail::PanelLayout<T>::step; });
  return int64_t{ttx::detail::kPanel} << 8 | step;
}

// args, sizes: see product_of.
int ttx_linear(void* const* args, const int64_t* sizes) {
  ttx::Product p = ttx::product_of(args, sizes);
  if (p.m > 0) static_cast<ttx::Weight*>(args[1])->multiply(p);
  return 0;
}

}  // extern "C"
