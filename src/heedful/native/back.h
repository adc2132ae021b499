// The way back, in float32: what queries, keys and values are given when the output is given something. Weights are made
// again from what each row had for a maximum and a sum. Included after prefill.h.

// c[TALL][NR] = the first TALL columns of a[n][.], turned round, times b[n][NR]
constexpr int TALL = W == 16 ? 8 : 4;  // of a panel's columns, so many are a whole number
INLINE void turned(const float *a, int64_t lda, const float *b, int64_t n, float *c, int64_t ldc) {
  vf sum[TALL][2] = {};
  for (int64_t i = 0; i < n; i++) {
    vf left = load(b + i * NR), right = load(b + i * NR + W);
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++) {
      vf x = all(a[i * lda + r]);
      sum[r][0] += x * left;
      sum[r][1] += x * right;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++) store(c + r * ldc, sum[r][0]), store(c + r * ldc + W, sum[r][1]);
}

// What one thread works with, beside a desk.
struct Pull {
  Floats queries, given, given_rows;  // in panels of NR widths, [rows][NR] each; and [rows][e]
  Floats slope, due, to_queries, to_keys, to_values;
  Floats diagonals;  // what each distance of the block is given, head by head
  Floats columns;  // what the keys' sums are given, for each head in whole panels
};

struct Back {
  Block<float> block;
  const Sizes &t;  // with keys and values changed for one another
  Pull &pull;
  const float *keys_in_rows, *values;  // [k][NR] panels of keys, [e][NR] panels of values

  int64_t width() const { return t.value_panels * NR; }         // of keys, in whole panels
  int64_t value_width() const { return block.s.value_panels * NR; }

  template <class T>
  void take() {
    const Problem &p = block.p;
    int64_t rows = block.rows, padded = block.s.padded();
    pull.queries.assign(width() * rows, 0.0f), pull.given.assign(value_width() * rows, 0.0f);
    pull.given_rows.assign(padded * p.value_width, 0.0f), pull.due.resize(padded);
    for (int64_t r = 0; r < rows; r++) {
      int64_t h = block.head(r), q = block.query(r);
      const T *query = (const T *)p.q + block.b * p.q_stride[0] + h * p.q_stride[1] + q * p.q_stride[2];
      for (int64_t d = 0; d < p.width; d++) pull.queries[(d / NR * rows + r) * NR + d % NR] = number(query[d]) * p.scale;
      const float *given = p.given + block.b * p.given_stride[0] + h * p.given_stride[1] + q * p.given_stride[2];
      const float *out = (const float *)p.out + ((block.b * p.queries + q) * p.heads + h) * p.value_width;
      float due = 0;
      for (int64_t e = 0; e < p.value_width; e++) {
        pull.given[(e / NR * rows + r) * NR + e % NR] = pull.given_rows[r * p.value_width + e] = given[e];
        due += given[e] * out[e];
      }
      pull.due[r] = p.form ? 0.0f : due;  // a row without a sum takes nothing back
    }
    if (!p.columns) return;
    pull.columns.assign(block.s.stacked * across(), 0.0f);
    for (int64_t h = 0; h < block.s.stacked; h++)
      std::copy_n(p.columns + (block.b * p.heads + block.head(h * block.n)) * p.keys, p.keys,
                  pull.columns.data() + h * across());
  }

  int64_t across() const { return block.s.panels * NR; }
  int64_t apart() const { return block.p.keys + block.n - 1; }  // how many distances the block has

  // Calls act(place in the chunk, vector) with what a row's weights are given since keys receive them; of text alone.
  template <class F>
  void charged(int64_t r, const Chunk &c, F act) const {
    const Problem &p = block.p;
    if (!p.columns || (p.live && !p.live[block.b * p.live_stride + block.query(r)])) return;
    const float *given = pull.columns.data() + r / block.n * across();
    for (int64_t i = c.from; i < c.to; i++)
      for (int64_t j = 0; j < block.desk.runs[i].width; j += W)
        act(block.desk.runs[i].at + j, load(given + block.desk.runs[i].column + j));
  }

  // A row's scores to weights; how steep its soft cap is, to `slope`.
  void weigh(int64_t r, const Chunk &c, float *row) {
    const Problem &p = block.p;
    const Stretch &seen = block.desk.sees[r];
    float *slope = pull.slope.data();
    if (p.softcap)
      for (int64_t i = seen.from; i < seen.to; i += W) {
        vf part = capped(load(row + i), p.softcap) * (1.0f / (p.softcap * LOG2E));
        store(slope + i, 1.0f - part * part);
      }
    if (p.softcap || p.bias) block.model(r, c, row);
    block.mask(r, c, row);
    const float *known = p.rows + ((block.b * p.heads + block.head(r)) * p.queries + block.query(r)) * 2;
    const vf top = all(known[0]), none = {};
    for (int64_t i = seen.from; i < seen.to; i += W) {
      vf x = load(row + i) - top;
      store(row + i, (p.form ? formed(x, p.form, p.shift) : exp2(x > none ? none : x)) * known[1]);
    }
    block.blank(c, r, row);
  }

  // A row's scores to weights, and what these are given to what its scores are given, before the scale.
  void turn(int64_t r, const Chunk &c, float *row, float *given) {
    weigh(r, c, row);
    charged(r, c, [&](int64_t at, vf x) { store(given + at, load(given + at) + x); });
    const Problem &p = block.p;
    const vf none = {}, due = all(pull.due[r]);
    const float share = p.rows[((block.b * p.heads + block.head(r)) * p.queries + block.query(r)) * 2 + 1];
    const Stretch &seen = block.desk.sees[r];
    for (int64_t i = seen.from; i < seen.to; i += W) {
      vf w = load(row + i), rise = p.form ? steep(w * (1.0f / share), p.form) * share : w;
      vf pulled = rise * (load(given + i) - due);
      store(given + i, w == none ? none : pulled);  // where nothing is seen, anything may stand
    }
    block.blank(c, r, given);
    if (p.to_bias && p.diagonal) {
      float *to = pull.diagonals.data() + r / block.n * apart() + block.n - 1 - r % block.n;
      for (int64_t i = c.from; i < c.to; i++) {
        const Run &run = block.desk.runs[i];
        for (int64_t j = 0, many = std::min(run.width, p.keys - run.column); j < many; j++)
          to[run.column + j] += given[run.at + j];
      }
    } else if (p.to_bias) {
      float *to = p.to_bias + ((block.b * p.heads + block.head(r)) * p.queries + block.query(r)) * p.keys;
      for (int64_t i = c.from; i < c.to; i++) {
        const Run &run = block.desk.runs[i];
        std::copy_n(given + run.at, std::min(run.width, p.keys - run.column), to + run.column);
      }
    }
    if (p.softcap)
      for (int64_t i = seen.from; i < seen.to; i += W) {
        vf x = load(given + i);
        store(given + i, x == none ? none : x * load(pull.slope.data() + i));
      }
  }

  // From the first of the rows that see something of a panel, which stands there in a chunk, to behind the last.
  Stretch seeing(int64_t at) const {
    Stretch those{block.rows, 0};
    for (int64_t r = 0; r < block.rows; r += MR)
      if (const Stretch &x = block.desk.tiles[r / MR]; x.from <= at && at < x.to)
        those = {std::min(those.from, r), std::min(r + MR, block.rows)};
    return those.to ? those : Stretch{0, 0};
  }

  // A chunk's products of rows and columns: scores, or what weights are given by values.
  void products(const Chunk &c, const float *rows, const float *columns, int64_t depth, float *to) const {
    const Desk &desk = block.desk;
    for (int64_t i = c.from; i < c.to; i++)
      for (int64_t j = 0; j < desk.runs[i].width; j += NR)
        for (int64_t r = 0; r < block.rows; r += MR)
          if (const Stretch &x = desk.tiles[r / MR]; x.from <= desk.runs[i].at + j && desk.runs[i].at + j < x.to)
            product<false>(rows + r * depth, depth, columns + (desk.runs[i].column + j) * depth, depth,
                           to + r * PITCH + desk.runs[i].at + j, PITCH);
  }

  // Adds to what rows are due what their weights are given by way of the columns.
  void meet(float *weights) {
    for (const Chunk &c : block.desk.chunks) {
      block.look(c, 0, block.rows);
      products(c, block.desk.q.data(), block.keys, block.s.depth, weights);
      for (int64_t r = 0; r < block.rows; r++) {
        float *row = weights + r * PITCH;
        weigh(r, c, row);
        vf sum = {};
        charged(r, c, [&](int64_t at, vf x) { sum += load(row + at) * x; });
        pull.due[r] += total(sum);
      }
    }
  }

  void compute() {
    const Problem &p = block.p;
    const Sizes &s = block.s;
    Desk &desk = block.desk;
    block.survey();
    int64_t padded = s.padded(), tall = (block.rows + MR - 1) / MR * MR, rows = block.rows;
    desk.q.resize(padded * s.depth);
    desk.scores.resize(padded * PITCH), desk.weights.resize(padded * PITCH);
    pull.slope.resize(PITCH), pull.to_queries.assign(padded * width(), 0.0f);
    pull.to_keys.resize(s.panels * NR * width()), pull.to_values.resize(s.panels * NR * value_width());
    if (p.bfloat16)
      block.load_queries<uint16_t>(), take<uint16_t>();
    else
      block.load_queries<float>(), take<float>();
    float *weights = desk.weights.data(), *given = desk.scores.data();
    if (p.to_bias && p.diagonal) pull.diagonals.assign(s.stacked * apart(), 0.0f);
    if (p.columns && !p.form) meet(weights);
    for (const Chunk &c : desk.chunks) {
      auto runs = [&](auto act) {
        for (int64_t i = c.from; i < c.to; i++) act(desk.runs[i]);
      };
      block.look(c, 0, rows);
      products(c, desk.q.data(), block.keys, s.depth, weights);
      products(c, pull.given_rows.data(), values, t.depth, given);
      for (int64_t r = 0; r < rows; r++) turn(r, c, weights + r * PITCH, given + r * PITCH);
      auto down = [&](const float *from, const float *panels, int64_t wide, float *to) {
        for (int64_t e = 0; e < wide; e += NR)
          runs([&](const Run &run) {
            for (int64_t j = 0; j < run.width; j += NR) {
              Stretch those = seeing(run.at + j);
              for (int64_t i = run.at + j; i < run.at + j + NR; i += TALL)
                turned(from + those.from * PITCH + i, PITCH, panels + e * rows + those.from * NR, those.to - those.from,
                       to + (run.column + i - run.at) * wide + e, wide);
            }
          });
      };
      down(weights, pull.given.data(), value_width(), pull.to_values.data());
      down(given, pull.queries.data(), width(), pull.to_keys.data());
      for (int64_t d = 0; d < width(); d += NR)
        runs([&](const Run &run) {
          for (int64_t r = 0; r < tall; r += MR) {
            const Stretch &x = desk.tiles[r / MR];
            int64_t from = std::max(x.from, run.at), to = std::min(x.to, run.at + run.width);
            if (from < to)
              product<true>(given + r * PITCH + from, PITCH,
                            keys_in_rows + d * s.panels * NR + (run.column + from - run.at) * NR, to - from,
                            pull.to_queries.data() + r * width() + d, width());
          }
        });
    }
    for (int64_t r = 0; r < rows; r++) {
      float *to = p.to_q + ((block.b * p.queries + block.query(r)) * p.heads + block.head(r)) * p.width;
      for (int64_t d = 0; d < p.width; d++) to[d] = pull.to_queries[r * width() + d] * p.scale;
    }
  }

  // Adds what the block's rows give its keys and values to what these have been given.
  void add(int64_t pair) const {
    const Problem &p = block.p;
    auto all_of = [&](const Floats &from, int64_t wide, float *to, int64_t own) {
      for (const Run &run : block.desk.runs)
        for (int64_t j = run.column; j < std::min(run.column + run.width, p.keys); j++)
          for (int64_t e = 0; e < own; e++) to[(pair * p.keys + j) * own + e] += from[j * wide + e];
    };
    for (int64_t h = 0; p.to_bias && p.diagonal && h < block.s.stacked; h++) {
      float *to = p.to_bias + (block.b * p.heads + block.head(h * block.n)) * (p.queries + p.keys - 1) +
                  p.queries - block.row0 - block.n;
      for (int64_t i = 0; i < apart(); i++) to[i] += pull.diagonals[h * apart() + i];
    }
    all_of(pull.to_keys, width(), p.to_k, p.width);
    all_of(pull.to_values, value_width(), p.to_v, p.value_width);
  }
};

void pull(const Problem &p) {
  Problem other = p;  // keys and values changed for one another
  std::swap(other.k, other.v), std::swap(other.k_stride, other.v_stride), std::swap(other.width, other.value_width);
  Sizes s(p, MR, 1), t(other, MR, 1);
  static thread_local Floats packed;
  int64_t pairs = p.batch * p.kv_heads;
  int64_t per_keys = s.packed_keys(), per_values = t.packed_keys(), per_rows = t.packed_values();
  if ((int64_t)packed.size() < pairs * (per_keys + per_values + per_rows))
    packed.resize(pairs * (per_keys + per_values + per_rows));
  float *keys = packed.data(), *values = keys + pairs * per_keys, *in_rows = values + pairs * per_values;
  int64_t each = p.batch * s.units, of_pair = s.units / p.kv_heads;
  std::atomic<int64_t> next = 0;
  std::vector<std::atomic<int64_t>> added(pairs);  // how many blocks of each
#pragma omp parallel num_threads((int)p.threads)
  {
    static thread_local Desk desk;
    static thread_local Pull own;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs * s.panels; i++) {
      int64_t pair = i / s.panels, panel = i % s.panels, b = pair / p.kv_heads, g = pair % p.kv_heads;
      auto pack = [&]<class T>(T) {
        pack_keys<float, T>(p, s, b, g, panel, keys + pair * per_keys + panel * NR * s.depth);
        pack_keys<float, T>(other, t, b, g, panel, values + pair * per_values + panel * NR * t.depth);
        pack_values<float, T>(other, t, b, g, panel, in_rows + pair * per_rows);
      };
      if (p.bfloat16)
        pack(uint16_t{});
      else
        pack(0.0f);
    }
    // As in prefill: in order, dearest first, so that whoever waits to add waits for one that is being computed.
    for (int64_t i; (i = next.fetch_add(1)) < each * s.blocks;) {
      int64_t number = i / each, row0 = (s.blocks - 1 - number) * s.rows, b = i % each / s.units, unit = i % s.units;
      int64_t n = std::min(s.rows, p.queries - row0), pair = b * p.kv_heads + unit / of_pair;
      Back back{{p, s, desk, b, unit, row0, n, n * s.stacked, keys + pair * per_keys, nullptr, nullptr},
                t, own, in_rows + pair * per_rows, values + pair * per_values};
      back.compute();
      int64_t turn = number * of_pair + unit % of_pair;
      while (added[pair].load(std::memory_order_acquire) < turn) std::this_thread::yield();
      back.add(pair);
      added[pair].store(turn + 1, std::memory_order_release);
    }
  }
}
