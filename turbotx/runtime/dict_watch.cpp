// Whether any of many dicts, lists and closure cells of Python was touched: a look of a nanosecond each.
//   in:  where a number lies that changes with a dict (or a pointer, with a cell), and what it was;
//        lists with the items that they had
//   out: the first that differs, or -1
#include <cstdint>
#include <cstring>

namespace {

// How often dicts were changed, by a hash of their address, where Python calls back instead of counting
// by itself: two dicts that share a number are taken for changed together, which costs a comparison.
constexpr uint64_t COUNTERS = 1 << 14;
uint64_t counters[COUNTERS];

uint64_t* counter_of(const void* dict) {
  return &counters[(reinterpret_cast<uint64_t>(dict) * 0x9e3779b97f4a7c15ull) >> 50];
}

// The start of a list object, as CPython 3.10 to 3.14 lay it out on 64 bits.
struct List {
  int64_t references;
  const void* type;
  int64_t size;
  void* const* items;
};

}  // namespace

extern "C" {

// The place of the counter of a dict.
uint64_t* ttx_dict_counter(const void* dict) { return counter_of(dict); }

// A callback of PyDict_AddWatcher.
int ttx_dict_event(int, void* dict, void*, void*) {
  ++*counter_of(dict);
  return 0;
}

// `count` numbers and what they were; lists, and the items that they had, one list after the other.
struct Watched {
  int64_t count;
  const uint64_t* const* where;
  const uint64_t* seen;
  int64_t list_count;
  const List* const* lists;
  const int64_t* sizes;
  void* const* items;
};

// The first number from `start` on that is not as it was seen, or `count` + the first list that has other
// items, or -1. The caller holds Python's lock.
int64_t ttx_first_touched(int64_t start, const Watched* watched) {
  const int64_t count = watched->count;
  for (int64_t i = start; i < count; ++i)
    if (*watched->where[i] != watched->seen[i]) return i;
  void* const* items = watched->items;
  for (int64_t i = 0; i < watched->list_count; items += watched->sizes[i++]) {
    const List& list = *watched->lists[i];
    const int64_t size = watched->sizes[i];
    if (count + i < start) continue;
    if (list.size != size || (size && std::memcmp(list.items, items, size * sizeof(void*)) != 0))
      return count + i;
  }
  return -1;
}

}  // extern "C"
