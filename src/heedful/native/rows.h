// One block of query rows, and the columns that they see. Included after desk.h.

// The query heads of a group stand above one another, so that keys and values are read once for all of them.
struct Rows {
  const Problem &p;
  const Sizes &s;
  Desk &desk;
  int64_t b, unit, row0, n, rows;  // rows in the text, rows of all heads

  int64_t head(int64_t r) const { return unit * s.stacked + r / n; }
  int64_t query(int64_t r) const { return row0 + r % n; }
  const int32_t *ranges(int64_t r) const { return desk.ranges[r]; }

  // Which columns some row sees, as runs in chunks.
  void survey() {
    auto &seen = desk.seen;
    seen.clear();
    desk.ranges.resize(rows);
    for (int64_t r = 0; r < rows; r++)
      desk.ranges[r] = p.ranges + b * p.range_stride[0] + head(r) * p.range_stride[1] + query(r) * p.range_count * 2;
    desk.sees.resize(rows), desk.tiles.resize(s.padded() / s.high);
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

  // From the first column of a chunk that a row sees to behind the last; where it sees none, nothing.
  Stretch seen_in(int64_t r, const Chunk &c) const {
    const int32_t *x = ranges(r);
    const uint8_t *keeps = table(r);
    Stretch seen{c.width, 0};
    for (int64_t i = c.from; i < c.to; i++) {
      const Run &run = desk.runs[i];
      for (int64_t j = 0; j < p.range_count; j++) {
        int64_t lo = std::max<int64_t>(x[2 * j], run.column), hi = std::min<int64_t>(x[2 * j + 1], run.column + run.width);
        if (keeps) {
          while (lo + 8 <= hi && none_of_eight(keeps + lo)) lo += 8;
          while (lo < hi && !keeps[lo]) lo++;
          while (lo + 8 <= hi && none_of_eight(keeps + hi - 8)) hi -= 8;
          while (lo < hi && !keeps[hi - 1]) hi--;
        }
        if (lo >= hi) continue;
        seen.from = std::min(seen.from, lo - run.column + run.at), seen.to = std::max(seen.to, hi - run.column + run.at);
      }
    }
    return seen;
  }

  static bool none_of_eight(const uint8_t *keeps) {
    uint64_t eight;
    std::memcpy(&eight, keeps, sizeof eight);
    return !eight;
  }

  // Looks where the rows from `top` to `end` see something of a chunk: what lies beside that is not computed.
  void look(const Chunk &c, int64_t top, int64_t end) {
    for (int64_t first = top; first < end; first += s.high) {
      Stretch &tile = desk.tiles[first / s.high];
      tile = {c.width, 0};
      for (int64_t r = first; r < std::min(first + s.high, rows); r++) {
        Stretch x = seen_in(r, c);
        tile = {std::min(tile.from, x.from / NR * NR), std::max(tile.to, x.to)};
        desk.sees[r] = x.to ? Stretch{x.from / NR * NR, (x.to + NR - 1) / NR * NR} : x;
      }
    }
  }

  // Nothing where a row sees nothing.
  template <class T>
  void blank(const Chunk &c, int64_t r, T *row) const {
    const Stretch &x = desk.sees[r];
    std::fill(row, row + x.from, T{});
    if (x.to) std::fill(row + x.to, row + c.width, T{});
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

  // Which keys a row sees, one by one; null where its ranges say it all.
  const uint8_t *table(int64_t r) const {
    if (!p.table) return nullptr;
    return p.table + b * p.table_stride[0] + head(r) * p.table_stride[1] + query(r) * p.table_stride[2];
  }

  void mask(int64_t r, const Chunk &c, float *row) const {
    const uint8_t *keeps = table(r);
    const Stretch &x = desk.sees[r];
    for (int64_t i = c.from; i < c.to; i++) {
      const Run &run = desk.runs[i];
      if (run.at >= x.to || run.at + run.width <= x.from) continue;
      gaps(r, run, [&](int64_t from, int64_t to) {
        from = std::max(from, x.from), to = std::min(to, x.to);
        if (from < to) std::fill(row + from, row + to, -INFINITY);
      });
      if (!keeps) continue;
      const uint8_t *keep = keeps + run.column;
      float *to = row + run.at;
      int64_t end = std::min({x.to - run.at, run.width, p.keys - run.column});
      for (int64_t j = std::max<int64_t>(0, x.from - run.at); j < end; j++) to[j] = keep[j] ? to[j] : -INFINITY;
    }
  }

  // How many columns that are computed a row sees, whatever their scores.
  int64_t seen(int64_t r) const {
    const int32_t *x = ranges(r);
    const uint8_t *keeps = table(r);
    int64_t many = 0;
    for (const Run &run : desk.runs)
      for (int64_t i = 0; i < p.range_count; i++) {
        int64_t from = std::max<int64_t>(x[2 * i], run.column), to = std::min<int64_t>(x[2 * i + 1], run.column + run.width);
        if (!keeps) many += std::max<int64_t>(0, to - from);
        else
          for (int64_t j = from; j < to; j++) many += keeps[j] != 0;
      }
    return many;
  }

  int32_t column(const Chunk &c, int64_t at) const {
    int64_t i = c.from;
    while (i + 1 < c.to && desk.runs[i + 1].at <= at) i++;
    return (int32_t)(desk.runs[i].column + at - desk.runs[i].at);
  }
};
