// A few queries after many keys: keys and values are read once, straight from the cache, for all heads of a group.
// Memory is the limit here, so the work is cut along the keys and the parts are joined afterwards.
// Included after prefill.h.

constexpr int64_t PART = 512;  // keys that one thread takes at a time
constexpr int64_t FEW = 4;     // heads served by one reading of a key
constexpr int64_t AHEAD = 16;  // keys, from asking for one to reading it
// sums a head: so many that none waits for itself, and no more than registers hold
template <int HEADS>
constexpr int AT_ONCE = HEADS < FEW ? 4 : 2;

INLINE vf wide(const float *p) { return load(p); }
INLINE vf wide(const uint16_t *p) {
  typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));
  union { vi i; vf f; } bits = {__builtin_convertvector(*(const vh *)p, vi) << 16};
  return bits.f;
}

// Two vectors of bfloat16: those at even places and those at odd ones, which takes half as many steps.
INLINE void wide(const uint16_t *p, vf &even, vf &odd) {
  typedef int32_t va __attribute__((vector_size(W * 4), aligned(2), may_alias));
  union { vi i; vf f; } first = {*(const va *)p << 16}, second = {*(const va *)p & (int32_t)0xffff0000};
  even = first.f, odd = second.f;
}

#ifdef PAIRS
template <class T>
using Query = T;  // pairs of bfloat16 are multiplied as they come
#else
template <class T>
using Query = float;
#endif

// Keys or values, one behind the other.
template <class T>
struct All {
  const T *from;
  int64_t pitch, width;
  const T *operator[](int64_t j) const { return from + j * pitch; }
  void fetch(int64_t, int64_t) const {}
};

// Some of them, by their columns.
template <class T>
struct Some {
  const T *from;
  int64_t pitch, width;
  const int32_t *columns;
  const T *operator[](int64_t j) const { return from + columns[j] * pitch; }
  // Asks for number j of n before it is wanted: nothing else could guess where it lies.
  void fetch(int64_t j, int64_t n) const {
    if (j >= n) return;
    const char *at = (const char *)(*this)[j];
    for (int64_t i = 0; i < width * (int64_t)sizeof(T); i += 64) __builtin_prefetch(at + i);
  }
};

// Scores of some heads against KEYS keys from number j on; q is [heads][padded], scores [heads][PART].
template <int HEADS, int KEYS, class R>
INLINE void score_some(const R &keys, const float *q, int64_t padded, int64_t j, float, float *scores) {
  int64_t whole = keys.width / W * W;
  decltype(keys[0]) key[KEYS];
  for (int i = 0; i < KEYS; i++) key[i] = keys[j + i];
  vf sum[HEADS * KEYS] = {};
  for (int64_t d = 0; d < whole; d += W) {
#pragma GCC unroll 16
    for (int i = 0; i < HEADS * KEYS; i++) sum[i] += wide(key[i % KEYS] + d) * load(q + i / KEYS * padded + d);
  }
  for (int h = 0; h < HEADS; h++) totals<KEYS>(sum + h * KEYS, 1.0f, scores + h * PART + j);
  for (int64_t d = whole; d < keys.width; d++)
    for (int i = 0; i < HEADS * KEYS; i++)
      scores[i / KEYS * PART + j + i % KEYS] += number(key[i % KEYS][d]) * q[i / KEYS * padded + d];
}

#ifdef PAIRS
// The same for bfloat16: exact products of pairs, added up in float32, and scaled.
template <int HEADS, int KEYS, class R>
INLINE void score_some(const R &keys, const uint16_t *q, int64_t padded, int64_t j, float times, float *scores) {
  const uint16_t *key[KEYS];
  for (int i = 0; i < KEYS; i++) key[i] = keys[j + i];
  vf sum[HEADS][KEYS] = {};
  for (int64_t d = 0; d < keys.width; d += 2 * W) {
    vs x[KEYS];
    for (int i = 0; i < KEYS; i++) x[i] = some(key[i] + d, keys.width - d);
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
      for (int i = 0; i < KEYS; i++)
        sum[h][i] = (vf)_mm512_dpbf16_ps((__m512)sum[h][i], (__m512bh)_mm512_loadu_si512(q + h * padded + d), (__m512bh)x[i]);
  }
  for (int h = 0; h < HEADS; h++) totals<KEYS>(sum[h], times, scores + h * PART + j);
}
#endif

template <int HEADS, class R, class Q>
void score(const R &keys, const R &values, const Q *q, int64_t padded, int64_t n, float times, float *scores) {
  constexpr int KEYS = sizeof(Q) == 2 ? 4 : AT_ONCE<HEADS>;
  int64_t j = 0;
  for (; j + KEYS <= n; j += KEYS) {
    for (int i = 0; i < KEYS; i++) keys.fetch(j + i + AHEAD, n), values.fetch(j + i, n);
    score_some<HEADS, KEYS>(keys, q, padded, j, times, scores);
  }
  for (; j < n; j++) score_some<HEADS, 1>(keys, q, padded, j, times, scores);
}

// What some heads' weights [heads][PART] of n values add up to: VECTORS vectors of out [heads][room] from width e on.
template <int HEADS, int VECTORS, class R>
INLINE void gather_some(const R &values, const float *weights, int64_t n, int64_t e, float *out, int64_t room) {
  vf sum[HEADS][VECTORS] = {};
  for (int64_t j = 0; j < n; j++) {
    vf x[VECTORS];
    for (int i = 0; i < VECTORS; i++) x[i] = wide(values[j] + e + i * W);
    for (int h = 0; h < HEADS; h++)
      for (int i = 0; i < VECTORS; i++) sum[h][i] += x[i] * weights[h * PART + j];
  }
  for (int h = 0; h < HEADS; h++)
    for (int i = 0; i < VECTORS; i++) store(out + h * room + e + i * W, sum[h][i]);
}

// The same for bfloat16, from twice as many widths.
template <int HEADS, int VECTORS, class R>
INLINE void gather_twice(const R &values, const float *weights, int64_t n, int64_t e, float *out, int64_t room) {
  vf even[HEADS][VECTORS] = {}, odd[HEADS][VECTORS] = {};
  for (int64_t j = 0; j < n; j++)
    for (int i = 0; i < VECTORS; i++) {
      vf x, y;
      wide(values[j] + e + i * 2 * W, x, y);
      for (int h = 0; h < HEADS; h++)
        even[h][i] += x * weights[h * PART + j], odd[h][i] += y * weights[h * PART + j];
    }
  for (int h = 0; h < HEADS; h++)
    for (int i = 0; i < 2 * W * VECTORS; i += 2) {
      float *to = out + h * room + e + i;
      to[0] = even[h][i / (2 * W)][i / 2 % W], to[1] = odd[h][i / (2 * W)][i / 2 % W];
    }
}

template <int HEADS, class R>
void gather(const R &values, const float *weights, int64_t n, float *out, int64_t room) {
  int64_t e = 0;
  if constexpr (sizeof(*values[0]) == 2)
    for (; e + AT_ONCE<HEADS> * W <= values.width; e += AT_ONCE<HEADS> * W)
      gather_twice<HEADS, AT_ONCE<HEADS> / 2>(values, weights, n, e, out, room);
  for (; e + AT_ONCE<HEADS> * W <= values.width; e += AT_ONCE<HEADS> * W)
    gather_some<HEADS, AT_ONCE<HEADS>>(values, weights, n, e, out, room);
  for (; e + W <= values.width; e += W) gather_some<HEADS, 1>(values, weights, n, e, out, room);
  for (; e < values.width; e++)
    for (int h = 0; h < HEADS; h++) {
      float sum = 0;
      for (int64_t j = 0; j < n; j++) sum += number(values[j][e]) * weights[h * PART + j];
      out[h * room + e] = sum;
    }
}

template <class F>
void by_heads(int64_t group, F act) {
  for (int64_t h = 0; h < group;) {
    int64_t left = group - h;
    if (left >= FEW) act.template operator()<4>(h), h += 4;
    else if (left == 3) act.template operator()<3>(h), h += 3;
    else if (left == 2) act.template operator()<2>(h), h += 2;
    else act.template operator()<1>(h), h += 1;
  }
}

struct Part {  // columns of which some head of the group sees the first, the last and maybe what is between
  int64_t pair, from, to;
  const int32_t *columns;  // where keys were picked: of these, one for one
};

// What the heads of a group see, cut where columns are a multiple of PART. Columns that a head does not hold are left
// out whatever the ranges say.
inline void cut(const Problem &p, int64_t pair, std::vector<Part> &parts) {
  int64_t group = p.heads / p.kv_heads, b = pair / p.kv_heads, g = pair % p.kv_heads;
  int64_t least = p.held ? p.held[2 * pair + 1] : 0;
  for (int64_t start = least / PART * PART; start < p.keys; start += PART) {
    int64_t stop = std::min(p.keys, start + PART), from = stop, to = start;
    for (int64_t h = 0; h < group; h++) {
      const int32_t *seen = p.ranges + b * p.range_stride[0] + (g * group + h) * p.range_stride[1];
      for (int64_t r = 0; r < p.range_count; r++) {
        int64_t lo = std::max({(int64_t)seen[2 * r], start, least}), hi = std::min<int64_t>(seen[2 * r + 1], stop);
        if (lo < hi) from = std::min(from, lo), to = std::max(to, hi);
      }
    }
    if (from < to) parts.push_back({pair, from, to, nullptr});
  }
}

inline const uint8_t *picks(const Problem &p, int64_t b, int64_t head) {
  return p.picked + b * p.picked_stride[0] + head * p.picked_stride[1];
}

// The columns that some head of a group picked and holds.
inline void list(const Problem &p, int64_t pair, std::vector<int32_t> &columns) {
  int64_t group = p.heads / p.kv_heads, b = pair / p.kv_heads, g = pair % p.kv_heads;
  int64_t least = p.held ? p.held[2 * pair + 1] : 0, heads = p.picked_stride[1] ? group : 1;
  columns.clear();
  for (int64_t start = least / 8 * 8; start < p.keys; start += 8) {
    uint64_t some = 0;
    for (int64_t h = 0; h < heads; h++) {
      uint64_t eight = 0;
      std::memcpy(&eight, picks(p, b, g * group + h) + start, std::min<int64_t>(8, p.keys - start));
      some |= eight;
    }
    if (!some) continue;
    uint8_t each[8];
    std::memcpy(each, &some, 8);
    for (int64_t j = std::max(start, least); j < std::min(start + 8, p.keys); j++)
      if (each[j - start]) columns.push_back((int32_t)j);
  }
}

// How many columns that it holds a head sees, whatever their scores.
inline int64_t seen(const Problem &p, int64_t pair, int64_t head) {
  int64_t least = p.held ? p.held[2 * pair + 1] : 0, many = 0;
  if (p.picked) {
    const uint8_t *x = picks(p, pair / p.kv_heads, head);
    return std::count(x + least, x + p.keys, 1);
  }
  const int32_t *x = p.ranges + pair / p.kv_heads * p.range_stride[0] + head * p.range_stride[1];
  for (int64_t r = 0; r < p.range_count; r++)
    many += std::max<int64_t>(0, std::min<int64_t>(x[2 * r + 1], p.keys) - std::max<int64_t>(x[2 * r], least));
  return many;
}

// Scores of a part, up to a whole vector, that a head does not see become minus infinity.
inline void hide(const Problem &p, const Part &part, int64_t b, int64_t head, float *row) {
  auto [pair, from, to, columns] = part;
  int64_t n = to - from, at = from;
  if (columns) {
    const uint8_t *mine = picks(p, b, head);
    if (p.picked_stride[1])
      for (int64_t j = 0; j < n; j++)
        if (!mine[columns[j]]) row[j] = -INFINITY;
    std::fill(row + n, row + (n + W - 1) / W * W, -INFINITY);
    return;
  }
  const int32_t *seen = p.ranges + b * p.range_stride[0] + head * p.range_stride[1];
  for (int64_t r = 0; r < p.range_count && at < to; r++) {
    int64_t lo = seen[2 * r], hi = seen[2 * r + 1];
    if (hi <= at || lo >= hi) continue;
    if (lo > at) std::fill(row + at - from, row + std::min(lo, to) - from, -INFINITY);
    at = std::max(at, hi);
  }
  std::fill(row + std::min(at, to) - from, row + (n + W - 1) / W * W, -INFINITY);
}

// One query for each head. `received` gets the weights themselves, from which Python draws whatever else is wanted.
template <class T>
void step_of(const Problem &p) {
  int64_t group = p.heads / p.kv_heads, pairs = p.batch * p.kv_heads;
  typedef Query<T> Q;
  constexpr int64_t VECTOR = W * sizeof(float) / sizeof(Q);
  int64_t padded = (p.width + VECTOR - 1) / VECTOR * VECTOR, room = (p.value_width + NR - 1) / NR * NR;
  static thread_local std::vector<Part> parts_;
  static thread_local std::vector<int64_t> firsts_;  // the number of each pair's first part
  static thread_local std::vector<float> found_;
  parts_.clear(), firsts_.assign(1, 0);
  static thread_local std::vector<std::vector<int32_t>> columns_;  // of each pair, where keys were picked
  if (p.picked && (int64_t)columns_.size() < pairs) columns_.resize(pairs);
  for (int64_t pair = 0; pair < pairs; pair++) {
    if (!p.picked)
      cut(p, pair, parts_);
    else {
      // what was picked for all heads alike is looked for once
      int64_t like = p.picked_stride[1] || p.held ? pair : pair / p.kv_heads * p.kv_heads;
      if (like == pair) list(p, pair, columns_[pair]);
      for (int64_t at = 0, all = (int64_t)columns_[like].size(); at < all; at += PART)
        parts_.push_back({pair, at, std::min(at + PART, all), columns_[like].data() + at});
    }
    firsts_.push_back((int64_t)parts_.size());
  }
  int64_t per_part = group * (room + 2), count = (int64_t)parts_.size();
  if ((int64_t)found_.size() < count * per_part) found_.resize(count * per_part);
  const Part *parts = parts_.data();  // of this thread: others would see their own
  const int64_t *firsts = firsts_.data();
  float *found = found_.data(), *kept = p.received;  // kept: zeros, where no head of a group sees the key
  int threads = (int)p.threads;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> own;
    own.resize(std::max(group * (padded + PART), p.value_width));
    Q *q = (Q *)own.data();
    float *scores = own.data() + group * padded;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
      const int64_t pair = parts[i].pair, from = parts[i].from, n = parts[i].to - from;
      const int64_t b = pair / p.kv_heads, g = pair % p.kv_heads;
      const int32_t *columns = parts[i].columns;
      float *out = found + i * per_part, *tops = out + group * room, *sums = tops + group;
      for (int64_t h = 0; h < group; h++) {
        const T *one = (const T *)p.q + b * p.q_stride[0] + (g * group + h) * p.q_stride[1];
        for (int64_t d = 0; d < padded; d++)
          if constexpr (sizeof(Q) == 2) q[h * padded + d] = d < p.width ? one[d] : 0;
          else q[h * padded + d] = d < p.width ? number(one[d]) * (p.scale * LOG2E) : 0.0f;
      }
      const T *keys = (const T *)p.k + b * p.k_stride[0] + g * p.k_stride[1];
      const T *values = (const T *)p.v + b * p.v_stride[0] + g * p.v_stride[1];
      if (p.held) {
        keys = (const T *)p.k + p.held[2 * pair] * p.k_stride[2];
        values = (const T *)p.v + p.held[2 * pair] * p.v_stride[2];
      }
      // Calls act(keys, values) with those of the part.
      auto with = [&](auto act) {
        if (columns)
          act(Some<T>{keys, p.k_stride[2], p.width, columns}, Some<T>{values, p.v_stride[2], p.value_width, columns});
        else
          act(All<T>{keys + from * p.k_stride[2], p.k_stride[2], p.width},
              All<T>{values + from * p.v_stride[2], p.v_stride[2], p.value_width});
      };
      with([&](auto keys, auto values) {
        by_heads(group, [&]<int HEADS>(int64_t h) {
          score<HEADS>(keys, values, q + h * padded, padded, n, p.scale * LOG2E, scores + h * PART);
        });
      });
      for (int64_t h = 0; h < group; h++) {
        float *row = scores + h * PART;
        const float *bias = p.bias;
        if (bias) bias += b * p.bias_stride[0] + (g * group + h) * p.bias_stride[1];
        as_modelled(row, n, p.softcap, bias && !columns ? bias + from : nullptr);
        if (bias && columns)
          for (int64_t j = 0; j < n; j++) row[j] += bias[columns[j]] * LOG2E;
        hide(p, parts[i], b, g * group + h, row);
        vf high = p.form ? vf{} : all(-INFINITY), sum = {};
        for (int64_t j = 0; j < n && !p.form; j += W) high = greater(high, load(row + j));
        tops[h] = highest(high);
        const vf top = all(base(tops[h]));
        for (int64_t j = 0; j < n; j += W) {
          vf w = p.form ? formed(load(row + j), p.form, p.shift) : exp2(load(row + j) - top);
          sum += w;
          store(row + j, w);
        }
        sums[h] = total(sum);
        if (!kept) continue;
        float *into = kept + (b * p.heads + g * group + h) * p.keys;
        for (int64_t j = 0; j < n; j++) into[columns ? columns[j] : from + j] = row[j];
      }
      with([&](auto, auto values) {
        by_heads(group, [&]<int HEADS>(int64_t h) { gather<HEADS>(values, scores + h * PART, n, out + h * room, room); });
      });
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.batch * p.heads; i++) {
      int64_t b = i / p.heads, head = i % p.heads, pair = b * p.kv_heads + head / group, h = head % group;
      int64_t first = firsts[pair], last = firsts[pair + 1];
      float sink = p.sink ? p.sink[head] * LOG2E : -INFINITY, top = sink;
      for (int64_t part = first; part < last; part++) top = std::max(top, found[part * per_part + group * room + h]);
      float sum = p.sink ? lowered(sink, top) : 0.0f;
      float *out = own.data();
      std::fill(out, out + p.value_width, 0.0f);
      for (int64_t part = first; part < last; part++) {
        const float *at = found + part * per_part;
        float factor = lowered(at[group * room + h], top);
        sum += factor * at[group * room + group + h];
        if (factor > 0)
          for (int64_t e = 0; e < p.value_width; e++) out[e] += factor * at[h * room + e];
      }
      bool empty = top == -INFINITY, blind = empty && !seen(p, pair, head);
      float inverse = blind ? 0.0f : empty ? NAN : 1.0f / sum;  // softmax of minus infinities alone is no number
      if (p.form) inverse = p.mean ? 1.0f / std::max<int64_t>(1, seen(p, pair, head)) : 1.0f;
      give(p, i * p.value_width, out, inverse, blind);
      if (kept)
        for (int64_t part = first; part < last; part++) {
          float factor = lowered(found[part * per_part + group * room + h], top) * inverse;
          const int32_t *columns = parts[part].columns;
          for (int64_t j = parts[part].from; j < parts[part].to; j++)
            kept[i * p.keys + (columns ? columns[j - parts[part].from] : j)] *= factor;
        }
    }
  }
}

void step(const Problem &given) {
  Problem p = given;
  const int32_t all_of_them[2] = {0, (int32_t)p.keys};
  if (!p.ranges) p.ranges = all_of_them, p.range_count = 1, p.range_stride[0] = p.range_stride[1] = 0;
  if (p.bfloat16)
    step_of<uint16_t>(p);
  else
    step_of<float>(p);
}
