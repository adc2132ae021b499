// Vectors of LANES floats in the compiler's own notation, and the one matrix product that attention is made of.
// Included once for each instruction set, inside a namespace of its own.

constexpr int W = LANES;     // floats in a vector
constexpr int NR = 2 * W;    // columns of a panel
constexpr int MR = 6;        // rows of a register tile: 12 sums, 2 columns and 1 factor fill 15 registers

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef float vq __attribute__((vector_size(16)));
typedef float vu __attribute__((vector_size(W * 4), aligned(4), may_alias));  // at any address

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vu *)p; }
INLINE void store(float *p, vf x) { *(vu *)p = x; }
INLINE vf all(float x) { return x - vf{}; }
// of x and y the greater, and x where it is no number
INLINE vf greater(vf x, vf y) {
#if LANES == 16
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)y, (__m512)x);  // which the compiler does not see in the line below
#else
  return y > x ? y : x;
#endif
}

INLINE float highest(vf x) {
  union { vf whole; vq parts[W / 4]; } lanes = {x};
  vq top = lanes.parts[0];
  for (int i = 1; i < W / 4; i++) top = lanes.parts[i] > top ? lanes.parts[i] : top;
  float left = top[1] > top[0] ? top[1] : top[0], right = top[3] > top[2] ? top[3] : top[2];
  return right > left ? right : left;
}

INLINE float total(vf x) {
  union { vf whole; vq parts[W / 4]; } lanes = {x};
  vq sum = lanes.parts[0];
  for (int i = 1; i < W / 4; i++) sum += lanes.parts[i];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);  // not one after the other: each would wait for the last
}

// What each of so many vectors adds up to, four of them together.
template <int MANY>
INLINE void totals(const vf *x, float times, float *to) {
#ifdef HEEDFUL_X86
  if constexpr (MANY == 4) {
    vi low, high, left, right;  // of each four lanes: one of one vector, one of the other; two of one, two of the other
    for (int j = 0; j < W; j++) {
      int at = j / 4 * 4, k = j % 4;
      low[j] = at + k / 2 + k % 2 * W, high[j] = low[j] + 2;
      left[j] = at + k % 2 + k / 2 * W, right[j] = left[j] + 2;
    }
    vf one = __builtin_shuffle(x[0], x[1], low) + __builtin_shuffle(x[0], x[1], high);
    vf other = __builtin_shuffle(x[2], x[3], low) + __builtin_shuffle(x[2], x[3], high);
    union { vf whole; vq parts[W / 4]; } lanes = {__builtin_shuffle(one, other, left) + __builtin_shuffle(one, other, right)};
    vq sum = lanes.parts[0];
    for (int i = 1; i < W / 4; i++) sum += lanes.parts[i];
    sum *= times;
    std::memcpy(to, &sum, sizeof sum);
    return;
  }
#endif
  for (int i = 0; i < MANY; i++) to[i] = total(x[i]) * times;
}

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
// Up to where 2^x is nothing at all.
constexpr float LEAST = W == 16 ? -126.0f : -127.0f;

INLINE vf polynomial(vf f, float fifth, float fourth, float third, float second, float first) {
  vf y = all(fifth);
  y = y * f + fourth;
  y = y * f + third;
  y = y * f + second;
  y = y * f + first;
  return y * f + 1.0f;
}

#if LANES == 16
// 2^x for x up to 0, within 2e-7, where it is `something`, else zero; what is no number stays so
INLINE vf exp2(vf x, __mmask16 something) {
  vf f = (vf)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 1);  // above the whole number below; 0 at minus infinity
  vf y = polynomial(f, 0.001867130079397726f, 0.009017030295961282f, 0.05579991312980974f, 0.24016445014455917f,
                    0.6931513118060176f);
  return (vf)_mm512_maskz_scalef_ps(something, (__m512)y, (__m512)x);
}
INLINE __mmask16 something(vf x) { return _mm512_cmp_ps_mask((__m512)x, (__m512)all(LEAST), _CMP_NLE_UQ); }
INLINE vf exp2(vf x) { return exp2(x, something(x)); }
// Adds 2^x * x, which is nothing where 2^x is.
INLINE vf exp2(vf x, vf &spread) {
  __mmask16 some = something(x);
  vf y = exp2(x, some);
  spread = (vf)_mm512_mask3_fmadd_ps((__m512)y, (__m512)x, (__m512)spread, some);
  return y;
}
// Whether some lane is.
INLINE bool above(vf x, float y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)all(y), _CMP_GT_OQ); }
#else
INLINE vf exp2(vf x) {
  x = greater(x, all(LEAST));
  const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it leaves the whole part in the low bits
  vf shifted = x + magic;
  vf f = x - (shifted - magic);
  vf y = polynomial(f, 0.0013264727123468377f, 0.00967151264482191f, 0.05550733743497312f, 0.24022242085262346f,
                    0.6931469775989927f);
  union { vf f; vi i; } bits = {shifted};
  bits.i = (bits.i << 23) + 0x3f800000;
  return y * bits.f;
}
INLINE vf exp2(vf x, vf &spread) {
  vf y = exp2(x);
  spread += y * greater(x, all(LEAST));
  return y;
}
INLINE bool above(vf x, float y) { return highest(x) > y; }
#endif

// The logarithm of what is not negative; of less than 2^-126, nothing included, some number about that of it.
INLINE vf logarithm(vf x) {
  union { vf f; vi i; } bits = {x};
  vi whole = (bits.i - 0x3f3504f3) >> 23;  // what is left lies about 1, from sqrt(1/2) to sqrt(2)
  bits.i -= whole << 23;
  vf s = (bits.f - 1.0f) / (bits.f + 1.0f);
  vf series = polynomial(s * s, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3);
  return __builtin_convertvector(whole, vf) * LN2 + 2.0f * s * series;
}

// Scores, times LOG2E, bounded: softcap * tanh(score / softcap), from an exponential that cannot overflow.
INLINE vf capped(vf x, float softcap) {
  vf size = x < vf{} ? -x : x;
  vf small = exp2(size * (-2.0f / softcap));
  vf high = (1.0f - small) / (1.0f + small) * (softcap * LOG2E);
  return x < vf{} ? -high : high;
}

// Scores of one query, times LOG2E, as the model has them: bounded, and with what it adds to them.
INLINE void as_modelled(float *scores, int64_t n, float softcap, const float *bias) {
  if (softcap)
    for (int64_t j = 0; j < n; j += W) store(scores + j, capped(load(scores + j), softcap));
  if (bias)
    for (int64_t j = 0; j < n; j++) scores[j] += bias[j] * LOG2E;
}

// A weight that is made of its own score, which comes times LOG2E: nothing of minus infinity.
INLINE vf formed(vf x, int64_t form, float shift) {
  const vf none = {};
  if (form == 2) return greater(x * LN2 + shift, none);
  x += shift * LOG2E;
  vf small = exp2(x < none ? x : -x);
  return (x < none ? small : all(1.0f)) / (1.0f + small);
}

// How steeply that rises with the score.
INLINE vf steep(vf weight, int64_t form) {
  const vf none = {}, one = all(1.0f);
  return form == 2 ? (weight > none ? one : none) : weight * (one - weight);
}

// What a weight over one maximum is multiplied with to be over a later one; both may be minus infinity.
INLINE float lowered(float before, float now) {
  return before == now ? 1.0f : before - now < -126.0f ? 0.0f : std::exp2(before - now);
}

// Weights over a maximum; over 0 while nothing above minus infinity was seen, so that the weights are zeros.
INLINE float base(float top) { return top == -INFINITY ? 0.0f : top; }

// c[MR][NR] = a[MR][n] b[n][NR], or added to it
template <bool ADD>
INLINE void product(const float *a, int64_t lda, const float *b, int64_t n, float *c, int64_t ldc, float = 1.0f) {
  vf sum[MR][2] = {};
  for (int64_t i = 0; i < n; i++) {
    vf left = load(b + i * NR), right = load(b + i * NR + W);
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++) {
      vf x = all(a[r * lda + i]);
      sum[r][0] += x * left;
      sum[r][1] += x * right;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; r++) {
    float *to = c + r * ldc;
    store(to, ADD ? load(to) + sum[r][0] : sum[r][0]);
    store(to + W, ADD ? load(to + W) + sum[r][1] : sum[r][1]);
  }
}

#ifdef PAIRS
// Two vectors rounded to bfloat16.
INLINE void store(uint16_t *p, vf x, vf y) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
}
#endif

#if defined(PAIRS) && !defined(TILES)
// The same for bfloat16: two products a lane, exact and added up in float32. b is [n/2][NR][2]; of an odd n one more is
// taken. What is not added is multiplied with `times`.
template <bool ADD>
INLINE void product(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t n, float *c, int64_t ldc, float times) {
  vf sum[MR][2] = {};
  for (int64_t i = 0; i < n; i += 2) {
    const float *at = (const float *)(b + i * NR);
    vf left = load(at), right = load(at + W);
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++) {
      uint32_t pair;
      std::memcpy(&pair, a + r * lda + i, sizeof pair);
      __m512bh x = (__m512bh)_mm512_set1_epi32((int)pair);
      sum[r][0] = (vf)_mm512_dpbf16_ps((__m512)sum[r][0], x, (__m512bh)left);
      sum[r][1] = (vf)_mm512_dpbf16_ps((__m512)sum[r][1], x, (__m512bh)right);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; r++) {
    float *to = c + r * ldc;
    store(to, ADD ? load(to) + sum[r][0] : sum[r][0] * times);
    store(to + W, ADD ? load(to + W) + sum[r][1] : sum[r][1] * times);
  }
}
#endif

INLINE float number(float x) { return x; }
INLINE float number(uint16_t x) {
  union { uint32_t i; float f; } bits = {(uint32_t)x << 16};
  return bits.f;
}

INLINE uint16_t rounded(float x) {
  union { float f; uint32_t i; } bits = {x};
  return x != x ? 0x7fc0 : (bits.i + 0x7fff + (bits.i >> 16 & 1)) >> 16;
}

// One head of the output, from element `at` on; none of it counts where it is blind.
INLINE void give(const Problem &p, int64_t at, const float *from, float times, bool blind) {
  if (p.out_bfloat16)
    for (int64_t e = 0; e < p.value_width; e++) ((uint16_t *)p.out)[at + e] = blind ? 0 : rounded(from[e] * times);
  else
    for (int64_t e = 0; e < p.value_width; e++) ((float *)p.out)[at + e] = blind ? 0.0f : from[e] * times;
}

// How many elements of a type one lane of the register tile multiplies at once.
template <class E>
constexpr int64_t DEEP = sizeof(float) / sizeof(E);

// What a product of a type goes through in one step: rows, and elements of each; and whether it leaves scores unscaled.
template <class E>
constexpr int HIGH = MR;
template <class E>
constexpr int64_t STEP = DEEP<E>;
template <class E>
constexpr bool UNSCALED = false;

// How many rows go through a chunk together: what tiles leave stays in the first-level cache.
template <class E>
constexpr int64_t AT_A_TIME = int64_t(1) << 30;

// What a thread must have before products of a type, and gives back.
template <class E>
struct Registers {};

template <class E, class T>
INLINE E as(T x) {
  if constexpr (DEEP<E> == 1) return number(x);
  else return x;
}
