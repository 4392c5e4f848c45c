// A loop shared out to threads: turbotx's own, which wait a bounded time and can be done without.
//   in:  how many parts, and what to do with one; a loop's work, and from how much on threads pay
//   out: every part done once, by whichever thread came first, before `share` returns
//   example:  ttx::share(usable_threads(m * n, 50000), [&](long t) { multiply(m * t / threads, ...); });
//
// The threads are in the runtime (runtime/cpu/threads.cpp), which every library of kernels is given;
// where there is none, everything runs on the calling thread.
#pragma once

#include <cstdint>

extern "C" __attribute__((weak)) int omp_get_max_threads(void);

namespace ttx {

// 1 for little work, or what torch.set_num_threads set: PyTorch keeps it in its OpenMP library.
inline int usable_threads(long work, long worth_two) {
  return work < worth_two || omp_get_max_threads == nullptr ? 1 : omp_get_max_threads();
}

namespace detail {

using Part = void (*)(const void* body, long part, long parts);
using Share = void (*)(long parts, Part run, const void* body);

inline Share given = nullptr;

__attribute__((noinline)) inline void share_parts(long parts, Part run, const void* body) {
  Share share = parts > 1 ? __atomic_load_n(&given, __ATOMIC_RELAXED) : nullptr;
  if (share != nullptr) return share(parts, run, body);
  for (long part = 0; part < parts; ++part) run(body, part, parts);
}

}  // namespace detail

// body(part) for every part of 0 .. parts - 1; as many threads as parts at the most.
template <class Body>
void share(long parts, const Body& body) {
  detail::share_parts(
      parts, [](const void* b, long part, long) { (*static_cast<const Body*>(b))(part); }, &body);
}

// body(unit) for every unit of 0 .. units - 1, one after another as threads come for them.
template <class Body>
void share_by_one(int threads, long units, const Body& body) {
  long next = 0;
  share(threads, [&](long) {
    for (long unit; (unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < units;) body(unit);
  });
}

// body(begin, end) for ranges of 0 .. rows, one a thread where that `pays`.
template <class Body>
void share_rows(std::int64_t rows, bool pays, const Body& body) {
  if (rows == 0) return;
  struct Loop { std::int64_t rows; Body body; } loop{rows, body};
  // Inlined, over a copy in each thread which no store can change: what it holds stays in registers.
  auto run = [](const void* shared, long part, long parts) __attribute__((flatten)) {
    const Loop mine = *static_cast<const Loop*>(shared);
    mine.body(mine.rows * part / parts, mine.rows * (part + 1) / parts);
  };
  detail::share_parts(usable_threads(pays, 1), run, &loop);
}

}  // namespace ttx

// Gives this library the threads of a runtime, its `ttx_share`; the first ones stay.
extern "C" __attribute__((used, weak)) void ttx_use_threads(ttx::detail::Share share) {
  ttx::detail::Share none = nullptr;
  __atomic_compare_exchange_n(&ttx::detail::given, &none, share, false, __ATOMIC_RELAXED,
                              __ATOMIC_RELAXED);
}
