// The threads of all compiled programs: they help a caller with the parts of its loop.
//   in:  ttx_share(parts, run, body), from any thread, several at once
//   out: run(body, part, parts) was called once for every part
//   example:  ttx::share(2, [&](long part) { ... });   // threads.h
//
// Nobody waits for a thread that has not begun: the caller takes the parts that are left. A thread
// without work looks for some for kPatience and sleeps then; so does a caller whose last parts are
// with others. (OpenMP's threads look for milliseconds, and a caller waits for each of them.)
// In a process that was forked the threads start anew.
//
// Between ops of PyTorch a few launches are shared with its own OpenMP threads instead, which look
// for work anyway: ttx_share_with_team(1) asks for that in the calling thread.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <mutex>

#include "threads.h"

extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((weak)) int omp_get_thread_num(void);
extern "C" __attribute__((weak)) int omp_get_num_threads(void);

#ifdef __linux__
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" __attribute__((weak)) int omp_get_num_places(void);
extern "C" __attribute__((weak)) int omp_get_place_num_procs(int);
extern "C" __attribute__((weak)) void omp_get_place_proc_ids(int, int*);
#endif

namespace {

using Word = std::atomic<std::uint32_t>;
using ttx::detail::Part;

// Longer than the Python between two calls in a row; waking a thread costs its caller some 5 us.
constexpr std::chrono::microseconds kPatience(100);
constexpr int kMostLoops = 16;  // at once; the caller of one more does it alone
constexpr int kMostThreads = 1024;

#ifdef __linux__
void sleep_while(Word& word, std::uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }
#else
void sleep_while(Word& word, std::uint32_t value) { word.wait(value); }
void wake(Word& word) { word.notify_one(); }
#endif

// Whether found() came true within kPatience.
template <class Found>
bool look_for(const Found& found) {
  if (found()) return true;
  auto end = std::chrono::steady_clock::now() + kPatience;
  do
    for (int k = 0; k < 16; ++k) {
      if (found()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  while (std::chrono::steady_clock::now() < end);
  return false;
}

// Someone who sleeps until woken.
struct alignas(64) Sleeper {
  Word is_asleep{0};
  // Returns whether it slept: not where found() is true after all. Who makes it true wakes it.
  template <class Found>
  void sleep_unless(const Found& found) {
    is_asleep = 1;
    if (found()) is_asleep = 0;
    while (is_asleep == 1) sleep_while(is_asleep, 1);
  }
  bool rouse() {
    bool slept = is_asleep == 1 && is_asleep.exchange(0) == 1;
    if (slept) wake(is_asleep);
    return slept;
  }
};

// A caller's loop, one after another. All that a thread must know to take a part is in one word,
// with a turn of the loop's own, so that nobody takes a part of the next one by mistake.
struct alignas(64) Loop {
  std::atomic<std::uint64_t> ticket{0};  // turn << 32 | parts << 16 | parts taken
  std::atomic<Part> run{nullptr};
  std::atomic<const void*> body{nullptr};
  std::atomic<bool> is_used{false};
  alignas(64) std::atomic<long> done{0};  // parts that others have finished
  Sleeper caller;

  void open(long parts, Part call, const void* with) {
    done.store(0, std::memory_order_relaxed);
    run.store(call, std::memory_order_relaxed);
    body.store(with, std::memory_order_relaxed);
    std::uint64_t turn = (ticket >> 32) + 1;
    ticket = turn << 32 | static_cast<std::uint64_t>(parts) << 16 | 1;  // the first is the caller's
  }
  bool has_parts() const { return (ticket >> 16 & 0xffff) > (ticket & 0xffff); }

  // Takes a part and does it; `took` hears first how many are left. False where there is none.
  template <class Took>
  bool help(const Took& took) {
    for (std::uint64_t now = ticket;;) {
      long parts = now >> 16 & 0xffff, taken = now & 0xffff;
      if (taken >= parts) return false;
      Part call = run;
      const void* with = body;  // of this turn, if the ticket is still the same
      if (!ticket.compare_exchange_weak(now, now + 1)) continue;
      took(parts - taken - 1);
      call(with, taken, parts);
      return true;
    }
  }
};

thread_local bool is_inside = false;  // a part: loops within it are not shared again

class Pool {
 public:
  void share(long parts, Part run, const void* body) {
    Loop* loop = parts <= kMostThreads ? find_loop() : nullptr;
    is_inside = true;
    if (loop == nullptr) {
      for (long part = 0; part < parts; ++part) run(body, part, parts);
    } else {
      start(parts - 1);
      loop->open(parts, run, body);
      rouse_one();
      run(body, 0, parts);
      long own = 1;
      while (loop->help([](long) {})) ++own;
      auto is_over = [&] { return loop->done == parts - own; };
      while (!look_for(is_over)) loop->caller.sleep_unless(is_over);
      loop->is_used = false;
    }
    is_inside = false;
  }

 private:
  struct Thread : Sleeper { Pool* pool = nullptr; };

  Loop* find_loop() {
    for (int k = 0; k < kMostLoops; ++k)
      if (!loops_[k].is_used && !loops_[k].is_used.exchange(true)) {
        while (k >= loop_count_) ++loop_count_;
        return &loops_[k];
      }
    return nullptr;
  }

  void rouse_one() {
    if (sleeping_ == 0) return;
    for (int k = 0; k < thread_count_; ++k)
      if (threads_[k].rouse()) return;
  }

  bool help() {
    for (int k = 0; k < loop_count_; ++k) {
      Loop& loop = loops_[k];
      if (!loop.help([&](long left) { if (left > 0) rouse_one(); })) continue;
      ++loop.done;
      loop.caller.rouse();
      return true;
    }
    return false;
  }

  bool has_work() const {
    for (int k = 0; k < loop_count_; ++k)
      if (loops_[k].has_parts()) return true;
    return false;
  }

  void work(Thread& me) {
    is_inside = true;
    for (;;) {
      while (look_for([&] { return help(); })) {}
      ++sleeping_;
      me.sleep_unless([&] { return has_work(); });
      --sleeping_;
    }
  }

  void start(long count) {
    if (thread_count_ >= count) return;
    std::lock_guard<std::mutex> only(starting_);
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int k = thread_count_; k < count; ++k) {
      threads_[k].pool = this;
      pthread_t made;
      auto body = [](void* given) -> void* {
        auto* me = static_cast<Thread*>(given);
        me->pool->work(*me);
        return nullptr;
      };
      if (pthread_create(&made, nullptr, body, &threads_[k]) != 0) break;  // fewer will do
      pthread_detach(made);
      let_run(made);
      thread_count_ = k + 1;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Where OMP_PROC_BIND has bound the caller to one core, its threads may run on all of OpenMP's.
  static void let_run([[maybe_unused]] pthread_t thread) {
#ifdef __linux__
    if (omp_get_num_places == nullptr) return;
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (int place = 0; place < omp_get_num_places(); ++place) {
      int ids[CPU_SETSIZE], count = omp_get_place_num_procs(place);
      if (count > CPU_SETSIZE) return;
      omp_get_place_proc_ids(place, ids);
      for (int k = 0; k < count; ++k) CPU_SET(ids[k], &cores);
    }
    if (CPU_COUNT(&cores) > 0) pthread_setaffinity_np(thread, sizeof cores, &cores);
#endif
  }

  Loop loops_[kMostLoops];
  Thread threads_[kMostThreads];
  std::atomic<int> loop_count_{0}, thread_count_{0}, sleeping_{0};
  std::mutex starting_;
};

// Whether the calling thread's loops are shared with OpenMP's threads. They are not in the child of
// a fork, which has none of them.
thread_local bool is_with_team = false;
bool has_team = GOMP_parallel != nullptr && omp_get_thread_num != nullptr;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { has_team = false; });

void share_with_team(long parts, Part run, const void* body) {
  struct Shared { long parts; Part run; const void* body; } shared{parts, run, body};
  auto work = [](void* given) {
    const auto& mine = *static_cast<const Shared*>(given);
    is_inside = true;
    for (long part = omp_get_thread_num(); part < mine.parts; part += omp_get_num_threads())
      mine.run(mine.body, part, mine.parts);
    is_inside = false;
  };
  unsigned count = ttx::usable_threads(1, 1);  // of a loop of more parts each does several
  GOMP_parallel(work, &shared, parts < count ? parts : count, 0);
}

std::atomic<Pool*> pool{nullptr};

// Never freed: its threads may look into it until the process ends.
Pool& find_pool() {
  Pool* found = pool;
  if (found != nullptr) return *found;
  auto* made = new Pool;
  if (!pool.compare_exchange_strong(found, made)) {
    delete made;
    return *found;
  }
  // The child of a fork has the calling thread only.
  pthread_atfork(nullptr, nullptr, [] { pool = nullptr, is_inside = false; });
  return *made;
}

}  // namespace

extern "C" void ttx_share_with_team(int asked) { is_with_team = asked && has_team; }

extern "C" void ttx_share(long parts, Part run, const void* body) {
  if (!is_inside && is_with_team) return share_with_team(parts, run, body);
  if (!is_inside) return find_pool().share(parts, run, body);
  for (long part = 0; part < parts; ++part) run(body, part, parts);
}

[[maybe_unused]] static const bool is_given = (ttx_use_threads(ttx_share), true);  // to the runtime itself
