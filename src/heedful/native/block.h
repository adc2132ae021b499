// One block of query rows, with the statistics of each row and key on the way. Included after desk.h.
// The query heads of a group stand above one another, so that keys and values are read once for all of them.

// One block of rows of one unit; the register tile multiplies E, float or bfloat16.
template <class E>
struct Block {
  const Problem &p;
  const Sizes &s;
  Desk &desk;
  int64_t b, unit, row0, n, rows;  // rows in the text, rows of all heads
  const E *keys, *values;
  const float *carry;

  int64_t head(int64_t r) const { return unit * s.stacked + r / n; }
  int64_t query(int64_t r) const { return row0 + r % n; }
  const int32_t *ranges(int64_t r) const {
    return p.ranges + b * p.range_stride[0] + head(r) * p.range_stride[1] + query(r) * p.range_count * 2;
  }

  // The part of a row's sum that the sink logit has.
  float own(int64_t r) const { return p.sink ? lowered(p.sink[head(r)] * LOG2E, desk.top[r]) : 0.0f; }

  // Which columns some row sees, as runs in chunks.
  void survey() {
    auto &seen = desk.seen;
    seen.clear();
    desk.reach.assign(s.padded() / HIGH<E>, 0);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < p.range_count; i++)
        desk.reach[r / HIGH<E>] = std::max<int64_t>(desk.reach[r / HIGH<E>], ranges(r)[2 * i + 1]);
    int64_t different = p.range_stride[1] ? rows : n;
    for (int64_t r = 0; r < different; r++)
      for (int64_t i = 0; i < p.range_count; i++)
        if (const int32_t *x = ranges(r) + 2 * i; x[0] < x[1]) seen.emplace_back(x[0] / NR, (x[1] + NR - 1) / NR);
    std::sort(seen.begin(), seen.end());
    const uint8_t *blocks = nullptr;
    if (p.blocks)
      blocks = p.blocks + b * p.block_stride[0] + unit * p.block_stride[1] + row0 / p.block * p.block_cols;
    desk.runs.clear();
    desk.chunks.clear();
    int64_t next = 0;
    for (auto [from, to] : seen)
      for (int64_t panel = std::max(from, next); panel < to; panel++) {
        next = panel + 1;
        if (!blocks || blocks[panel * NR / p.block]) take(panel);
      }
  }

  void take(int64_t panel) {
    auto &runs = desk.runs;
    auto &chunks = desk.chunks;
    if (chunks.empty() || chunks.back().width + NR > WIDE) {
      int64_t at = (int64_t)runs.size();
      chunks.push_back({at, at, 0});
    }
    Chunk &c = chunks.back();
    if (c.to > c.from && runs.back().column + runs.back().width == panel * NR)
      runs.back().width += NR;
    else
      runs.push_back({panel * NR, NR, c.width}), c.to++;
    c.width += NR;
  }

  template <class T>
  void load_queries() {
    E *to = (E *)desk.q.data();
    std::fill(to, to + s.padded() * s.depth, E{});
    for (int64_t r = 0; r < rows; r++) {
      const T *from = (const T *)p.q + b * p.q_stride[0] + head(r) * p.q_stride[1] + query(r) * p.q_stride[2];
      for (int64_t d = 0; d < p.width; d++) {
        if constexpr (DEEP<E> == 1) to[r * s.depth + d] = number(from[d]) * (p.scale * LOG2E);
        else to[r * s.depth + d] = from[d];
      }
    }
  }

  // Calls fill(from, to) for every stretch of a run, counted within the chunk, that a row does not see.
  template <class F>
  void gaps(int64_t r, const Run &run, F fill) const {
    const int32_t *x = ranges(r);
    int64_t at = run.column, end = run.column + run.width;
    for (int64_t i = 0; i < p.range_count && at < end; i++) {
      int64_t lo = x[2 * i], hi = x[2 * i + 1];
      if (hi <= at || lo >= hi) continue;
      if (lo > at) fill(at - run.column + run.at, std::min(lo, end) - run.column + run.at);
      at = std::max(at, hi);
    }
    if (at < end) fill(at - run.column + run.at, end - run.column + run.at);
  }

  void mask(int64_t r, const Chunk &c, float *row) const {
    for (int64_t i = c.from; i < c.to; i++)
      gaps(r, desk.runs[i], [&](int64_t from, int64_t to) { std::fill(row + from, row + to, -INFINITY); });
  }

  // Whether a row sees any column that is computed, whatever its score.
  bool sees(int64_t r) const {
    const int32_t *x = ranges(r);
    for (const Run &run : desk.runs)
      for (int64_t i = 0, end = run.column + run.width; i < p.range_count; i++)
        if (std::max<int64_t>(x[2 * i], run.column) < std::min<int64_t>(x[2 * i + 1], end)) return true;
    return false;
  }

  int32_t column(const Chunk &c, int64_t at) const {
    int64_t i = c.from;
    while (i + 1 < c.to && desk.runs[i + 1].at <= at) i++;
    return (int32_t)(desk.runs[i].column + at - desk.runs[i].at);
  }

  // A row's scores with what the model makes of them; of columns behind the last key nothing is said.
  void model(int64_t r, const Chunk &c, float *row) const {
    const float *bias = p.bias;
    if (bias) bias += b * p.bias_stride[0] + head(r) * p.bias_stride[1] + query(r) * p.bias_stride[2];
    for (int64_t i = c.from; i < c.to; i++) {
      const Run &run = desk.runs[i];
      as_modelled(row + run.at, std::min(run.width, p.keys - run.column), p.softcap, bias ? bias + run.column : nullptr);
    }
  }

  // Scores of a row to weights over its running maximum, and what the row adds up to so far.
  void soften(int64_t r, int64_t number, const Chunk &c, float *row) {
    float times = UNSCALED<E> ? p.scale * LOG2E : 1.0f;
    if (bool changed = p.softcap || p.bias; changed || !(times > 0.0f)) {
      if (UNSCALED<E>)
        for (int64_t i = 0; i < c.width; i += W) store(row + i, load(row + i) * times);
      if (changed) model(r, c, row);
      times = 1.0f;
    }
    mask(r, c, row);
    vf high = load(row), other = load(row + W);  // a panel is two vectors
    for (int64_t i = NR; i < c.width; i += NR) high = greater(high, load(row + i)), other = greater(other, load(row + i + W));
    float greatest = highest(greater(high, other)), here = scaled(greatest, times), before = desk.top[r];
    if (here > desk.peak[r]) {
      desk.peak[r] = here;
      if (p.place) {
        int64_t at = 0;
        while (at < c.width && row[at] != greatest) at++;
        desk.place[r] = column(c, at);
      }
    }
    if (here > before) {
      float shrink = lowered(before, here);
      float keys = desk.sum[r] - own(r);  // the sum of weights of keys alone
      desk.spread[r] = shrink > 0 ? shrink * (desk.spread[r] - (here - before) * keys) : 0.0f;
      desk.sum[r] *= shrink;
      desk.top[r] = here;
      float *out = desk.out.data() + r * s.value_panels * NR;
      for (int64_t e = 0; e < s.value_panels * NR; e += W) store(out + e, load(out + e) * shrink);
    }
    desk.reference[number * s.padded() + r] = desk.top[r];
    const vf top = all(base(desk.top[r])), low = all(LEAST);
    const bool whole = DEEP<E> == 1 || kept();  // weights are wanted as they are
    vf sum = {}, spread = {};
    for (int64_t i = 0; i < c.width; i += W) {
      vf x = greater(scaled(load(row + i), times) - top, low);
      vf w = exp2(x);
      sum += w;
      if (p.entropy) spread += w * x;
      if (whole) store(row + i, w);
      if constexpr (DEEP<E> > 1) store((E *)desk.weights.data() + r * WEIGHTS<E> + i, w);
    }
    desk.sum[r] += total(sum);
    desk.spread[r] += total(spread);
  }

  // Whether weights are wanted again once the sums of their rows are known.
  bool kept() const { return p.received || p.distance || p.first || p.carry; }

  float *chunk_scores(int64_t number) const {
    return desk.scores.data() + (kept() ? number : 0) * s.padded() * PITCH;
  }

  void compute() {
    survey();
    int64_t padded = s.padded();
    int64_t chunks = (int64_t)desk.chunks.size();
    desk.q.resize(padded * s.depth / DEEP<E>);
    if (DEEP<E> > 1) desk.weights.resize(padded * WEIGHTS<E> / DEEP<E>);
    desk.out.assign(padded * s.value_panels * NR, 0.0f);
    desk.scores.resize(std::max<int64_t>(1, kept() ? chunks : 1) * padded * PITCH);
    desk.reference.resize(std::max<int64_t>(1, chunks) * padded);
    for (auto *x : {&desk.sum, &desk.spread}) x->assign(padded, 0.0f);
    for (auto *x : {&desk.top, &desk.peak}) x->assign(padded, -INFINITY);
    desk.place.assign(padded, 0);
    if (p.sink)
      for (int64_t r = 0; r < rows; r++) desk.top[r] = p.sink[head(r)] * LOG2E, desk.sum[r] = 1.0f;
    if constexpr (DEEP<E> > 1)
      load_queries<E>();
    else if (p.bfloat16)
      load_queries<uint16_t>();
    else
      load_queries<float>();
    const E *q = (const E *)desk.q.data();
    int64_t tall = (rows + HIGH<E> - 1) / HIGH<E> * HIGH<E>, pitch = DEEP<E> > 1 ? WEIGHTS<E> : PITCH;
    for (int64_t number = 0; number < chunks; number++) {
      const Chunk &c = desk.chunks[number];
      float *scores = chunk_scores(number);
      for (int64_t i = c.from; i < c.to; i++) {
        const Run &run = desk.runs[i];
        for (int64_t j = 0; j < run.width; j += NR)
          for (int64_t r = 0; r < tall; r += HIGH<E>)
            if (run.column + j < desk.reach[r / HIGH<E>])  // what is left out is masked in every row
              product<false>(q + r * s.depth, s.depth, keys + (run.column + j) * s.depth, s.depth,
                             scores + r * PITCH + run.at + j, PITCH, p.scale * LOG2E);
      }
      for (int64_t r = 0; r < rows; r++) soften(r, number, c, scores + r * PITCH);
      const E *weights = (const E *)(DEEP<E> > 1 ? desk.weights.data() : scores);
      for (int64_t e = 0; e < s.value_panels; e++)
        for (int64_t i = c.from; i < c.to; i++) {
          const Run &run = desk.runs[i];
          const E *v = values + (e * s.panels * NR + run.column) * NR;
          for (int64_t r = 0; r < tall; r += HIGH<E>)
            product<true>(weights + r * pitch + run.at, pitch, v, std::min(run.width, desk.reach[r / HIGH<E>] - run.column),
                          desk.out.data() + r * s.value_panels * NR + e * NR, s.value_panels * NR, 1.0f);
        }
    }
    finish();
    if (kept()) tell();
  }

  // Divides by the sums; from here on `sum` holds what a weight over the final maximum is multiplied with.
  void finish() {
    for (int64_t r = 0; r < rows; r++) {
      float sum = desk.sum[r];
      bool empty = desk.top[r] == -INFINITY, blind = empty && !sees(r);
      float inverse = blind ? 0.0f : empty ? NAN : 1.0f / sum;  // softmax of minus infinities alone is no number
      int64_t at = (b * p.heads + head(r)) * p.queries + query(r);
      if (p.peak) p.peak[at] = lowered(desk.peak[r], desk.top[r]) * inverse;
      if (p.place) p.place[at] = desk.place[r];
      if (p.rows) p.rows[2 * at] = base(desk.top[r]), p.rows[2 * at + 1] = inverse;
      if (p.entropy) {
        float share = 1.0f - own(r) * inverse;
        float entropy = std::log(sum) * share - LN2 * desk.spread[r] * inverse;
        p.entropy[at] = blind || entropy < 0.0f ? 0.0f : entropy;
      }
      float *out = p.out + ((b * p.queries + query(r)) * p.heads + head(r)) * p.value_width;
      const float *from = desk.out.data() + r * s.value_panels * NR;
      for (int64_t e = 0; e < p.value_width; e++) out[e] = blind ? 0.0f : from[e] * inverse;
      desk.sum[r] = inverse;
    }
  }

  // What can be said only once the sums are known.
  void tell() {
    int64_t tall = (n + MR - 1) / MR * MR, across = s.carry_panels * NR;
    if (p.received) desk.received.resize(s.stacked * s.panels * NR);
    if (p.distance) {
      desk.distance.resize(s.stacked * s.slots(p));
      stretches([&](int64_t from, int64_t to) {
        for (int64_t h = 0; h < s.stacked; h++)
          std::fill(desk.distance.data() + h * s.slots(p) + from, desk.distance.data() + h * s.slots(p) + to, 0.0f);
      });
    }
    if (p.carry) desk.mixed.assign(tall * across, 0.0f), desk.mean.assign(tall * PITCH, 0.0f);
    for (int64_t number = 0; number < (int64_t)desk.chunks.size(); number++) {
      const Chunk &c = desk.chunks[number];
      float *factor = desk.reference.data() + number * s.padded();
      for (int64_t r = 0; r < rows; r++) factor[r] = lowered(factor[r], desk.top[r]) * desk.sum[r];
      const float *scores = chunk_scores(number);
      if (p.first) tell_first(c, scores, factor);
      if (p.live)
        for (int64_t r = 0; r < rows; r++)
          if (!p.live[b * p.live_stride + query(r)]) factor[r] = 0.0f;
      for (int64_t h = 0; h < s.stacked; h++)
        for (int64_t i = c.from; i < c.to; i++) {
          if (p.received) tell_received(desk.runs[i], h, scores, factor);
          if (p.distance) tell_distance(desk.runs[i], h, scores, factor);
        }
      if (p.carry) tell_carried(c, tall, scores, factor);
    }
  }

  // The mean over heads of the weights, times what is carried: one product for all heads of the unit.
  void tell_carried(const Chunk &c, int64_t tall, const float *scores, const float *factor) {
    for (int64_t i = 0; i < n; i++) {
      float *mean = desk.mean.data() + i * PITCH;
      for (int64_t j = 0; j < c.width; j += W) {
        vf sum = {};
        for (int64_t h = 0; h < s.stacked; h++) {
          int64_t r = h * n + i;
          sum += load(scores + r * PITCH + j) * factor[r];
        }
        store(mean + j, sum * (1.0f / p.heads));
      }
    }
    for (int64_t e = 0; e < s.carry_panels; e++)
      for (int64_t i = c.from; i < c.to; i++) {
        const Run &run = desk.runs[i];
        const float *x = carry + (e * s.panels * NR + run.column) * NR;
        for (int64_t r = 0; r < tall; r += MR)
          product<true>(desk.mean.data() + r * PITCH + run.at, PITCH, x, run.width,
                        desk.mixed.data() + r * s.carry_panels * NR + e * NR, s.carry_panels * NR);
      }
  }

  void tell_first(const Chunk &c, const float *scores, const float *factor) {
    int64_t column = p.first_at[b];
    for (int64_t i = c.from; i < c.to; i++) {
      const Run &run = desk.runs[i];
      if (column < run.column || column >= run.column + run.width) continue;
      for (int64_t r = 0; r < rows; r++)
        p.first[(b * p.heads + head(r)) * p.queries + query(r)] =
            scores[r * PITCH + run.at + column - run.column] * factor[r];
    }
  }

  void tell_received(const Run &run, int64_t h, const float *scores, const float *factor) {
    float *to = desk.received.data() + h * s.panels * NR + run.column;
    for (int64_t r = h * n; r < (h + 1) * n; r += 8) {
      int64_t many = std::min<int64_t>(8, (h + 1) * n - r);
      for (int64_t i = 0; i < run.width; i += W) {
        const float *x = scores + r * PITCH + run.at + i;
        vf sum = r > h * n ? load(to + i) : vf{};
        if (many == 8) {
#pragma GCC unroll 8
          for (int64_t j = 0; j < 8; j++) sum += load(x + j * PITCH) * factor[r + j];
        } else {
          for (int64_t j = 0; j < many; j++) sum += load(x + j * PITCH) * factor[r + j];
        }
        store(to + i, sum);
      }
    }
  }

  // The slot of a query's distance from a run's first column: reach - 1 - (distance - nearest), NR further on. Masked
  // columns weigh nothing, wherever they fall.
  int64_t slot_of(const Run &run, int64_t q) const {
    return NR + p.reach - 1 + p.nearest - (p.q_first + row0 + q - run.column);
  }

  // Calls act(from, to) for every stretch of slots that the block's runs can fall in.
  template <class F>
  void stretches(F act) const {
    int64_t from = 0, to = 0;
    for (const Run &run : desk.runs) {  // runs and slots rise together
      int64_t lo = std::max<int64_t>(0, slot_of(run, n - 1)), hi = std::min(s.slots(p), slot_of(run, 0) + run.width);
      if (lo >= hi) continue;
      if (lo > to) {
        if (from < to) act(from, to);
        from = lo;
      }
      to = hi;
    }
    if (from < to) act(from, to);
  }

  // Adds what the block found to what its heads' keys have received, and from how far.
  void add() const {
    for (int64_t h = 0; h < s.stacked; h++) {
      int64_t row = b * p.heads + unit * s.stacked + h;
      if (p.received)
        for (const Run &run : desk.runs) {
          const float *from = desk.received.data() + h * s.panels * NR;
          float *to = p.received + row * p.keys;
          for (int64_t j = run.column; j < std::min(run.column + run.width, p.keys); j++) to[j] += from[j];
        }
      if (p.distance)
        stretches([&](int64_t from, int64_t to) {
          const float *slots = desk.distance.data() + h * s.slots(p);
          float *last = p.distance + (row + 1) * p.reach - 1;
          for (int64_t i = std::max<int64_t>(from, NR); i < std::min(to, NR + p.reach); i++) last[NR - i] += slots[i];
        });
    }
  }

  // Slots run backwards, so that columns and slots rise together. Rows W apart touch the same vectors; neighbouring
  // rows would read what a store has not finished writing.
  void tell_distance(const Run &run, int64_t h, const float *scores, const float *factor) {
    int64_t slots = s.slots(p);
    float *to = desk.distance.data() + h * slots;
    for (int64_t phase = 0; phase < W; phase++)
      for (int64_t q = phase; q < n; q += W) {
        int64_t r = h * n + q;
        int64_t slot = slot_of(run, q);
        const float *x = scores + r * PITCH + run.at;
        int64_t from = std::max<int64_t>(0, (-slot + W - 1) / W * W), to_end = run.width;
        while (to_end > from && slot + to_end > slots) to_end -= W;
        for (int64_t i = from; i < to_end; i += W) store(to + slot + i, load(to + slot + i) + load(x + i) * factor[r]);
      }
  }
};
