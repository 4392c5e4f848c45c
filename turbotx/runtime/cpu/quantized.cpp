// Products over packed weights of int8, or of int4 with a scale for each group.
//   in:  a dtype: 3 is int8, 4 int4, two to a byte, of which k counts bytes; the weight as parts, or
//        as panels
//   out: a packed weight, and its product with rows of floats or of int8
#include "gemm_int4.h"
#include "gemm_int8_weights.h"
#include "product.h"

namespace {

struct Int8Weight : ttx::PackedPanels<ttx::PackedInt8, std::int8_t> {
  using PackedPanels::PackedPanels;
  template <class T>
  void multiply_as(const ttx::Product& p) {
    T* c = static_cast<T*>(p.c);
    auto finish = ttx::finish_of<T>(p, packed);
    if (p.rows == 1) {
      const T* a = static_cast<const T*>(p.a);
      ttx::linear_int8_weights(packed, a, p.lda, p.m, p.weight_scale, c, p.ldc, finish);
    } else {
      ttx::linear_int8(packed, {p.a, p.lda, p.m, p.x_scale, p.rows == 2}, p.weight_scale, c, p.ldc, finish);
    }
  }
  void multiply(const ttx::Product& p) override {
    ttx::with_dtype(p.dtype, [&]<class T>(T) { multiply_as<T>(p); });
  }
};

struct Int4Weight : ttx::PackedPanels<ttx::PackedInt4, std::uint8_t> {
  using PackedPanels::PackedPanels;
  ttx::GroupScales scales{};  // before the first product Python says where they are
  template <class T>
  void multiply_as(const ttx::Product& p) {
    ttx::linear_int4(packed, scales, static_cast<const T*>(p.a), p.lda, p.m, static_cast<T*>(p.c),
                     p.ldc, ttx::finish_of<T>(p, packed));
  }
  void multiply(const ttx::Product& p) override {
    ttx::with_dtype(p.dtype, [&]<class T>(T) { multiply_as<T>(p); });
  }
};

}  // namespace

extern "C" {

// See products.cpp.
void* ttx_pack_weight(int dtype, const ttx::PartRecord* parts, int64_t count, int64_t n, int64_t k,
                      int gated) {
  try {
    if (dtype == 3) return ttx::pack<std::int8_t, Int8Weight>(parts, count, n, k, gated);
    return ttx::pack<std::uint8_t, Int4Weight>(parts, count, n, k, gated);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void* ttx_map_weight(int dtype, const void* panels, int64_t n, int64_t k, int gated) {
  if (dtype == 3) return static_cast<ttx::Weight*>(new Int8Weight(panels, n, k, gated));
  return static_cast<ttx::Weight*>(new Int4Weight(panels, n, k, gated));
}

// Says where the scales of an int4 weight lie, as `GroupScales` has them; they must stay there.
void ttx_set_group_scales(void* weight, const void* panels, int64_t group, int64_t groups, int64_t k,
                          int wide, int shifted) {
  static_cast<Int4Weight*>(static_cast<ttx::Weight*>(weight))->scales = {
      panels, group, groups, k, wide != 0, shifted != 0};
}

// How a dtype's panels are laid out: columns of a panel << 8 | neighbours of one column; of int8 also
// what depths are multiples of << 16, and 1 << 24 where the highest bit is flipped.
int64_t ttx_panel_layout(int dtype) {
  if (dtype == 4) return int64_t{ttx::detail::kPanel} << 8 | ttx::detail::PanelLayout<std::uint8_t>::step;
  bool amx = ttx::detail::uses_amx<std::int8_t>();
  int64_t depth = amx ? ttx::detail::kAmxDepth<std::int8_t> : ttx::detail::kQuad;
  int64_t flipped = !amx && ttx::detail::kWeightOffset != 0;
  return flipped << 24 | depth << 16 | int64_t{ttx::detail::kPanel} << 8 | ttx::detail::kQuad;
}

// As ttx_linear: args also the int8 weight's scales, and those of int8 rows of a or null where a is
// floats; sizes: also the dtype of all else, and what rows are.
int ttx_linear_quantized(void* const* args, const int64_t* sizes) {
  ttx::Product p = ttx::product_of(args, sizes);
  p.weight_scale = static_cast<const float*>(args[5]);
  p.x_scale = static_cast<const float*>(args[6]);
  p.dtype = static_cast<int>(sizes[5]);
  p.rows = static_cast<int>(sizes[6]);
  if (p.m > 0) static_cast<ttx::Weight*>(args[1])->multiply(p);
  return 0;
}

}  // extern "C"
