// heedful's attention for the CPU: one plain C function, compiled for several instruction sets and picked at run time.
// No Python and no torch headers: Python reaches it through ctypes.

#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#define LANES 4
namespace portable {
#include "tile.h"
#include "pack.h"
#include "prefill.h"
#include "step.h"
}  // namespace portable
#undef LANES
#undef INLINE

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HEEDFUL_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt")
#define LANES 8
namespace avx2 {
#include "tile.h"
#include "pack.h"
#include "prefill.h"
#include "step.h"
}  // namespace avx2
#undef LANES
#undef INLINE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LANES 16
namespace avx512 {
#include "tile.h"
#include "pack.h"
#include "prefill.h"
#include "step.h"
}  // namespace avx512
#undef LANES
#undef INLINE
#pragma GCC pop_options
#endif

#pragma GCC visibility push(default)
extern "C" {

// Which instruction sets this machine can run, best first; empty-terminated.
const char *const *heedful_paths() {
  static const char *found[4] = {nullptr};
  int n = 0;
#ifdef HEEDFUL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found[n++] = "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[n++] = "avx2";
#endif
  found[n++] = "portable";
  found[n] = nullptr;
  return found;
}

// 0 when done, 1 when the path is not one of heedful_paths().
int heedful_attend(const Problem *p, const char *path) {
  bool one = p->queries == 1 && !p->blocks;
#ifdef HEEDFUL_X86
  if (!std::strcmp(path, "avx512")) return one ? avx512::step(*p) : avx512::prefill(*p), 0;
  if (!std::strcmp(path, "avx2")) return one ? avx2::step(*p) : avx2::prefill(*p), 0;
#endif
  if (!std::strcmp(path, "portable")) return one ? portable::step(*p) : portable::prefill(*p), 0;
  return 1;
}

// Both sides count the bytes of a problem: a library of another version is not used.
int64_t heedful_problem_bytes() { return sizeof(Problem); }
}
#pragma GCC visibility pop
