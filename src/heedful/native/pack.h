// The sizes of a call's blocks, and its keys and values laid out for the register tile: K in panels of NR keys, [d][NR]
// each, V and what is carried in panels of NR widths, [k][NR] each; where a lane multiplies pairs, [d/2][NR][2] and
// [k/2][NR][2]. Included after tile.h.

#ifdef TILES
constexpr int ROWS = 96;     // rows of a block, all heads together
#else
constexpr int ROWS = 144;
#endif
constexpr int WIDE = 256;    // columns of a chunk: its scores stay in the second-level cache
constexpr int PAD = 16;      // floats between rows of a chunk, so that they do not fall on one another in the cache
constexpr int PITCH = WIDE + PAD;

struct Sizes {
  int64_t units, stacked, rows, blocks, depth, panels, value_panels, carry_panels, high;
  Sizes(const Problem &p, int64_t high, int64_t step) : high(high) {
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
    depth = (p.width + step - 1) / step * step;
    panels = (p.keys + NR - 1) / NR;
    value_panels = (p.value_width + NR - 1) / NR;
    carry_panels = p.carry ? (p.carry_width + NR - 1) / NR : 0;
  }
  int64_t padded() const { return (stacked * rows + high - 1) / high * high; }
  int64_t slots(const Problem &p) const { return p.reach + 2 * NR; }  // of distances, with room for masked columns
  int64_t packed_keys() const { return panels * NR * depth; }
  int64_t packed_values() const { return panels * NR * value_panels * NR; }
  int64_t packed_carry() const { return panels * NR * carry_panels * NR; }
};

#if LANES == 16
// Up to a vector of numbers, and zeros behind them.
INLINE vi some(const float *from, int64_t many) {
  return (vi)_mm512_maskz_loadu_ps(many >= W ? 0xffff : many > 0 ? (1u << many) - 1 : 0u, from);
}

#ifdef PAIRS
typedef uint16_t vs __attribute__((vector_size(W * 4)));
INLINE vs some(const uint16_t *from, int64_t many) {
  return (vs)_mm512_maskz_loadu_epi16(many >= 2 * W ? ~0u : many > 0 ? (1u << many) - 1 : 0u, from);
}
#endif

// Swaps what lies across a diagonal in squares of 2 S rows and columns, one square of S for the other.
template <int S>
INLINE void swap_squares(vi *rows) {
  vi upper, lower;
  for (int j = 0; j < W; j++) upper[j] = j & S ? W + j - S : j, lower[j] = j & S ? W + j : j + S;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) {
      vi one = rows[i], other = rows[i + S];
      rows[i] = __builtin_shuffle(one, other, upper), rows[i + S] = __builtin_shuffle(one, other, lower);
    }
}

// Pairs are numbers of 32 bits like others, and a panel is its keys turned round.
template <class E>
INLINE void turn_keys(const Problem &p, const Sizes &s, const E *from, int64_t panel, E *to) {
  constexpr int64_t D = DEEP<E>;
  for (int64_t j = 0; j < NR; j += W)
    for (int64_t d = 0; d < s.depth; d += D * W) {
      vi rows[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        int64_t key = panel * NR + j + i;
        rows[i] = (vi)some(from + key * p.k_stride[2] + d, key < p.keys ? p.width - d : 0);
      }
      swap_squares<8>(rows), swap_squares<4>(rows), swap_squares<2>(rows), swap_squares<1>(rows);
      for (int64_t i = 0; i < std::min<int64_t>(W, (s.depth - d) / D); i++)
        *(vi *)(to + ((d / D + i) * NR + j) * D) = rows[i];
    }
}
#endif

#ifdef PAIRS
INLINE void pack_values(const Problem &p, const Sizes &s, const uint16_t *from, int64_t panel, uint16_t *to) {
  vs left, right;  // of two rows, one beside the other
  for (int j = 0; j < 2 * W; j++) left[j] = j / 2 + j % 2 * 2 * W, right[j] = W + j / 2 + j % 2 * 2 * W;
  for (int64_t e = 0; e < s.value_panels; e++)
    for (int64_t j = panel * NR; j < (panel + 1) * NR; j += 2) {
      const uint16_t *at = from + j * p.v_stride[2] + e * NR;
      vs one = some(at, j < p.keys ? p.value_width - e * NR : 0);
      vs next = some(at + p.v_stride[2], j + 1 < p.keys ? p.value_width - e * NR : 0);
      uint16_t *here = to + (e * s.panels * NR + j) * NR;
      *(vs *)here = __builtin_shuffle(one, next, left), *(vs *)(here + NR) = __builtin_shuffle(one, next, right);
    }
}
#endif

// Where element i of column j lies within a panel.
template <class E>
INLINE int64_t within(int64_t i, int64_t j) {
  return (i / DEEP<E> * NR + j) * DEEP<E> + i % DEEP<E>;
}

template <class E, class T>
void pack_keys(const Problem &p, const Sizes &s, int64_t b, int64_t g, int64_t panel, E *to) {
  const T *from = (const T *)p.k + b * p.k_stride[0] + g * p.k_stride[1];
#if LANES == 16
  if constexpr (std::is_same_v<E, T>) return turn_keys(p, s, from, panel, to);
#endif
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
    if constexpr (std::is_same_v<E, T> && DEEP<E> == 1)
      for (int64_t e = 0; e < width; e += NR) {
        int64_t here = j < p.keys ? std::min<int64_t>(NR, width - e) : 0;
        E *at = to + (e * s.panels + j) * NR;
        std::copy_n(from + j * stride + e, here, at), std::fill(at + here, at + NR, E{});
      }
    else for (int64_t e = 0; e < (width + NR - 1) / NR * NR; e++) {
      bool there = j < p.keys && e < width;
      to[e / NR * s.panels * NR * NR + within<E>(j, e % NR)] = there ? as<E>(from[j * stride + e]) : E{};
    }
}

template <class E, class T>
void pack_values(const Problem &p, const Sizes &s, int64_t b, int64_t g, int64_t panel, E *to) {
  const T *from = (const T *)p.v + b * p.v_stride[0] + g * p.v_stride[1];
#ifdef PAIRS
  if constexpr (DEEP<E> > 1) return pack_values(p, s, from, panel, to);
#endif
  pack_rows<E, T>(p, s, from, p.v_stride[2], p.value_width, panel, to);
}
