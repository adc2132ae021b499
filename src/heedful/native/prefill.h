// Attention of many queries: keys and values are packed, then threads take block after block. Included after block.h.

template <class E>
void prefill_of(const Problem &p) {
  Sizes s(p, HIGH<E>, STEP<E>);
  static thread_local Floats packed;  // kept between calls: touching fresh memory costs more than packing
  int64_t pairs = p.batch * p.kv_heads, per_keys = s.packed_keys(), per_values = s.packed_values();
  int64_t both = pairs * (per_keys + per_values), size = both / DEEP<E> + p.batch * s.packed_carry();
  if ((int64_t)packed.size() < size) packed.resize(size);
  E *keys = (E *)packed.data(), *values = keys + pairs * per_keys;
  float *carry = packed.data() + both / DEEP<E>;
  // what each unit's weights carried; units are added up in order, as blocks are: threads change no bit of a sum
  static thread_local std::vector<float> carried_;
  int64_t per_carried = p.carry ? p.batch * p.queries * p.carry_width : 0;
  if ((int64_t)carried_.size() < s.units * per_carried) carried_.resize(s.units * per_carried);
  float *carried = carried_.data();
  int64_t each = p.batch * s.units;
  std::atomic<int64_t> next = 0;
  std::vector<std::atomic<int64_t>> added(each);  // how many blocks of each unit
#pragma omp parallel num_threads((int)p.threads)
  {
    static thread_local Desk desk;
    [[maybe_unused]] Registers<E> registers;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs * s.panels; i++) {
      int64_t pair = i / s.panels, panel = i % s.panels, b = pair / p.kv_heads, g = pair % p.kv_heads;
      E *k = keys + pair * per_keys + panel * NR * s.depth, *v = values + pair * per_values;
      auto pack = [&]<class T>(T) { pack_keys<E, T>(p, s, b, g, panel, k), pack_values<E, T>(p, s, b, g, panel, v); };
      if constexpr (DEEP<E> > 1)
        pack(E{});
      else if (p.bfloat16)
        pack(uint16_t{});
      else
        pack(0.0f);
      if (p.carry && g == 0)
        pack_rows<float, float>(p, s, p.carry + b * p.keys * p.carry_width, p.carry_width, p.carry_width, panel,
                         carry + b * s.packed_carry());
    }
    // Blocks are taken in order, dearest first: whoever waits to add his waits for one that is being computed.
    for (int64_t i; (i = next.fetch_add(1)) < each * s.blocks;) {
      int64_t number = i / each, row0 = (s.blocks - 1 - number) * s.rows, b = i % each / s.units, unit = i % s.units;
      int64_t n = std::min(s.rows, p.queries - row0), pair = b * p.kv_heads + unit * s.stacked * p.kv_heads / p.heads;
      Block<E> block{p, s, desk, b, unit, row0, n, n * s.stacked, keys + pair * per_keys, values + pair * per_values,
                  carry + b * s.packed_carry()};
      block.compute();
      if (p.carry)
        for (int64_t r = 0; r < n; r++)
          std::copy_n(desk.mixed.data() + r * s.carry_panels * NR, p.carry_width,
                      carried + unit * per_carried + (b * p.queries + row0 + r) * p.carry_width);
      if (!p.received && !p.distance) continue;
      while (added[i % each].load(std::memory_order_acquire) < number) std::this_thread::yield();
      block.add();
      added[i % each].store(number + 1, std::memory_order_release);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < per_carried; i++)
      for (int64_t unit = 0; unit < s.units; unit++) p.carried[i] += carried[unit * per_carried + i];
  }
}

void prefill(const Problem &p) {
#ifdef PAIRS
  if (p.bfloat16 && !p.exact) return prefill_of<uint16_t>(p);
#endif
#ifdef TILES
  avx512bf16::prefill(p);
#else
  prefill_of<float>(p);
#endif
}
