// A few queries after many keys: keys and values are read once, straight from the cache, for all heads of a group.
// Memory is the limit here, so the work is cut along the keys and the parts are joined afterwards.
// Included after prefill.h.

constexpr int64_t PART = 512;  // keys that one thread takes at a time
constexpr int64_t FEW = 4;     // heads served by one reading of a key
// sums a head: so many that none waits for itself, and no more than registers hold
template <int HEADS>
constexpr int AT_ONCE = HEADS < FEW ? 4 : 2;

INLINE vf wide(const float *p) { return load(p); }
INLINE vf wide(const uint16_t *p) {
  typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));
  union { vi i; vf f; } bits = {__builtin_convertvector(*(const vh *)p, vi) << 16};
  return bits.f;
}

// Scores of some heads against KEYS keys from number j on; q is [heads][padded], scores [heads][PART].
template <class T, int HEADS, int KEYS>
INLINE void score_some(const Problem &p, const T *keys, const float *q, int64_t padded, int64_t j, float *scores) {
  int64_t whole = p.width / W * W, pitch = p.k_stride[2];
  const T *key = keys + j * pitch;
  vf sum[HEADS * KEYS] = {};
  for (int64_t d = 0; d < whole; d += W) {
#pragma GCC unroll 16
    for (int i = 0; i < HEADS * KEYS; i++) sum[i] += wide(key + i % KEYS * pitch + d) * load(q + i / KEYS * padded + d);
  }
#pragma GCC unroll 16
  for (int i = 0; i < HEADS * KEYS; i++) scores[i / KEYS * PART + j + i % KEYS] = total(sum[i]);
  for (int64_t d = whole; d < p.width; d++)
    for (int i = 0; i < HEADS * KEYS; i++)
      scores[i / KEYS * PART + j + i % KEYS] += number(key[i % KEYS * pitch + d]) * q[i / KEYS * padded + d];
}

template <class T, int HEADS>
void score(const Problem &p, const T *keys, const float *q, int64_t padded, int64_t n, float *scores) {
  int64_t j = 0;
  for (; j + AT_ONCE<HEADS> <= n; j += AT_ONCE<HEADS>) score_some<T, HEADS, AT_ONCE<HEADS>>(p, keys, q, padded, j, scores);
  for (; j < n; j++) score_some<T, HEADS, 1>(p, keys, q, padded, j, scores);
}

// What some heads' weights [heads][PART] of n values add up to: VECTORS vectors of out [heads][room] from width e on.
template <class T, int HEADS, int VECTORS>
INLINE void gather_some(const Problem &p, const T *values, const float *weights, int64_t n, int64_t e, float *out,
                        int64_t room) {
  int64_t pitch = p.v_stride[2];
  vf sum[HEADS][VECTORS] = {};
  for (int64_t j = 0; j < n; j++) {
    vf x[VECTORS];
    for (int i = 0; i < VECTORS; i++) x[i] = wide(values + j * pitch + e + i * W);
    for (int h = 0; h < HEADS; h++)
      for (int i = 0; i < VECTORS; i++) sum[h][i] += x[i] * weights[h * PART + j];
  }
  for (int h = 0; h < HEADS; h++)
    for (int i = 0; i < VECTORS; i++) store(out + h * room + e + i * W, sum[h][i]);
}

template <class T, int HEADS>
void gather(const Problem &p, const T *values, const float *weights, int64_t n, float *out, int64_t room) {
  int64_t e = 0;
  for (; e + AT_ONCE<HEADS> * W <= p.value_width; e += AT_ONCE<HEADS> * W)
    gather_some<T, HEADS, AT_ONCE<HEADS>>(p, values, weights, n, e, out, room);
  for (; e + W <= p.value_width; e += W) gather_some<T, HEADS, 1>(p, values, weights, n, e, out, room);
  for (; e < p.value_width; e++)
    for (int h = 0; h < HEADS; h++) {
      float sum = 0;
      for (int64_t j = 0; j < n; j++) sum += number(values[j * p.v_stride[2] + e]) * weights[h * PART + j];
      out[h * room + e] = sum;
    }
}

template <class T, class F>
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
    if (from < to) parts.push_back({pair, from, to});
  }
}

// Whether a head sees any column that it holds, whatever its score.
inline bool sees(const Problem &p, int64_t pair, int64_t head) {
  const int32_t *x = p.ranges + pair / p.kv_heads * p.range_stride[0] + head * p.range_stride[1];
  int64_t least = p.held ? p.held[2 * pair + 1] : 0;
  for (int64_t r = 0; r < p.range_count; r++)
    if (std::max<int64_t>(x[2 * r], least) < std::min<int64_t>(x[2 * r + 1], p.keys)) return true;
  return false;
}

// One query for each head. `received` gets the weights themselves, from which Python draws whatever else is wanted.
template <class T>
void step_of(const Problem &p) {
  int64_t group = p.heads / p.kv_heads, pairs = p.batch * p.kv_heads;
  int64_t padded = (p.width + W - 1) / W * W, room = (p.value_width + NR - 1) / NR * NR;
  static thread_local std::vector<Part> parts_;
  static thread_local std::vector<int64_t> firsts_;  // the number of each pair's first part
  static thread_local std::vector<float> found_;
  parts_.clear(), firsts_.assign(1, 0);
  for (int64_t pair = 0; pair < pairs; pair++) cut(p, pair, parts_), firsts_.push_back((int64_t)parts_.size());
  int64_t per_part = group * (room + 2), count = (int64_t)parts_.size();
  if ((int64_t)found_.size() < count * per_part) found_.resize(count * per_part);
  const Part *parts = parts_.data();  // of this thread: others would see their own
  const int64_t *firsts = firsts_.data();
  float *found = found_.data(), *kept = p.received;  // kept: zeros, where no head of a group sees the key
  int threads = (int)p.threads;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> own;
    own.resize(group * (padded + PART));
    float *q = own.data(), *scores = q + group * padded;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
      auto [pair, from, to] = parts[i];
      int64_t b = pair / p.kv_heads, g = pair % p.kv_heads, n = to - from;
      float *out = found + i * per_part, *tops = out + group * room, *sums = tops + group;
      for (int64_t h = 0; h < group; h++) {
        const T *one = (const T *)p.q + b * p.q_stride[0] + (g * group + h) * p.q_stride[1];
        for (int64_t d = 0; d < padded; d++) q[h * padded + d] = d < p.width ? number(one[d]) * (p.scale * LOG2E) : 0.0f;
      }
      // of column `from`
      const T *keys = (const T *)p.k + b * p.k_stride[0] + g * p.k_stride[1] + from * p.k_stride[2];
      const T *values = (const T *)p.v + b * p.v_stride[0] + g * p.v_stride[1] + from * p.v_stride[2];
      if (p.held) {
        keys = (const T *)p.k + (p.held[2 * pair] + from) * p.k_stride[2];
        values = (const T *)p.v + (p.held[2 * pair] + from) * p.v_stride[2];
      }
      by_heads<T>(group, [&]<int HEADS>(int64_t h) {
        score<T, HEADS>(p, keys, q + h * padded, padded, n, scores + h * PART);
      });
      for (int64_t h = 0; h < group; h++) {
        float *row = scores + h * PART;
        const float *bias = p.bias;
        if (bias) bias += b * p.bias_stride[0] + (g * group + h) * p.bias_stride[1] + from;
        as_modelled(row, n, p.softcap, bias);
        const int32_t *seen = p.ranges + b * p.range_stride[0] + (g * group + h) * p.range_stride[1];
        int64_t at = from;
        for (int64_t r = 0; r < p.range_count && at < to; r++) {
          int64_t lo = seen[2 * r], hi = seen[2 * r + 1];
          if (hi <= at || lo >= hi) continue;
          if (lo > at) std::fill(row + at - from, row + std::min(lo, to) - from, -INFINITY);
          at = std::max(at, hi);
        }
        std::fill(row + std::min(at, to) - from, row + (n + W - 1) / W * W, -INFINITY);
        vf high = all(-INFINITY), sum = {};
        for (int64_t j = 0; j < n; j += W) high = greater(high, load(row + j));
        tops[h] = highest(high);
        const vf top = all(base(tops[h])), low = all(LEAST);
        for (int64_t j = 0; j < n; j += W) {
          vf w = exp2(greater(load(row + j) - top, low));
          sum += w;
          store(row + j, w);
        }
        sums[h] = total(sum);
        if (kept) std::copy(row, row + n, kept + (b * p.heads + g * group + h) * p.keys + from);
      }
      by_heads<T>(group, [&]<int HEADS>(int64_t h) {
        gather<T, HEADS>(p, values, scores + h * PART, n, out + h * room, room);
      });
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.batch * p.heads; i++) {
      int64_t b = i / p.heads, head = i % p.heads, pair = b * p.kv_heads + head / group, h = head % group;
      int64_t first = firsts[pair], last = firsts[pair + 1];
      float sink = p.sink ? p.sink[head] * LOG2E : -INFINITY, top = sink;
      for (int64_t part = first; part < last; part++) top = std::max(top, found[part * per_part + group * room + h]);
      float sum = p.sink ? lowered(sink, top) : 0.0f;
      float *out = p.out + i * p.value_width;
      std::fill(out, out + p.value_width, 0.0f);
      for (int64_t part = first; part < last; part++) {
        const float *at = found + part * per_part;
        float factor = lowered(at[group * room + h], top);
        sum += factor * at[group * room + group + h];
        if (factor > 0)
          for (int64_t e = 0; e < p.value_width; e++) out[e] += factor * at[h * room + e];
      }
      bool empty = top == -INFINITY, blind = empty && !sees(p, pair, head);
      float inverse = blind ? 0.0f : empty ? NAN : 1.0f / sum;  // softmax of minus infinities alone is no number
      for (int64_t e = 0; e < p.value_width; e++) out[e] = blind ? 0.0f : out[e] * inverse;
      if (kept)
        for (int64_t part = first; part < last; part++) {
          float factor = lowered(found[part * per_part + group * room + h], top) * inverse;
          for (int64_t j = parts[part].from; j < parts[part].to; j++) kept[i * p.keys + j] *= factor;
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
