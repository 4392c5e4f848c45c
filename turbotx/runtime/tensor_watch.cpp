// Whether any of many tensors was changed, moved or laid out anew: a loop that Python would take
// fifty times as long for.
//   in:  handles of tensors, PyTorch's functions of a handle, and of which tensors elements are
//        looked at too, because something was derived from them
//   out: 1 where one differs from what it was when the watch was made
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// PyTorch's own functions of a tensor's handle, in the order in which Python passes them.
struct Functions {
  int64_t (*version)(void*);
  int32_t (*address)(void*, void**);
  int32_t (*dtype)(void*, int32_t*);
  int32_t (*dim)(void*, int64_t*);
  int32_t (*sizes)(void*, int64_t**);
  int32_t (*strides)(void*, int64_t**);
};

struct Seen {
  int64_t version = 0;
  void* address = nullptr;
  int32_t dtype = 0;
  int64_t dim = 0;
  // Where they begin in the watch's `extents`: sizes, then strides.
  size_t extents = 0;
};

// An element that is looked at: `nbytes` of it, at most 8, and what they were.
struct Sample {
  const char* place;
  uint64_t bits;
};

struct Sampled {
  int64_t nbytes;
  std::vector<Sample> samples;
};

uint64_t read(const char* place, int64_t nbytes) {
  uint64_t bits = 0;
  switch (nbytes) {
    case 1: std::memcpy(&bits, place, 1); break;
    case 2: std::memcpy(&bits, place, 2); break;
    case 4: std::memcpy(&bits, place, 4); break;
    default: std::memcpy(&bits, place, 8);
  }
  return bits;
}

// Elements kept of a tensor, and elements looked at in one call, of all tensors together: of a
// BERT-base's 72 matrices one each in turn, of a small model's all that are kept. Nothing else
// reads the matrices themselves, so every look is a miss; 72 that overlap take 4 us on 2 cores.
constexpr int64_t KEPT = 32;
constexpr int64_t LOOKS = 128;

// Bytes of a line of the cache; a tensor object takes three.
constexpr size_t LINE = 64;

class Watch {
 public:
  Watch(int64_t count, void* const* tensors, const int64_t* sampled, const Functions& functions)
      : of_(functions), tensors_(tensors, tensors + count), seen_(count) {
    for (int64_t i = 0; i < count; ++i) {
      Seen& s = seen_[i];
      int64_t *sizes = nullptr, *strides = nullptr;
      s.version = of_.version(tensors_[i]);
      of_.address(tensors_[i], &s.address);
      of_.dtype(tensors_[i], &s.dtype);
      of_.dim(tensors_[i], &s.dim);
      of_.sizes(tensors_[i], &sizes);
      of_.strides(tensors_[i], &strides);
      s.extents = extents_.size();
      extents_.insert(extents_.end(), sizes, sizes + s.dim);
      extents_.insert(extents_.end(), strides, strides + s.dim);
      if (sampled[i]) sample(s, sampled[i]);
      note_lines(tensors_[i]);
    }
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
    if (!sampled_.empty()) {
      looks_ = std::clamp<int64_t>(LOOKS / static_cast<int64_t>(sampled_.size()), 1, KEPT);
    }
  }

  bool changed() {
    for (uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (differs(tensors_[i], seen_[i])) return true;
    }
    // No branch between the reads: the misses overlap.
    const uint64_t turn = turn_.fetch_add(1, std::memory_order_relaxed) * looks_;
    uint64_t different = 0;
    for (const Sampled& x : sampled_) {
      const uint64_t kept = x.samples.size();
      for (uint64_t k = 0; k < std::min<uint64_t>(looks_, kept); ++k) {
        const Sample& s = x.samples[(turn + k) % kept];
        different |= read(s.place, x.nbytes) ^ s.bits;
      }
    }
    return different != 0;
  }

 private:
  // Notes where PyTorch keeps what `differs` reads: the handle, the object that it points to, and
  // what the first words of that point to, among them its storage and its version. Fetched all at
  // once they overlap; after a large model's kernels each is a miss, and one behind the other they
  // take 1 us a tensor. A word that is no address, in another version of PyTorch, costs a fetch.
  void note_lines(void* tensor) {
    const uintptr_t object = *static_cast<uintptr_t*>(tensor);
    uintptr_t words[LINE / sizeof(uintptr_t)];
    std::memcpy(words, reinterpret_cast<const void*>(object), sizeof(words));
    const uintptr_t own[] = {reinterpret_cast<uintptr_t>(tensor), object, object + LINE,
                             object + 2 * LINE};
    for (uintptr_t place : own) lines_.push_back(place / LINE * LINE);
    for (uintptr_t place : words) lines_.push_back(place / LINE * LINE);
  }

  bool differs(void* tensor, const Seen& s) const {
    void* address = nullptr;
    int32_t dtype = 0;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    if (of_.version(tensor) != s.version) return true;
    if (of_.address(tensor, &address) != 0 || address != s.address) return true;
    if (of_.dtype(tensor, &dtype) != 0 || dtype != s.dtype) return true;
    if (of_.dim(tensor, &dim) != 0 || dim != s.dim) return true;
    if (of_.sizes(tensor, &sizes) != 0 || of_.strides(tensor, &strides) != 0) return true;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != extents_[s.extents + d]) return true;
      if (strides[d] != extents_[s.extents + dim + d]) return true;
    }
    return false;
  }

  // Keeps the first and the last element, and others at places that look random and are the same
  // for equal sizes.
  void sample(const Seen& s, int64_t nbytes) {
    const int64_t *sizes = &extents_[s.extents], *strides = sizes + s.dim;
    int64_t numel = 1;
    for (int64_t d = 0; d < s.dim; ++d) numel *= sizes[d];
    if (numel == 0 || s.address == nullptr) return;
    Sampled made{std::min<int64_t>(nbytes, 8), {}};
    uint64_t state = 0x9e3779b97f4a7c15ull;
    for (int64_t k = 0; k < std::min(KEPT, numel); ++k) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      int64_t flat = numel <= KEPT ? k : k == 0 ? 0 : k == 1 ? numel - 1 : (state >> 17) % numel;
      int64_t offset = 0;
      for (int64_t d = s.dim - 1; d >= 0; --d) {
        offset += flat % sizes[d] * strides[d];
        flat /= sizes[d];
      }
      const char* place = static_cast<const char*>(s.address) + offset * nbytes;
      made.samples.push_back({place, read(place, made.nbytes)});
    }
    sampled_.push_back(std::move(made));
  }

  const Functions of_;
  const std::vector<void*> tensors_;
  std::vector<Seen> seen_;
  std::vector<int64_t> extents_;
  std::vector<Sampled> sampled_;
  std::vector<uintptr_t> lines_;
  uint64_t looks_ = 0;
  std::atomic<uint64_t> turn_{0};
};

}  // namespace

extern "C" {

// Remembers tensors as they are. sampled: for each tensor the bytes of an element where elements
// are to be looked at too (it lies in this process's memory), else 0. functions: see `Functions`.
void* ttx_watch_tensors(int64_t count, void* const* tensors, const int64_t* sampled,
                        const void* functions) {
  return new Watch(count, tensors, sampled, *static_cast<const Functions*>(functions));
}

// Whether any tensor lies elsewhere than it did, is of another dtype, of other sizes or strides, has
// another version, or has another value where it was looked at.
int ttx_tensors_changed(void* watch) { return static_cast<Watch*>(watch)->changed(); }

void ttx_free_watch(void* watch) { delete static_cast<Watch*>(watch); }

}  // extern "C"
