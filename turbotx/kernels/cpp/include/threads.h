// How many threads a parallel loop may use: one for little work and inside another loop.
//   in:  the loop's work, and from how much on a second thread pays
//   out: 1, or what torch.set_num_threads set
//   example:  #pragma omp parallel for num_threads(threads) if (threads > 1)
//
// Compiled without OpenMP (clang++ without its runtime, say) everything runs on the calling thread.
#pragma once

#if defined(_OPENMP) && __has_include(<omp.h>)
#include <omp.h>
#elif defined(_OPENMP)
extern "C" int omp_get_max_threads(void);
extern "C" int omp_in_parallel(void);
#endif

namespace ttx {

inline int usable_threads([[maybe_unused]] long work, [[maybe_unused]] long worth_two) {
#ifdef _OPENMP
  return work < worth_two || omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace ttx
