// The runtime of compiled programs on a CPU: runs launches from a table.
//   in:  launches, each a function with the uniform signature int(void* const* args, const int64_t* sizes),
//        and where its arguments lie in the program's address table and size table
//   out: 0, or the launch that failed (from 1) and its error code as launch << 32 | code
#include <pthread.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>

#include "cache_rows.h"

extern "C" void ttx_share_with_team(int asked);  // threads.cpp
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);
extern "C" __attribute__((weak)) void kmp_set_blocktime(int ms);  // of LLVM's library

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

// Whether the threads of GNU's OpenMP may be ended: not in the child of a fork, which has none of
// them, and not where somebody has said how they are to wait.
bool may_end_threads = omp_pause_resource_all != nullptr && kmp_set_blocktime == nullptr &&
                       std::getenv("GOMP_SPINCOUNT") == nullptr &&
                       std::getenv("OMP_WAIT_POLICY") == nullptr;
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { may_end_threads = false; });

// Behind an op of PyTorch its threads look for work for milliseconds, on the processors that a
// program's threads need: they are ended, which costs some 60 us where there are any, and begin
// again with the next op that needs them.
void end_threads() {
  constexpr int kSoft = 1;
  if (may_end_threads) omp_pause_resource_all(kSoft);
}

int64_t run_launches(const Launch* launches, int64_t begin, int64_t end, void* const* table,
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

}  // namespace

extern "C" {

// with_team: these launches are few and lie between ops of PyTorch, whose threads do them too.
int64_t ttx_run(const Launch* launches, int64_t begin, int64_t end, void* const* table,
                const int64_t* sizes, int64_t* ticks, int with_team) {
  if (!with_team) end_threads();
  ttx_share_with_team(with_team);
  int64_t failed = run_launches(launches, begin, end, table, sizes, ticks);
  ttx_share_with_team(0);
  return failed;
}

// args: null, new rows, a cache's memory, where blocks begin in it; sizes: batch, heads, rows, bytes of
// a row; strides in bytes of batch, head and row; where the first row goes; columns of the table, rows
// of a block, bytes of an element.
int ttx_store_rows(void* const* args, const int64_t* sizes) {
  ttx::append_rows({sizes[0], sizes[1], sizes[2], sizes[3], static_cast<const char*>(args[1]),
                    sizes[4], sizes[5], sizes[6], sizes[7], static_cast<char*>(args[2]),
                    static_cast<const int64_t*>(args[3]), sizes[8], sizes[9], sizes[10]});
  return 0;
}

}  // extern "C"
