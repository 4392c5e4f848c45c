// New rows of a layer's keys or values on their way into a decoder's cache.
//   in:  rows through strides; a cache's memory, and by batch row where blocks begin in it
//   out: the rows as the last of `first + count` positions: position p lies in block p / block_len
//   example:  ttx::append_rows({.batch = 1, .heads = 12, .count = 1, .nbytes = 256, ...});
#pragma once

#include <cstdint>
#include <cstring>

#include "threads.h"

namespace ttx {

struct NewRows {
  long batch, heads, count, nbytes;           // of a row, which is contiguous
  const char* rows;                           // [batch][heads][count]
  long batch_stride, head_stride, row_stride; // in bytes
  long first;                                 // position of the first one
  char* memory;                               // of blocks, [heads][block_len] rows each
  const int64_t* blocks;                      // [batch][columns]: where they begin, in elements
  long columns, block_len, itemsize;
};

inline void append_rows(const NewRows& given) {
  const long units = given.batch * given.heads, row_bytes = given.nbytes;
  share_rows(units, units * given.count * row_bytes > (1 << 20), [=](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      long batch = unit / given.heads, head = unit % given.heads;
      const char* from = given.rows + batch * given.batch_stride + head * given.head_stride;
      const int64_t* blocks = given.blocks + batch * given.columns;
      for (long at = 0, here; at < given.count; at += here) {
        long column = (given.first + at) / given.block_len;
        long place = given.first + at - column * given.block_len, left = given.count - at;
        here = left < given.block_len - place ? left : given.block_len - place;
        char* to = given.memory + blocks[column] * given.itemsize +
                   (head * given.block_len + place) * row_bytes;
        const char* rows = from + at * given.row_stride;
        if (given.row_stride == row_bytes) std::memcpy(to, rows, here * row_bytes);
        else
          for (long r = 0; r < here; ++r)
            std::memcpy(to + r * row_bytes, rows + r * given.row_stride, row_bytes);
      }
    }
  });
}

}  // namespace ttx
