// The runtime of compiled programs on a CPU: runs launches from a table, and owns packed weights.
//   in:  launches, each a function with the uniform signature int(void* const* args, const int64_t* sizes),
//        and where its arguments lie in the program's address table and size table
//   out: 0, or the launch that failed (from 1) and its error code as launch << 32 | code
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "experts.h"
#include "gemm_int4.h"
#include "gemm_int8_weights.h"

namespace {

using Call = int (*)(void* const*, const int64_t*);

struct Launch {
  Call call;
  int32_t arg_count, size_count;
  const int32_t* slots;    // per argument: its place in the address table, or -1 for none
  const int32_t* offsets;  // per argument: the size that is its offset in bytes, or -1 for zero
  const int32_t* sizes;    // per size: its place in the size table
};

constexpr int kMaxArgs = 256;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What a launch asks of a weight: C = epilogue(A W^T), m rows.
struct Product {
  const void* a;
  long lda, m;
  const void* bias;
  const void* residual;
  long ld_residual;
  ttx::Activation activation;
  void* c;
  long ldc;
  const float* x_scale = nullptr;  // of int8 rows; null where a quantised weight is given floats
  const float* weight_scale = nullptr;
  int dtype = 0;  // of all but int8, by the numbers of ttx_pack_weight
  int rows = 0;  // of a quantised weight: 1 where floats are multiplied as they are, 2 int8 of scale 1
};

// What is packed: of one weight, or of one for each expert.
struct Packed {
  virtual ~Packed() = default;
};

// One weight, packed: one token streams it in order as many do.
struct Weight : Packed {
  virtual void multiply(const Product& p) = 0;
  virtual const void* panels() const = 0;
};

// A weight for each expert, whose rows end at `ends`; false where those are none.
struct Experts : Packed {
  virtual bool multiply(const Product& p, const int32_t* ends) = 0;
};

template <class T, class Kept>
ttx::Epilogue<T> finish_of(const Product& p, const Kept& packed) {
  return {.bias = static_cast<const T*>(p.bias),
          .activation = p.activation,
          .residual = static_cast<const T*>(p.residual),
          .ld_residual = p.ld_residual,
          .gated = packed.group == 2 ? packed.n : 0};
}

template <class T>
struct TypedWeight : Weight {
  ttx::PackedWeight<T> packed;
  TypedWeight(const std::vector<ttx::WeightPart<T>>& parts, long n, long k, bool gated)
      : packed(parts.data(), static_cast<long>(parts.size()), n, k, gated) {}
  TypedWeight(const void* panels, long n, long k, bool gated)
      : packed(static_cast<const T*>(panels), n, k, gated, std::true_type()) {}
  const void* panels() const override { return packed.panel(0); }
  void multiply(const Product& p) override {
    const T* a = static_cast<const T*>(p.a);
    T* c = static_cast<T*>(p.c);
    ttx::linear(packed, a, p.lda, p.m, c, p.ldc, finish_of<T>(p, packed));
  }
};

struct Int8Weight : Weight {
  ttx::PackedInt8 packed;
  Int8Weight(const std::vector<ttx::WeightPart<std::int8_t>>& parts, long n, long k, bool gated)
      : packed(parts.data(), static_cast<long>(parts.size()), n, k, gated) {}
  Int8Weight(const void* panels, long n, long k, bool gated)
      : packed(static_cast<const std::int8_t*>(panels), n, k, gated, std::true_type()) {}
  const void* panels() const override { return packed.panel(0); }
  template <class T>
  void multiply_as(const Product& p) {
    T* c = static_cast<T*>(p.c);
    auto finish = finish_of<T>(p, packed);
    if (p.rows == 1) {
      const T* a = static_cast<const T*>(p.a);
      ttx::linear_int8_weights(packed, a, p.lda, p.m, p.weight_scale, c, p.ldc, finish);
    } else {
      ttx::linear_int8(packed, {p.a, p.lda, p.m, p.x_scale, p.rows == 2}, p.weight_scale, c, p.ldc, finish);
    }
  }
  void multiply(const Product& p) override {
    if (p.dtype == 0) multiply_as<float>(p);
    else if (p.dtype == 1) multiply_as<ttx::bf16>(p);
    else multiply_as<ttx::f16>(p);
  }
};

struct Int4Weight : Weight {
  ttx::PackedInt4 packed;
  ttx::GroupScales scales{};  // before the first product Python says where they are
  Int4Weight(const std::vector<ttx::WeightPart<std::uint8_t>>& parts, long n, long k, bool gated)
      : packed(parts.data(), static_cast<long>(parts.size()), n, k, gated) {}
  Int4Weight(const void* panels, long n, long k, bool gated)
      : packed(static_cast<const std::uint8_t*>(panels), n, k, gated, std::true_type()) {}
  const void* panels() const override { return packed.panel(0); }
  template <class T>
  void multiply_as(const Product& p) {
    ttx::linear_int4(packed, scales, static_cast<const T*>(p.a), p.lda, p.m, static_cast<T*>(p.c),
                     p.ldc, finish_of<T>(p, packed));
  }
  void multiply(const Product& p) override {
    if (p.dtype == 0) multiply_as<float>(p);
    else if (p.dtype == 1) multiply_as<ttx::bf16>(p);
    else multiply_as<ttx::f16>(p);
  }
};

// Rows of a weight as Python says them.
struct Part { const void* w; int64_t rows, stride_n, stride_k; };

template <class T>
struct TypedExperts : Experts {
  ttx::PackedExperts<T> packed;
  bool multiply(const Product& p, const int32_t* ends) override {
    if (!ttx::are_ends(ends, static_cast<long>(packed.size()), p.m)) return false;
    ttx::Epilogue<T> finish{.activation = p.activation,
                            .gated = packed[0]->group == 2 ? packed[0]->n : 0};
    ttx::grouped_linear(packed, ends, static_cast<const T*>(p.a), p.lda, p.m, static_cast<T*>(p.c),
                        p.ldc, finish);
    return true;
  }
};

template <class T>
Packed* pack_experts(const void* w, long experts, long n, long k, long se, long sn, long sk,
                     bool gated) {
  auto made = std::make_unique<TypedExperts<T>>();
  for (long e = 0; e < experts; ++e)
    made->packed.push_back(std::make_unique<ttx::PackedWeight<T>>(
        static_cast<const T*>(w) + e * se, gated ? n / 2 : n, k, sn, sk, gated));
  return made.release();
}

template <class T, class Kept = TypedWeight<T>>
Packed* pack(const Part* parts, int64_t count, long n, long k, bool gated) {
  std::vector<ttx::WeightPart<T>> typed;
  for (const Part* p = parts; p < parts + count; ++p)
    typed.push_back({static_cast<const T*>(p->w), p->rows, p->stride_n, p->stride_k});
  return new Kept(typed, n, k, gated);
}

}  // namespace

extern "C" {

int64_t ttx_run(const Launch* launches, int64_t begin, int64_t end, void* const* table,
                const int64_t* sizes, int64_t* ticks) {
  void* args[kMaxArgs];
  int64_t values[kMaxArgs];
  for (int64_t i = begin; i < end; ++i) {
    const Launch& launch = launches[i];
    for (int k = 0; k < launch.arg_count; ++k) {
      char* address = launch.slots[k] < 0 ? nullptr : static_cast<char*>(table[launch.slots[k]]);
      if (address != nullptr && launch.offsets[k] >= 0) address += sizes[launch.offsets[k]];
      args[k] = address;
    }
    for (int k = 0; k < launch.size_count; ++k) values[k] = sizes[launch.sizes[k]];
    if (ticks != nullptr) ticks[2 * i] = now_ns();
    int code = launch.call(args, values);
    if (ticks != nullptr) ticks[2 * i + 1] = now_ns();
    if (code != 0) return (i + 1) << 32 | static_cast<uint32_t>(code);
  }
  return 0;
}

// dtype 0 is float32, 1 bfloat16, 2 float16, 3 int8, 4 int4, two to a byte, of which k counts bytes;
// rows of all parts make the weight of n outputs.
// Of a gated weight the first n rows are the gate, the others its factor.
void* ttx_pack_weight(int dtype, const Part* parts, int64_t count, int64_t n, int64_t k,
                      int gated) {
  try {
    if (dtype == 0) return pack<float>(parts, count, n, k, gated);
    if (dtype == 1) return pack<ttx::bf16>(parts, count, n, k, gated);
    if (dtype == 3) return pack<std::int8_t, Int8Weight>(parts, count, n, k, gated);
    if (dtype == 4) return pack<std::uint8_t, Int4Weight>(parts, count, n, k, gated);
    return pack<ttx::f16>(parts, count, n, k, gated);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// The same over panels that were packed before, of this processor's layout; they must stay there.
void* ttx_map_weight(int dtype, const void* panels, int64_t n, int64_t k, int gated) {
  Packed* made;
  if (dtype == 0) made = new TypedWeight<float>(panels, n, k, gated);
  else if (dtype == 1) made = new TypedWeight<ttx::bf16>(panels, n, k, gated);
  else if (dtype == 3) made = new Int8Weight(panels, n, k, gated);
  else if (dtype == 4) made = new Int4Weight(panels, n, k, gated);
  else made = new TypedWeight<ttx::f16>(panels, n, k, gated);
  return made;
}

// Says where the scales of an int4 weight lie, as `GroupScales` has them; they must stay there.
void ttx_set_group_scales(void* weight, const void* panels, int64_t group, int64_t groups, int64_t k,
                          int wide, int shifted) {
  static_cast<Int4Weight*>(static_cast<Packed*>(weight))->scales = {panels,    group, groups, k,
                                                                    wide != 0, shifted != 0};
}

const void* ttx_weight_panels(const void* weight) {
  return static_cast<const Weight*>(static_cast<const Packed*>(weight))->panels();
}

// How a dtype's panels are laid out: columns of a panel << 8 | neighbours of one column; of int8 also
// what depths are multiples of << 16, and 1 << 24 where the highest bit is flipped.
int64_t ttx_panel_layout(int dtype) {
  if (dtype == 3) {
    bool amx = ttx::detail::uses_amx<std::int8_t>();
    int64_t depth = amx ? ttx::detail::kAmxDepth<std::int8_t> : ttx::detail::kQuad;
    int64_t flipped = !amx && ttx::detail::kWeightOffset != 0;
    return flipped << 24 | depth << 16 | int64_t{ttx::detail::kPanel} << 8 | ttx::detail::kQuad;
  }
  int step = dtype == 0   ? ttx::detail::PanelLayout<float>::step
             : dtype == 1 ? ttx::detail::PanelLayout<ttx::bf16>::step
             : dtype == 4 ? ttx::detail::PanelLayout<std::uint8_t>::step
                          : ttx::detail::PanelLayout<ttx::f16>::step;
  return int64_t{ttx::detail::kPanel} << 8 | step;
}

// A weight for each expert, packed: element (output j, input i) of expert e at
// w[e * se + j * sn + i * sk].
void* ttx_pack_experts(int dtype, const void* w, int64_t experts, int64_t n, int64_t k, int64_t se,
                       int64_t sn, int64_t sk, int gated) {
  try {
    if (dtype == 0) return pack_experts<float>(w, experts, n, k, se, sn, sk, gated);
    if (dtype == 1) return pack_experts<ttx::bf16>(w, experts, n, k, se, sn, sk, gated);
    return pack_experts<ttx::f16>(w, experts, n, k, se, sn, sk, gated);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void ttx_free_weight(void* weight) { delete static_cast<Packed*>(weight); }

// args: a, packed weight, bias or null, out, residual or null; sizes: m, lda, ldc, the residual's
// row stride, the activation.
int ttx_linear(void* const* args, const int64_t* sizes) {
  Product p{.a = args[0], .lda = sizes[1], .m = sizes[0], .bias = args[2], .residual = args[4],
            .ld_residual = sizes[3], .activation = static_cast<ttx::Activation>(sizes[4]),
            .c = args[3], .ldc = sizes[2]};
  if (p.m > 0) static_cast<Weight*>(static_cast<Packed*>(args[1]))->multiply(p);
  return 0;
}

// args: a, a packed weight for each expert, where each one's rows end, out; sizes: m, lda, ldc, the
// activation. 1 where the ends are not those of m rows.
int ttx_grouped_linear(void* const* args, const int64_t* sizes) {
  Product p{.a = args[0], .lda = sizes[1], .m = sizes[0],
            .activation = static_cast<ttx::Activation>(sizes[3]), .c = args[3], .ldc = sizes[2]};
  Experts* experts = static_cast<Experts*>(static_cast<Packed*>(args[1]));
  return experts->multiply(p, static_cast<const int32_t*>(args[2])) ? 0 : 1;
}

// args: the expert of each row; out: which row stands where, where each row stands, where each
// expert's rows end; sizes: rows, experts.
int ttx_route(void* const* args, const int64_t* sizes) {
  ttx::route(static_cast<const int64_t*>(args[0]), sizes[0], sizes[1],
             static_cast<int64_t*>(args[1]), static_cast<int64_t*>(args[2]),
             static_cast<int32_t*>(args[3]));
  return 0;
}

// As ttx_linear of a weight of int8 or int4: args also the int8 weight's scales, and those of int8 rows
// of a or null where a is floats; sizes: also the dtype of all else, and what rows are.
int ttx_linear_int8(void* const* args, const int64_t* sizes) {
  Product p{.a = args[0], .lda = sizes[1], .m = sizes[0], .bias = args[2], .residual = args[4],
            .ld_residual = sizes[3], .activation = static_cast<ttx::Activation>(sizes[4]),
            .c = args[3], .ldc = sizes[2], .x_scale = static_cast<const float*>(args[6]),
            .weight_scale = static_cast<const float*>(args[5]),
            .dtype = static_cast<int>(sizes[5]),
            .rows = static_cast<int>(sizes[6])};
  if (p.m > 0) static_cast<Weight*>(static_cast<Packed*>(args[1]))->multiply(p);
  return 0;
}

// args: where a layer's rows lie in a cache, new rows, the cache's memory, [batch][columns] of where
// in that, in elements, blocks begin; sizes: batch, heads, rows, bytes of a row; strides in bytes: of
// batch, head and row of the new ones, of batch and head in the cache; where the first of them goes
// there; columns, 1 where the cache is contiguous, rows of a block, bytes of an element.
int ttx_store_rows(void* const* args, const int64_t* sizes) {
  const char* rows = static_cast<const char*>(args[1]);
  const int64_t count = sizes[2], nbytes = sizes[3], columns = sizes[10];
  const int64_t* table = static_cast<const int64_t*>(args[3]);
  const int64_t first = nbytes > 0 ? sizes[9] / nbytes : 0;
  const int64_t length = columns > 1 ? sizes[11] : first + count;  // of a block, or of all there is
  const int64_t units = sizes[0] * sizes[1];
  ttx::share_rows(units, units * count * nbytes > (1 << 20), [=](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t batch = unit / sizes[1], head = unit % sizes[1];
      const char* from = rows + batch * sizes[4] + head * sizes[5];
      for (int64_t at = 0, here; at < count; at += here) {
        int64_t place = (first + at) % length, left = count - at;
        here = left < length - place ? left : length - place;
        char* block = static_cast<char*>(args[0]) + batch * sizes[7];
        if (columns > 1)
          block = static_cast<char*>(args[2]) +
                  table[batch * columns + (first + at) / length] * sizes[12];
        char* to = block + head * sizes[8] + place * nbytes;
        const char* given = from + at * sizes[6];
        if (sizes[6] == nbytes) std::memcpy(to, given, here * nbytes);
        else
          for (int64_t r = 0; r < here; ++r)
            std::memcpy(to + r * nbytes, given + r * sizes[6], nbytes);
      }
    }
  });
  return 0;
}

}  // extern "C"
