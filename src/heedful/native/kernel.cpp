// heedful's attention for the CPU: one plain C function, compiled for several instruction sets and picked at run time.
// No Python and no torch headers: Python reaches it through ctypes.

#include "problem.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HEEDFUL_X86
#include <immintrin.h>
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define HEEDFUL_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#endif

// Memory at the beginning of a cache line, so that no vector lies in two.
template <class T>
struct Aligned {
  typedef T value_type;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U> &) {}
  T *allocate(std::size_t n) { return (T *)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T *p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned &) const { return true; }
};
typedef std::vector<float, Aligned<float>> Floats;

#define LANES 4
namespace portable {
#include "tile.h"
#include "pack.h"
#include "desk.h"
#include "rows.h"
#include "block.h"
#include "prefill.h"
#include "step.h"
#include "back.h"
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
#include "desk.h"
#include "rows.h"
#include "block.h"
#include "prefill.h"
#include "step.h"
#include "back.h"
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
#include "desk.h"
#include "rows.h"
#include "block.h"
#include "prefill.h"
#include "step.h"
#include "back.h"
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
#include "desk.h"
#include "rows.h"
#include "block.h"
#include "prefill.h"
#include "step.h"
}  // namespace avx512bf16
#undef LANES
#undef INLINE
#pragma GCC pop_options

#ifdef HEEDFUL_AMX
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#define LANES 16
#define TILES
namespace amx {
#include "tile.h"
#include "amx.h"
#include "pack.h"
#include "desk.h"
#include "rows.h"
#include "block.h"
#include "prefill.h"
}  // namespace amx
#undef TILES
#undef LANES
#undef INLINE
#pragma GCC pop_options
#endif
#undef PAIRS
#endif

namespace {

struct Path {
  const char *name;
  void (*prefill)(const Problem &), (*step)(const Problem &), (*pull)(const Problem &);
};

#ifdef HEEDFUL_AMX
// Whether there are tiles of bfloat16, and the system lets this process use them: it must be asked, once for all threads.
bool tiles() {
  unsigned a, b, c, d;
  const unsigned both = 1u << 22 | 1u << 24;  // amx_bf16, amx_tile
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & both) != both) return false;
  const long ask_for = 0x1023, data_of_tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ask_for, data_of_tiles) == 0;
}
#endif

struct Paths {
  Path path[6] = {};
  const char *names[6] = {};
  int count = 0;
  void add(Path one) { names[count] = one.name, path[count++] = one; }
};

// Which instruction sets this machine can run, best first; ends with one without a name.
const Paths &paths() {
  static const Paths found = [] {
    Paths found;
#ifdef HEEDFUL_X86
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool pairs = wide && __builtin_cpu_supports("avx512bf16");
#ifdef HEEDFUL_AMX
    if (pairs && tiles()) found.add({"amx", amx::prefill, avx512bf16::step, avx512::pull});
#endif
    if (pairs) found.add({"avx512bf16", avx512bf16::prefill, avx512bf16::step, avx512::pull});
    if (wide) found.add({"avx512", avx512::prefill, avx512::step, avx512::pull});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.add({"avx2", avx2::prefill, avx2::step, avx2::pull});
#endif
    found.add({"portable", portable::prefill, portable::step, portable::pull});
    return found;
  }();
  return found;
}

const Path *find(const char *name) {
  for (const Path *path = paths().path; path->name; path++)
    if (!std::strcmp(path->name, name)) return path;
  return nullptr;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The names of paths(), null-terminated.
const char *const *heedful_paths() { return paths().names; }

// 0 when done, 1 when the path is not one of heedful_paths().
int heedful_attend(const Problem *p, const char *name) {
  const Path *path = find(name);
  if (!path) return 1;
  bool alone = p->queries == 1 && !p->blocks && !p->rows;
  if (p->batch && p->heads && p->queries) (alone ? path->step : path->prefill)(*p);
  return 0;
}

// The way back of a call that was attended with `rows`.
int heedful_pull(const Problem *p, const char *name) {
  const Path *path = find(name);
  if (!path) return 1;
  if (p->batch && p->heads && p->queries) path->pull(*p);
  return 0;
}

// Both sides count the bytes of a problem: a library of another version is not used.
int64_t heedful_problem_bytes() { return sizeof(Problem); }
}
#pragma GCC visibility pop
