// Packed codes of 1 to 4 bits, and what is read through them; included once per variant.
//
// Codes are squeezed eight at a time within a 64-bit word, which the compiler turns into vector code
// of the variant; comparisons and look-ups use its lanes.

// Elements that are worked on at a time, in L1; a multiple of 8, so that every tile begins on a byte.
constexpr int TILE = 2048;

// The low `field` bits of every `every` bits.
constexpr uint64_t every(int every, int field) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += every) mask |= ((uint64_t(1) << field) - 1) << at;
  return mask;
}

// Eight codes, one per byte -> their 8 * B bits: pairs, then fours, then all.
template <int B>
inline uint64_t squeeze(uint64_t w) {
  w = (w | w >> (8 - B)) & every(16, 2 * B);
  w = (w | w >> (16 - 2 * B)) & every(32, 4 * B);
  return (w | w >> (32 - 4 * B)) & every(64, 8 * B);
}

// The inverse.
template <int B>
inline uint64_t spread(uint64_t w) {
  w = (w | w << (32 - 4 * B)) & every(32, 4 * B);
  w = (w | w << (16 - 2 * B)) & every(16, 2 * B);
  return (w | w << (8 - B)) & every(8, B);
}

// What eight codes take; three bytes have no type.
template <int B> struct Word { typedef uint32_t type; };
template <> struct Word<1> { typedef uint8_t type; };
template <> struct Word<2> { typedef uint16_t type; };

// Words that are squeezed together, so that the compiler finds vectors.
constexpr int RUN = 32;

template <int B>
void pack(const uint8_t* codes, uint8_t* out, int64_t n) {
  int64_t i = 0;
  for (; 8 * (i + RUN) <= n; i += RUN) {
    uint64_t w[RUN];
    std::memcpy(w, codes + 8 * i, sizeof w);
    if constexpr (B == 3) {
      uint64_t pairs[RUN / 2];
      for (int k = 0; k < RUN / 2; ++k)
        pairs[k] = squeeze<B>(w[2 * k]) | squeeze<B>(w[2 * k + 1]) << 24;
      // Whole words reach into the bytes of the next pair, but never into another tile's.
      uint8_t* to = out + B * i;
      for (int k = 0; k < RUN / 2 - 1; ++k) std::memcpy(to + 2 * B * k, pairs + k, 8);
      std::memcpy(to + B * (RUN - 2), pairs + RUN / 2 - 1, 2 * B);
    } else {
      typename Word<B>::type words[RUN];
      for (int k = 0; k < RUN; ++k) words[k] = (typename Word<B>::type)squeeze<B>(w[k]);
      std::memcpy(out + B * i, words, sizeof words);
    }
  }
  for (; 8 * i < n; ++i) {
    const int count = (int)std::min<int64_t>(8, n - 8 * i);
    uint64_t w = 0;
    std::memcpy(&w, codes + 8 * i, count);
    w = squeeze<B>(w);
    std::memcpy(out + B * i, &w, (count * B + 7) / 8);
  }
}

template <int B>
void unpack(const uint8_t* packed, uint8_t* out, int64_t n) {
  int64_t i = 0;
  for (; 8 * (i + RUN) <= n; i += RUN) {
    typename Word<B>::type words[RUN] = {};
    uint64_t w[RUN];
    const uint8_t* from = packed + B * i;
    if constexpr (B == 3) {
      for (int k = 0; k < RUN - 1; ++k) std::memcpy(words + k, from + B * k, 4);
      std::memcpy(words + RUN - 1, from + B * (RUN - 1), B);
    } else {
      std::memcpy(words, from, sizeof words);
    }
    for (int k = 0; k < RUN; ++k) w[k] = spread<B>(words[k] & every(64, 8 * B));
    std::memcpy(out + 8 * i, w, sizeof w);
  }
  for (; 8 * i < n; ++i) {
    const int count = (int)std::min<int64_t>(8, n - 8 * i);
    uint64_t w = 0;
    std::memcpy(&w, packed + B * i, (count * B + 7) / 8);
    w = spread<B>(w);
    std::memcpy(out + 8 * i, &w, count);
  }
}

// The number of bounds below x; NaN is above none.
template <int B>
struct Steps {
  Search search;
  explicit Steps(const float* bounds) : search(bounds) {}
  I operator()(F x) const { return search(x); }
};
template <>
struct Steps<1> {
  F bound;
  explicit Steps(const float* bounds) : bound(set(bounds[0])) {}
  I operator()(F x) const { return (I)(x > bound) & 1; }
};
template <>
struct Steps<2> {
  F low, middle, high;
  explicit Steps(const float* bounds)
      : low(set(bounds[0])), middle(set(bounds[1])), high(set(bounds[2])) {}
  I operator()(F x) const {
    return -((I)(x > low) + (I)(x > middle) + (I)(x > high));
  }
};

template <class X>
inline F signless(const X* x, bool even) {
  return even ? magnitude(load(x)) : load(x);
}

template <class X, int B>
void steps_of(const Stepped& job, int64_t start, int64_t n) {
  const Steps<B> steps(job.table);
  const X* x = (const X*)job.x + start;
  alignas(64) uint8_t codes[TILE + W];
  int64_t i = 0;
  for (; i + W <= n; i += W) store_codes(codes + i, steps(signless(x + i, job.even)));
  if (i < n) {
    X rest[W] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(X));
    store_codes(codes + i, steps(signless(rest, job.even)));
  }
  pack<B>(codes, job.packed + start / 8 * B, n);
}

// Codes i .. i + W - 1 of a stream, i a multiple of W; up to 8 bytes beyond them are read.
template <int B>
struct Fields {
  U shift;
  I upper;
  Fields() {
    for (int l = 0; l < W; ++l) {
      shift[l] = l % 8 * B;
      upper[l] = l < 8 ? 0 : -1;
    }
  }
  I operator()(const uint8_t* packed, int64_t i) const {
    uint32_t word, next;
    std::memcpy(&word, packed + i / 8 * B, 4);
    I words = seti(word);
    if (W < 8) words = (I)((U)words >> (unsigned)(i % 8 * B));
    if (W > 8) {
      std::memcpy(&next, packed + i / 8 * B + B, 4);
      words = pick(upper, seti(next), words);
    }
    return (I)((U)words >> shift) & ((1 << B) - 1);
  }
};

template <class X, int B>
void levels_times(const Stepped& job, int64_t start, int64_t n) {
  const Table levels = table(job.table);
  const Fields<B> fields;
  const X* gy = (const X*)job.x + start;
  X* gx = (X*)job.out + start;
  uint8_t packed[TILE * B / 8 + 2 * W];
  std::memcpy(packed, job.packed + start / 8 * B, (n * B + 7) / 8);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(gx + i, look(levels, fields(packed, i)) * load(gy + i));
  if (i < n) {
    X rest[W] = {};
    std::memcpy(rest, gy + i, (n - i) * sizeof(X));
    store(rest, look(levels, fields(packed, i)) * load(rest));
    std::memcpy(gx + i, rest, (n - i) * sizeof(X));
  }
}

// Rows of affine groups -> fp32: (code - zero) * scale.
template <int B>
void affine_rows(const Affine& job, int64_t first, int64_t last) {
  alignas(64) uint8_t code[TILE + W];
  const int64_t columns = job.groups * job.group;
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* packed = job.codes + row * job.stride;
    float* out = job.out + row * columns;
    for (int64_t start = 0; start < columns; start += TILE) {
      const int64_t stop = std::min<int64_t>(columns, start + TILE);
      if constexpr (B < 8) unpack<B>(packed + start / 8 * B, code, stop - start);
      else std::memcpy(code, packed + start, stop - start);
      for (int64_t at = start; at < stop;) {
        const int64_t k = row * job.groups + at / job.group;
        const int64_t end = std::min(stop, (at / job.group + 1) * job.group);
        const float zero = job.zero ? (float)job.zero[k] : job.middle, scale = job.scale[k];
        const uint8_t* from = code + (at - start);
        for (int64_t i = 0; i < end - at; ++i) out[at + i] = ((float)from[i] - zero) * scale;
        at = end;
      }
    }
  }
}

template <class X>
Tiles tiles_of(bool backward, int bits) {
  switch (bits) {
    case 1: return backward ? levels_times<X, 1> : steps_of<X, 1>;
    case 2: return backward ? levels_times<X, 2> : steps_of<X, 2>;
    case 3: return backward ? levels_times<X, 3> : steps_of<X, 3>;
    default: return backward ? levels_times<X, 4> : steps_of<X, 4>;
  }
}

inline Tiles tiles(bool bf16_, bool backward, int bits) {
  return bf16_ ? tiles_of<bf16>(backward, bits) : tiles_of<float>(backward, bits);
}

inline Rewrite rewrite(bool unpacking, int bits) {
  switch (bits) {
    case 1: return unpacking ? unpack<1> : pack<1>;
    case 2: return unpacking ? unpack<2> : pack<2>;
    case 3: return unpacking ? unpack<3> : pack<3>;
    default: return unpacking ? unpack<4> : pack<4>;
  }
}

inline AffineRows affine(int bits) {
  switch (bits) {
    case 2: return affine_rows<2>;
    case 3: return affine_rows<3>;
    case 4: return affine_rows<4>;
    default: return affine_rows<8>;
  }
}
