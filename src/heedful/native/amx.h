// Products of bfloat16 in AMX tiles: 16 rows of 64 bytes each, of which eight are a thread's registers. Two by two of them
// hold the sums of 32 rows and of a panel's 32 columns. Included after tile.h.

template <>
constexpr int HIGH<uint16_t> = 32;
template <>
constexpr int64_t STEP<uint16_t> = 32;
template <>
constexpr bool UNSCALED<uint16_t> = true;
template <>
constexpr int64_t AT_A_TIME<uint16_t> = 32;

template <>
struct Registers<uint16_t> {
  Registers() {
    static const struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } sizes;
    _tile_loadconfig(&sizes);
  }
  ~Registers() { _tile_release(); }
  Registers(const Registers &) = delete;
};

#ifdef __SANITIZE_ADDRESS__
// No sanitizer sees what tiles touch: here it does.
INLINE void touch(const void *from, int64_t stride) {
  for (int r = 0; r < 16; r++)
    for (int i : {0, 63}) (void)*((const volatile char *)from + r * stride + i);
}
#else
INLINE void touch(const void *, int64_t) {}
#endif

// c[32][32] = a[32][n] b[n][32], or added to it: exact products of pairs, added up in float32. b is [n/2][32][2]; of an n
// that is no multiple of 32 so many more are taken. Nothing is scaled.
template <bool ADD>
INLINE void product(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t n, float *c, int64_t ldc, float) {
  static_assert(NR == 32);
  const int64_t across = 2 * lda, down = 4 * NR, to = 4 * ldc;  // bytes from row to row
  float *low = c + 16 * ldc;
  asm volatile("" ::: "memory");  // older compilers do not know that a tile is read from memory
  if constexpr (ADD) {
    touch(c, to), touch(c + 16, to), touch(low, to), touch(low + 16, to);
    _tile_loadd(0, c, to);
    _tile_loadd(1, c + 16, to);
    _tile_loadd(2, low, to);
    _tile_loadd(3, low + 16, to);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < n; i += 32) {
    const uint16_t *upper = a + i, *lower = upper + 16 * lda, *left = b + i * NR, *right = left + 32;
    touch(upper, across), touch(lower, across), touch(left, down), touch(right, down);
    _tile_loadd(4, upper, across);
    _tile_loadd(6, left, down);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right, down);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, across);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  touch(c, to), touch(c + 16, to), touch(low, to), touch(low + 16, to);
  _tile_stored(0, c, to);
  _tile_stored(1, c + 16, to);
  _tile_stored(2, low, to);
  _tile_stored(3, low + 16, to);
}
