// What attention makes of a block of rows, with the statistics of each row and key on the way. Included after rows.h.

// One block of rows of one unit; the register tile multiplies E, float or bfloat16.
template <class E>
struct Block : Rows {
  const E *keys, *values;
  const float *carry;

  // The part of a row's sum that the sink logit has.
  float own(int64_t r) const { return p.sink ? lowered(p.sink[head(r)] * LOG2E, desk.top[r]) : 0.0f; }

  template <class T>
  void load_queries() {
    E *to = (E *)desk.q.data();
    std::fill(to, to + s.padded() * s.depth, E{});
    for (int64_t r = 0; r < rows; r++) {
      const T *from = (const T *)p.q + b * p.q_stride[0] + head(r) * p.q_stride[1] + query(r) * p.q_stride[2];
      if constexpr (DEEP<E> > 1) std::copy_n(from, p.width, to + r * s.depth);
      else
        for (int64_t d = 0; d < p.width; d++) to[r * s.depth + d] = number(from[d]) * (p.scale * LOG2E);
    }
  }

  // A row's scores with what the model makes of them; of columns behind the last key nothing is said.
  void model(int64_t r, const Chunk &c, float *row) const {
    const float *bias = p.bias;
    if (bias) bias += b * p.bias_stride[0] + head(r) * p.bias_stride[1] + query(r) * p.bias_stride[2];
    const Stretch &x = desk.sees[r];
    for (int64_t i = c.from; i < c.to; i++) {
      const Run &run = desk.runs[i];
      int64_t from = std::max(x.from, run.at), to = std::min(x.to, run.at + std::min(run.width, p.keys - run.column));
      if (from < to) as_modelled(row + from, to - from, p.softcap, bias ? bias + run.column + from - run.at : nullptr);
    }
  }

  // Scores of a row to weights that are each made of their own.
  void shape(int64_t r, const Chunk &c, float *row, float *weights) {
    const Stretch &x = desk.sees[r];
    if (UNSCALED<E>)
      for (int64_t i = x.from; i < x.to; i += W) store(row + i, load(row + i) * (p.scale * LOG2E));
    if (p.softcap || p.bias) model(r, c, row);
    mask(r, c, row);
    if (p.peak) {
      vf high = load(row + x.from);
      for (int64_t i = x.from + W; i < x.to; i += W) high = greater(high, load(row + i));
      float greatest = highest(high), weight = formed(all(greatest), p.form, p.shift)[0];
      if (weight > desk.peak[r]) {
        desk.peak[r] = weight;
        int64_t at = x.from;
        while (at + 1 < x.to && row[at] != greatest) at++;
        desk.place[r] = column(c, at);
      }
    }
    vf sum = load(desk.sums.data() + r * W), spread = load(desk.spreads.data() + r * W);
    for (int64_t i = x.from; i < x.to; i += NR) {
      vf one = formed(load(row + i), p.form, p.shift), other = formed(load(row + i + W), p.form, p.shift);
      if (p.entropy) sum += one + other, spread += one * logarithm(one) + other * logarithm(other);
      if (DEEP<E> > 1 && kept()) store(weights + i, one), store(weights + i + W, other);
      if constexpr (DEEP<E> > 1) store((E *)row + i, one, other);
      else store(row + i, one), store(row + i + W, other);
    }
    store(desk.sums.data() + r * W, sum), store(desk.spreads.data() + r * W, spread);
  }

  // Scores of a row to weights over its running maximum, and what the row adds up to so far.
  void soften(int64_t r, const Chunk &c, float *row, float *weights) {
    const Stretch &x = desk.sees[r];
    float times = UNSCALED<E> ? p.scale * LOG2E : 1.0f;
    if (bool changed = p.softcap || p.bias; changed || !(times > 0.0f)) {
      if (UNSCALED<E>)
        for (int64_t i = x.from; i < x.to; i += W) store(row + i, load(row + i) * times);
      if (changed) model(r, c, row);
      times = 1.0f;
    }
    mask(r, c, row);
    vf high = load(row + x.from), other = load(row + x.from + W);  // a panel is two vectors
    for (int64_t i = x.from + NR; i < x.to; i += NR) high = greater(high, load(row + i)), other = greater(other, load(row + i + W));
    high = greater(high, other);
    if (above(high * times, desk.peak[r])) rise(r, c, row, highest(high), times);
    const float top = base(desk.top[r]);
    const bool whole = DEEP<E> > 1 && kept();
    if (p.entropy && whole) weigh<true, true>(r, x, row, weights, top, times);
    else if (p.entropy) weigh<true, false>(r, x, row, weights, top, times);
    else if (whole) weigh<false, true>(r, x, row, weights, top, times);
    else weigh<false, false>(r, x, row, weights, top, times);
  }

  // A row's running maximum rises; what was added up over the last is lowered.
  void rise(int64_t r, const Chunk &c, const float *row, float greatest, float times) {
    float here = greatest * times, before = desk.top[r];
#ifdef TILES
    asm("" : "+x"(here));  // rounded once for all that is done with it
#endif
    if (!(here > desk.peak[r])) return;
    desk.peak[r] = here;
    if (p.place) {
      int64_t at = desk.sees[r].from;
      while (at < desk.sees[r].to && row[at] != greatest) at++;
      desk.place[r] = column(c, at);
    }
    if (!(here > before)) return;
    float shrink = lowered(before, here);
    float *sum = desk.sums.data() + r * W, *spread = desk.spreads.data() + r * W;
    store(spread, shrink > 0 ? (load(spread) - load(sum) * (here - before)) * shrink : vf{});
    store(sum, load(sum) * shrink);
    desk.top[r] = here;
    float *out = desk.out.data() + r * s.value_panels * NR;
    for (int64_t e = 0; e < s.value_panels * NR; e += W) store(out + e, load(out + e) * shrink);
  }

  // Weights come where scores were, in half the room where they are pairs; WHOLE ones stand beside these.
  template <bool ENTROPY, bool WHOLE>
  void weigh(int64_t r, const Stretch &seen, float *row, float *weights, float top, float times) {
    vf sum = load(desk.sums.data() + r * W), spread = load(desk.spreads.data() + r * W);
    for (int64_t i = seen.from; i < seen.to; i += NR) {
      vf x = load(row + i) * times, y = load(row + i + W) * times;
#ifdef TILES
      asm("" : "+v"(x), "+v"(y));  // rounded by itself, as the maximum was, so that the greatest stays the greatest
#endif
      x -= top, y -= top;
      vf one = ENTROPY ? exp2(x, spread) : exp2(x), other = ENTROPY ? exp2(y, spread) : exp2(y);
      sum += one + other;
      if (WHOLE) store(weights + i, one), store(weights + i + W, other);
      if constexpr (DEEP<E> > 1) store((E *)row + i, one, other);
      else store(row + i, one), store(row + i + W, other);
    }
    store(desk.sums.data() + r * W, sum);
    if (ENTROPY) store(desk.spreads.data() + r * W, spread);
  }

  // Whether weights are wanted again once the sums of their rows are known.
  bool kept() const { return p.received || p.distance || p.first || p.carry; }

  // Where the scores of a row stand, and the weights that are made of them; those that nobody wants again make room.
  float *scores_of(int64_t number, int64_t r) const {
    return desk.scores.data() + (DEEP<E> == 1 && kept() ? number * s.padded() + r : r % AT_A_TIME<E>) * PITCH;
  }

  // Where weights stand that are wanted again.
  float *weights_of(int64_t number, int64_t r) const {
    return DEEP<E> == 1 ? scores_of(number, r) : desk.weights.data() + (number * s.padded() + r) * PITCH;
  }

  void compute() {
    survey();
    int64_t padded = s.padded();
    int64_t chunks = (int64_t)desk.chunks.size();
    desk.q.resize(padded * s.depth / DEEP<E>);
    if (DEEP<E> > 1 && kept()) desk.weights.resize(chunks * padded * PITCH);
    desk.out.assign(padded * s.value_panels * NR, 0.0f);
    desk.scores.resize((DEEP<E> == 1 && kept() ? chunks * padded : std::min(padded, AT_A_TIME<E>)) * PITCH);
    desk.reference.resize(std::max<int64_t>(1, chunks) * padded);
    desk.inverse.resize(padded);
    for (auto *x : {&desk.sums, &desk.spreads}) x->assign(padded * W, 0.0f);
    for (auto *x : {&desk.top, &desk.peak}) x->assign(padded, p.form ? 0.0f : -INFINITY);
    desk.place.assign(padded, 0);
    if (p.sink)
      for (int64_t r = 0; r < rows; r++) desk.top[r] = p.sink[head(r)] * LOG2E;
    if constexpr (DEEP<E> > 1)
      load_queries<E>();
    else if (p.bfloat16)
      load_queries<uint16_t>();
    else
      load_queries<float>();
    const E *q = (const E *)desk.q.data();
    int64_t tall = (rows + HIGH<E> - 1) / HIGH<E> * HIGH<E>;
    for (int64_t number = 0; number < chunks; number++)
      for (int64_t top = 0; top < tall; top += AT_A_TIME<E>) attend(number, q, top, std::min(tall, top + AT_A_TIME<E>));
    finish();
    if (kept()) tell();
  }

  // What the rows from `top` to `end` make of a chunk.
  void attend(int64_t number, const E *q, int64_t top, int64_t end) {
    const Chunk &c = desk.chunks[number];
    look(c, top, end);
    for (int64_t i = c.from; i < c.to; i++) {
      const Run &run = desk.runs[i];
      for (int64_t j = 0; j < run.width; j += NR)
        for (int64_t r = top; r < end; r += HIGH<E>)
          if (const Stretch &x = desk.tiles[r / HIGH<E>]; x.from <= run.at + j && run.at + j < x.to)
            product<false>(q + r * s.depth, s.depth, keys + (run.column + j) * s.depth, s.depth,
                           scores_of(number, r) + run.at + j, PITCH, p.scale * LOG2E);
    }
    for (int64_t r = top; r < std::min(end, rows); r++) {
      float *row = scores_of(number, r), *weights = weights_of(number, r);
      if (desk.sees[r].to) p.form ? shape(r, c, row, weights) : soften(r, c, row, weights);
      blank(c, r, (E *)row);
      if (DEEP<E> > 1 && kept()) blank(c, r, weights);
      desk.reference[number * s.padded() + r] = desk.top[r];
    }
    for (int64_t e = 0; e < s.value_panels; e++)
      for (int64_t i = c.from; i < c.to; i++) {
        const Run &run = desk.runs[i];
        const E *v = values + (e * s.panels * NR + run.column) * NR;
        for (int64_t r = top; r < end; r += HIGH<E>) {
          const Stretch &x = desk.tiles[r / HIGH<E>];
          int64_t from = std::max(x.from, run.at), to = std::min(x.to, run.at + run.width);
          if (from < to)
            product<true>((const E *)scores_of(number, r) + from, PITCH * DEEP<E>, v + (from - run.at) * NR, to - from,
                          desk.out.data() + r * s.value_panels * NR + e * NR, s.value_panels * NR, 1.0f);
        }
      }
  }

  // Divides by the sums.
  void finish() {
    for (int64_t r = 0; r < rows; r++) {
      float sum = total(load(desk.sums.data() + r * W)) + own(r);
      bool empty = desk.top[r] == -INFINITY, blind = empty && !seen(r);
      float inverse = blind ? 0.0f : empty ? NAN : 1.0f / sum;  // softmax of minus infinities alone is no number
      if (p.form) inverse = p.mean ? 1.0f / std::max<int64_t>(1, seen(r)) : 1.0f;
      int64_t at = (b * p.heads + head(r)) * p.queries + query(r);
      if (p.peak) p.peak[at] = (p.form ? desk.peak[r] : lowered(desk.peak[r], desk.top[r])) * inverse;
      if (p.place) p.place[at] = desk.place[r];
      if (p.rows) p.rows[2 * at] = base(desk.top[r]), p.rows[2 * at + 1] = inverse;
      if (p.entropy) {
        float share = 1.0f - own(r) * inverse, spread = total(load(desk.spreads.data() + r * W));
        float entropy = std::log(sum) * share - LN2 * spread * inverse;
        if (p.form) p.entropy[at] = -inverse * (spread + std::log(inverse) * sum);  // below 0 where weights are above 1
        else p.entropy[at] = blind || entropy < 0.0f ? 0.0f : entropy;
      }
      const float *from = desk.out.data() + r * s.value_panels * NR;
      give(p, ((b * p.queries + query(r)) * p.heads + head(r)) * p.value_width, from, inverse, blind);
      desk.inverse[r] = inverse;
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
      for (int64_t r = 0; r < rows; r++) factor[r] = lowered(factor[r], desk.top[r]) * desk.inverse[r];
      const float *scores = weights_of(number, 0);
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
