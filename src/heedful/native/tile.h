// Vectors of LANES floats in the compiler's own notation, and the one matrix product that attention is made of.
// Included once for each instruction set, inside a namespace of its own.

constexpr int W = LANES;     // floats in a vector
constexpr int NR = 2 * W;    // columns of a panel
constexpr int MR = 6;        // rows of a register tile: 12 sums, 2 columns and 1 factor fill 15 registers

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
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
  typedef float quarter __attribute__((vector_size(16)));
  union { vf whole; quarter parts[W / 4]; } lanes = {x};
  quarter top = lanes.parts[0];
  for (int i = 1; i < W / 4; i++) top = lanes.parts[i] > top ? lanes.parts[i] : top;
  float left = top[1] > top[0] ? top[1] : top[0], right = top[3] > top[2] ? top[3] : top[2];
  return right > left ? right : left;
}

INLINE float total(vf x) {
  typedef float quarter __attribute__((vector_size(16)));
  union { vf whole; quarter parts[W / 4]; } lanes = {x};
  quarter sum = lanes.parts[0];
  for (int i = 1; i < W / 4; i++) sum += lanes.parts[i];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);  // not one after the other: each would wait for the last
}

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
constexpr float LEAST = -127.0f;  // 2^this is nothing at all to exp2

// 2^x for x from LEAST to 0, within 1e-7, and zero at LEAST; what is no number stays so
INLINE vf exp2(vf x) {
  const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it leaves the whole part in the low bits
  vf shifted = x + magic;
  vf f = x - (shifted - magic);
  vf y = all(0.00015345810970757157f);
  y = y * f + 0.0013399930903688073f;
  y = y * f + 0.009618489071726799f;
  y = y * f + 0.05550328642129898f;
  y = y * f + 0.24022646248340607f;
  y = y * f + 0.6931471824645996f;
  y = y * f + 1.0f;
  union { vf f; vi i; } bits = {shifted};
  bits.i = (bits.i << 23) + 0x3f800000;
  return y * bits.f;
}

// Scores, times LOG2E, bounded: softcap * tanh(score / softcap), from an exponential that cannot overflow.
INLINE vf capped(vf x, float softcap) {
  vf size = x < vf{} ? -x : x;
  vf small = exp2(greater(size * (-2.0f / softcap), all(LEAST)));
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

// What a weight over one maximum is multiplied with to be over a later one; both may be minus infinity.
INLINE float lowered(float before, float now) {
  return before == now ? 1.0f : before - now < -126.0f ? 0.0f : std::exp2(before - now);
}

// A score of queries and keys that were not scaled before, or as it is; rounded, so that the greatest stays the greatest.
template <class X>
INLINE X scaled(X x, [[maybe_unused]] float times) {
#ifdef TILES
  x = x * times;
  asm("" : "+v"(x));  // or the compiler takes the product into what is done next, and rounds once for both
#endif
  return x;
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
// A vector rounded to bfloat16.
INLINE void store(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
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

// What a thread must have before products of a type, and gives back.
template <class E>
struct Registers {};

template <class E, class T>
INLINE E as(T x) {
  if constexpr (DEEP<E> == 1) return number(x);
  else return x;
}
