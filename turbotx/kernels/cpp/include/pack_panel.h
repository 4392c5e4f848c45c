// One panel of a packed weight: kPanel output columns, STEP consecutive inputs of each adjacent.
//   in:  the rows of the weight that are the columns, null past the last; k elements each
//   out: [depth / STEP][kPanel][STEP], elements plus OFFSET (modulo 256), zeros past k
//   used by gemm.h, gemm_int8.h; a first call packs every weight, so that it moves vectors
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm_tile.h"

namespace ttx::detail {

// The elements of a panel's columns: element i of column c is rows[c][i * steps[c]].
template <class T>
struct PanelSource {
  const T* rows[kPanel];
  long steps[kPanel];

  // Whether the elements of each column are neighbours.
  bool has_columns() const {
    for (int c = 0; c < kPanel; ++c)
      if (rows[c] != nullptr && steps[c] != 1) return false;
    return true;
  }
  // Whether the columns of each element are neighbours, all of them there.
  bool has_rows() const {
    for (int c = 0; c < kPanel; ++c)
      if (rows[c] == nullptr || rows[c] != rows[0] + c || steps[c] != steps[0]) return false;
    return true;
  }
};

template <int STEP, int OFFSET, class T>
TTX_INLINE T stored(T value) {
  if constexpr (OFFSET != 0) return static_cast<T>(value + OFFSET);
  else return value;
}

// Columns of 32-bit words, kLanes words of kLanes columns at a time; returns how many inputs.
template <int STEP, int OFFSET, class T>
long pack_words(const PanelSource<T>& from, long k, T* out) {
  static_assert(sizeof(T) * STEP == 4 && (OFFSET == 0 || (OFFSET == 128 && sizeof(T) == 1)));
  constexpr std::uint32_t flips = OFFSET == 0 ? 0 : 0x80808080u;  // adds 128 to each byte
  long whole = k / (STEP * kLanes) * kLanes;
  for (long word = 0; word < whole; word += kLanes)
    for (int c = 0; c < kPanel; c += kLanes) {
      vec square[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        square[lane] = vec{};
        const T* row = from.rows[c + lane];
        if (row != nullptr) std::memcpy(&square[lane], row + word * STEP, sizeof(vec));
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        uint_vec bits = __builtin_bit_cast(uint_vec, square[i]) ^ flips;
        std::memcpy(out + ((word + i) * kPanel + c) * STEP, &bits, sizeof bits);
      }
    }
  return whole * STEP;
}

template <int STEP, int OFFSET = 0, class T>
void pack_panel(const PanelSource<T>& from, long k, long depth, T* out) {
  long i = 0;
  if constexpr (sizeof(T) * STEP == 4)
    if (from.has_columns()) i = pack_words<STEP, OFFSET>(from, k, out);
  if (from.has_rows())
    for (; i < k; ++i) {
      const T* row = from.rows[0] + i * from.steps[0];
      T* line = out + i / STEP * kPanel * STEP + i % STEP;
      for (int c = 0; c < kPanel; ++c) line[c * STEP] = stored<STEP, OFFSET>(row[c]);
    }
  for (; i < depth; ++i)
    for (int c = 0; c < kPanel; ++c) {
      bool is_there = from.rows[c] != nullptr && i < k;
      T value = is_there ? from.rows[c][i * from.steps[c]] : T{};
      out[(i / STEP * kPanel + c) * STEP + i % STEP] = stored<STEP, OFFSET>(value);
    }
}

}  // namespace ttx::detail
