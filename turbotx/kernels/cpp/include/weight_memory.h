// Memory for packed weights: side by side in regions of 2 MB pages, so that streaming misses no TLB.
//   in:  a number of bytes
//   out: a 64-byte aligned pointer, valid as long as the object; contents undefined
//   example:  ttx::WeightMemory panels(nbytes); pack(panels.as<float>());
//
// A weight is seldom as large as some 2 MB pages: by itself it would take a page too many, or have
// 4 KB pages. What a weight held goes back to the system with it, its region with the last one in it.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ttx {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace detail {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kRegion = 16 * kHugePage;

constexpr std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// Addresses; the system gives them memory where they are written to.
class WeightRegion {
 public:
  explicit WeightRegion(std::size_t nbytes) : mapped_(round_up(nbytes, kHugePage) + kHugePage) {
    raw_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw_ == MAP_FAILED) throw std::bad_alloc();
    auto address = reinterpret_cast<std::size_t>(raw_);
    next_ = reinterpret_cast<char*>(round_up(address, kHugePage));
    end_ = static_cast<char*>(raw_) + mapped_;
    madvise(raw_, mapped_, MADV_HUGEPAGE);
  }
  WeightRegion(const WeightRegion&) = delete;
  WeightRegion& operator=(const WeightRegion&) = delete;
  ~WeightRegion() { munmap(raw_, mapped_); }

  // The next so many bytes; null where they are not left.
  char* take(std::size_t nbytes) {
    if (nbytes > static_cast<std::size_t>(end_ - next_)) return nullptr;
    char* taken = next_;
    next_ += nbytes;
    return taken;
  }

 private:
  std::size_t mapped_;
  void* raw_;
  char *next_, *end_;
};

}  // namespace detail

class WeightMemory {
 public:
  WeightMemory() = default;
  explicit WeightMemory(std::size_t nbytes) : nbytes_(detail::round_up(nbytes, 64)) {
    static std::mutex mutex;
    static std::weak_ptr<detail::WeightRegion> latest;
    std::lock_guard<std::mutex> lock(mutex);
    region_ = latest.lock();
    if (region_ != nullptr) data_ = region_->take(nbytes_);
    if (data_ != nullptr) return;
    region_ = std::make_shared<detail::WeightRegion>(nbytes_ > detail::kRegion ? nbytes_ : detail::kRegion);
    data_ = region_->take(nbytes_);
    latest = region_;
  }
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;
  ~WeightMemory() {
    if (data_ == nullptr) return;
    constexpr std::size_t page = 65536;  // the largest of any Linux
    auto begin = reinterpret_cast<std::size_t>(data_);
    std::size_t first = detail::round_up(begin, page), end = (begin + nbytes_) / page * page;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
  }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data_); }

 private:
  std::shared_ptr<detail::WeightRegion> region_;
  std::size_t nbytes_ = 0;
  char* data_ = nullptr;
};
#else
class WeightMemory {
 public:
  WeightMemory() = default;
  explicit WeightMemory(std::size_t nbytes) : data_(std::aligned_alloc(64, (nbytes + 64) / 64 * 64)) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;
  ~WeightMemory() { std::free(data_); }
  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};
#endif

}  // namespace ttx
