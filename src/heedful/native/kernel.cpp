// heedful's attention for the CPU: one plain C function, compiled for several instruction sets and picked at run time.
// No Python and no torch headers: Python reaches it through ctypes.

#include "problem.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HEEDFUL_X86
#include <immintrin.h>
#endif

#define LANES 4
namespace portable {
#include "tile.h"
#include "pack.h"
#include "block.h"
#include "prefill.h"
#include "step.h"
}  // namespace portable
#undef LANES
#undef INLINE

#ifdef HEEDFUL_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt")
#define LANES 8
namespace avx2 {
#include "tile.h"
#include "pack.h"
#include "block.h"
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
#include "block.h"
#include "prefill.h"
#include "step.h"
}  // namespace avx512
#undef LANES
#undef INLINE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define LANES 16
#define PAIRS
namespace avx512bf16 {
#include "tile.h"
#include "pack.h"
#include "block.h"
#include "prefill.h"
#include "step.h"
}  // namespace avx512bf16
#undef PAIRS
#undef LANES
#undef INLINE
#pragma GCC pop_options
#endif

namespace {

struct Path {
  const char *name;
  void (*prefill)(const Problem &), (*step)(const Problem &);
};

// Which instruction sets this machine can run, best first; ends with one without a name.
const Path *paths() {
  static Path found[5] = {};
  int n = 0;
#ifdef HEEDFUL_X86
  __builtin_cpu_init();
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && __builtin_cpu_supports("avx512bf16"))
    found[n++] = {"avx512bf16", avx512bf16::prefill, avx512bf16::step};
  if (wide) found[n++] = {"avx512", avx512::prefill, avx512::step};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[n++] = {"avx2", avx2::prefill, avx2::step};
#endif
  found[n] = {"portable", portable::prefill, portable::step};
  return found;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The names of paths(), null-terminated.
const char *const *heedful_paths() {
  static const char *names[5] = {};
  int n = 0;
  for (const Path *path = paths(); path->name; path++) names[n++] = path->name;
  return names;
}

// 0 when done, 1 when the path is not one of heedful_paths().
int heedful_attend(const Problem *p, const char *name) {
  for (const Path *path = paths(); path->name; path++)
    if (!std::strcmp(path->name, name)) {
      if (p->batch && p->heads && p->queries) (p->queries == 1 && !p->blocks ? path->step : path->prefill)(*p);
      return 0;
    }
  return 1;
}

// Both sides count the bytes of a problem: a library of another version is not used.
int64_t heedful_problem_bytes() { return sizeof(Problem); }
}
#pragma GCC visibility pop
