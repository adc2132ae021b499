// The sizes of a call's blocks, and its keys and values laid out for the register tile: K in panels of NR keys, [d][NR]
// each, V and what is carried in panels of NR widths, [k][NR] each; where a lane multiplies pairs, [d/2][NR][2] and
// [k/2][NR][2]. Included after tile.h.

constexpr int ROWS = 144;    // rows of a block, all heads together
constexpr int WIDE = 256;    // columns of a chunk: its scores stay in the second-level cache
constexpr int PAD = 16;      // floats between rows of a chunk, so that they do not fall on one another in the cache
constexpr int PITCH = WIDE + PAD;

struct Sizes {
  int64_t units, stacked, rows, blocks, depth, panels, value_panels, carry_panels;
  Sizes(const Problem &p, int64_t deep) {
    int64_t group = p.heads / p.kv_heads;
    stacked = p.blocks && p.block_units == p.heads && group > 1 ? 1 : group;
    units = p.heads / stacked;
    rows = std::max<int64_t>(1, ROWS / stacked);
    if (p.blocks) {
      int64_t whole = p.block;
      while (whole > rows && whole % 2 == 0) whole /= 2;
      rows = whole;
    }
    rows = std::min(rows, p.queries);
    blocks = (p.queries + rows - 1) / rows;
    depth = (p.width + deep - 1) / deep * deep;
    panels = (p.keys + NR - 1) / NR;
    value_panels = (p.value_width + NR - 1) / NR;
    carry_panels = p.carry ? (p.carry_width + NR - 1) / NR : 0;
  }
  int64_t padded() const { return (stacked * rows + MR - 1) / MR * MR; }
  int64_t slots(const Problem &p) const { return p.reach + 2 * NR; }  // of distances, with room for masked columns
  int64_t packed_keys() const { return panels * NR * depth; }
  int64_t packed_values() const { return panels * NR * value_panels * NR; }
  int64_t packed_carry() const { return panels * NR * carry_panels * NR; }
};

// Where element i of column j lies within a panel.
template <class E>
INLINE int64_t within(int64_t i, int64_t j) {
  return (i / DEEP<E> * NR + j) * DEEP<E> + i % DEEP<E>;
}

template <class E, class T>
void pack_keys(const Problem &p, const Sizes &s, int64_t b, int64_t g, int64_t panel, E *to) {
  const T *from = (const T *)p.k + b * p.k_stride[0] + g * p.k_stride[1];
  int64_t here = std::min<int64_t>(NR, p.keys - panel * NR);
  for (int64_t j = 0; j < NR; j++) {
    const T *key = from + (panel * NR + j) * p.k_stride[2];
    for (int64_t d = 0; d < s.depth; d++) to[within<E>(d, j)] = j < here && d < p.width ? as<E>(key[d]) : E{};
  }
}

// Rows of `width` floats for the keys of one panel, `stride` apart, into panels of NR columns.
template <class E, class T>
void pack_rows(const Problem &p, const Sizes &s, const T *from, int64_t stride, int64_t width, int64_t panel, E *to) {
  for (int64_t j = panel * NR; j < (panel + 1) * NR; j++)
    for (int64_t e = 0; e < (width + NR - 1) / NR * NR; e++) {
      bool there = j < p.keys && e < width;
      to[e / NR * s.panels * NR * NR + within<E>(j, e % NR)] = there ? as<E>(from[j * stride + e]) : E{};
    }
}

template <class E, class T>
void pack_values(const Problem &p, const Sizes &s, int64_t b, int64_t g, int64_t panel, E *to) {
  const T *from = (const T *)p.v + b * p.v_stride[0] + g * p.v_stride[1];
  pack_rows<E, T>(p, s, from, p.v_stride[2], p.value_width, panel, to);
}
