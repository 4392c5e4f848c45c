// Memory that belongs to a thread: it grows to the largest request and is kept.
//   in:  a number of floats
//   out: a 64-byte aligned pointer, valid until the same thread asks again; contents undefined
//   example:  float* rows = ttx::detail::thread_scratch(m * k);
#pragma once

#include <cstdlib>
#include <new>

namespace ttx::detail {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  float* reserve(long count) {
    if (count > capacity_) {
      std::free(memory_);
      capacity_ = (count + 1023) / 1024 * 1024;
      memory_ = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * capacity_));
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  long capacity_ = 0;
};

inline float* thread_scratch(long count) {
  static thread_local Scratch scratch;
  return scratch.reserve(count);
}

}  // namespace ttx::detail
