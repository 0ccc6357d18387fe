// AdamW on states of one byte per element, one range of blocks; included once per variant.
//
// The step itself is that of adamw4.h, in the same order of operations. Two forms of a byte:
// `Dynamic` (codes of dynamic-exponent maps, computed instead of looked up: a level is a small
// integer over a power of ten) and `Expanded` (E4M3 of (|x| / max)^k with a k for each block).

// Eight numbers by index; indices must be below 8.
#if HOLDFAST_WIDTH == 16

inline Table table8(const float* x) { return _mm512_castps256_ps512(_mm256_loadu_ps(x)); }
inline F look8(Table t, I i) { return _mm512_permutexvar_ps((__m512i)i, t); }
inline U higher(U a, U b) { return (U)_mm512_max_epu32((__m512i)a, (__m512i)b); }
inline I unless_zero(F y, I x) {
  return (I)_mm512_maskz_mov_epi32(_mm512_test_epi32_mask((__m512i)y, (__m512i)y), (__m512i)x);
}

// The number of seven rising bounds that lie below y.
struct Eight {
  F middle, low, high;
  Table even;
  explicit Eight(const float* bounds)
      : middle(set(bounds[3])), low(set(bounds[1])), high(set(bounds[5])), even(table8(bounds)) {}
  I operator()(F y) const {
    __mmask16 k = _mm512_cmp_ps_mask(y, middle, _CMP_GT_OQ);
    __m512i i = _mm512_maskz_set1_epi32(k, 4);
    k = _mm512_cmp_ps_mask(y, _mm512_mask_blend_ps(k, low, high), _CMP_GT_OQ);
    i = _mm512_mask_add_epi32(i, k, i, _mm512_set1_epi32(2));
    k = _mm512_cmp_ps_mask(y, _mm512_permutexvar_ps(i, even), _CMP_GT_OQ);
    return (I)_mm512_mask_add_epi32(i, k, i, _mm512_set1_epi32(1));
  }
};

// 128 numbers by the low 7 bits of an index.
struct Row {
  Table x[8];
  explicit Row(const float* row) {
    for (int i = 0; i < 8; ++i) x[i] = load(row + 16 * i);
  }
  F operator()(I code) const {
    __m512i c = (__m512i)code;
    __mmask16 bit5 = _mm512_test_epi32_mask(c, _mm512_set1_epi32(32));
    __mmask16 bit6 = _mm512_test_epi32_mask(c, _mm512_set1_epi32(64));
    F low = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(x[0], c, x[1]),
                                 _mm512_permutex2var_ps(x[2], c, x[3]));
    F high = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(x[4], c, x[5]),
                                  _mm512_permutex2var_ps(x[6], c, x[7]));
    return _mm512_mask_blend_ps(bit6, low, high);
  }
};

#elif HOLDFAST_WIDTH == 8

typedef __m256 Table8;
inline Table8 table8(const float* x) { return load(x); }
inline F look8(Table8 t, I i) { return _mm256_permutevar8x32_ps(t, (__m256i)i); }
inline U higher(U a, U b) { return (U)_mm256_max_epu32((__m256i)a, (__m256i)b); }
inline I unless_zero(F y, I x) { return x & (I)(y != set(0)); }

struct Eight {
  F middle, low, high;
  Table8 even;
  explicit Eight(const float* bounds)
      : middle(set(bounds[3])), low(set(bounds[1])), high(set(bounds[5])), even(table8(bounds)) {}
  I operator()(F y) const {
    F k = _mm256_cmp_ps(y, middle, _CMP_GT_OQ);
    I i = (I)k & 4;
    i += (I)_mm256_cmp_ps(y, _mm256_blendv_ps(low, high, k), _CMP_GT_OQ) & 2;
    return i - (I)_mm256_cmp_ps(y, look8(even, i), _CMP_GT_OQ);
  }
};

struct Row {
  const float* x;
  explicit Row(const float* row) : x(row) {}
  F operator()(I code) const { return _mm256_i32gather_ps(x, (__m256i)(code & 127), 4); }
};

#else

inline Table table8(const float* x) { return {x}; }
inline F look8(Table t, I i) { return look(t, i); }
inline U higher(U a, U b) { return (U)pick((I)(a > b), (I)a, (I)b); }
inline I unless_zero(F y, I x) { return x & (I)(y != set(0)); }

struct Eight {
  const float* bounds;
  explicit Eight(const float* b) : bounds(b) {}
  I operator()(F y) const {
    I i = {};
    for (int k = 0; k < 7; ++k) i -= y > set(bounds[k]);
    return i;
  }
};

struct Row {
  const float* x;
  explicit Row(const float* row) : x(row) {}
  F operator()(I code) const {
    const I c = code & 127;
    return F{x[c[0]], x[c[1]], x[c[2]], x[c[3]]};
  }
};

#endif

inline F real(I x) { return __builtin_convertvector(x, F); }
inline I whole(F x) { return __builtin_convertvector(x, I); }

struct Dynamic {
  // What a block needs besides its largest magnitude: nothing.
  struct Least {
    void take(F) {}
  };

  // The rising codes of one moment; `S` says whether it has a sign.
  template <bool S>
  struct Moment {
    const DynamicTable& t;
    alignas(64) float fold[16];

    Moment(const Bytes& job, int64_t b) : t(job.dynamic[S ? 0 : 1]) {
      float fade = S ? job.m_scale[b] * job.b1 : job.v_scale[b] * job.b2;
      for (int e = 0; e < 16; ++e) fold[e] = fade / t.denominator[e];
    }

    struct Decode {
      Table offset, fold;
      F operator()(const uint8_t* c) const {
        I code = codes(c);
        I d = S ? code - 127 : code + 1;
        F x = real(d), n = x;
        if (S) {
          n = magnitude(x);
          n = n + n + set(1);
        }
        I e = (I)n >> 23;
        F level = (n * set(18) + look(offset, e)) * look(fold, e);
        return S ? (F)((I)level | ((I)x & (int)0x80000000)) : level;
      }
    };
    Decode decode() const { return {table(t.offset), table(fold)}; }

    struct Encode {
      const F inverse, top;
      const Eight decade;
      const decltype(table8(nullptr)) slope, start, last;

      Encode(const DynamicTable& t, float scale)
          : inverse(set(reciprocal(scale))), top(set(t.bounds[7])), decade(t.bounds),
            slope(table8(t.slope)), start(table8(t.start)), last(table8(t.last)) {}

      void operator()(F x, uint8_t* out) const {
        F y = bits_min(magnitude(x * inverse), set(1));
        I r = decade(y);
        I n = whole(bits_min(y * look8(slope, r) + look8(start, r), look8(last, r)));
        I largest = (I)(y > top);
        if (S) {
          I sign = (I)x >> 31;
          n -= largest & ~sign;
          store_codes(out, ((n ^ sign) - sign) + 127);
        } else {
          store_codes(out, pick(largest, seti(255), n - 1));
        }
      }
    };
  };

  typedef Moment<true> M;
  typedef Moment<false> V;

  struct Finished { float m, v; };

  static Finished finish(const Bytes& job, int64_t b, F top_m, F top_v, Least, Least) {
    return {job.m_scale[b] = top(top_m), job.v_scale[b] = top(top_v)};
  }
  static M::Encode encode_m(const Bytes& job, Finished f) { return {job.dynamic[0], f.m}; }
  static V::Encode encode_v(const Bytes& job, Finished f) { return {job.dynamic[1], f.v}; }
};

struct Expanded {
  // The smallest magnitude that is not zero, or zero.
  struct Least {
    U least = {};
    // The negative of zero is the smallest unsigned number, that of the smallest bits the largest.
    void take(F x) { least = higher(least, -(U)x); }
    float value() const { return ::value(-bits(top(magnitude((F)least))) & 0x7fffffff); }
  };

  // log2 of positive normal numbers to 2e-5, exactly 0 at 1.
  static F log2(F x) {
    I b = (I)x, e = (b - 0x3f3504f3) >> 23;
    F t = (F)(b - (e << 23)) - set(1);
    F q = set(0.2526601254940033f);
    q = q * t + set(-0.3945753872394562f);
    q = q * t + set(0.48668617010116577f);
    q = q * t + set(-0.7202417850494385f);
    q = q * t + set(1.4425779581069946f);
    return q * t + real(e);
  }

  template <bool S>
  struct Moment {
    const Bytes& job;
    const int64_t b;

    Moment(const Bytes& j, int64_t block) : job(j), b(block) {}

    struct Decode {
      Row row;
      F fade;
      F operator()(const uint8_t* c) const {
        I code = codes(c);
        F x = row(code) * fade;
        return S ? (F)((I)x | ((code & 128) << 24)) : x;
      }
    };
    Decode decode() const {
      const uint8_t power = (S ? job.m_power : job.v_power)[b];
      float fade = S ? job.m_scale[b] * job.b1 : job.v_scale[b] * job.b2;
      return {Row(job.levels + 128 * power), set(fade)};
    }

    struct Encode {
      const F k, top;

      void operator()(F x, uint8_t* out) const {
        F y = magnitude(x), shift = set(0x1.8p23f);
        F z = (log2(y) - top) * k, n = z + shift, t = z - (n - shift);
        F q = set(4.293118000030518f);
        q = q * t + set(25.046077728271484f);
        q = q * t + set(107.62796020507812f);
        q = q * t + set(310.5196533203125f);
        // 448 * 2^z: the whole part of z goes to the exponent.
        I f = (I)(q * t + set(448)) + (I)((U)(I)n << 23);
        // Below 2^-6 codes are linear, as those between 2^-6 and 2^-5 are.
        I small = (f - 0x3c800000) >> 31;
        I h = (I)((F)f + (F)(small & 0x3c800000));
        I code = ((h + (0x80000 - (120 << 23))) >> 20) + (small & -8);
        code = (I)bits_min(bits_max((F)code, (F)seti(1)), (F)seti(126));
        code = unless_zero(y, code);
        store_codes(out, S ? code | ((I)((U)(I)x >> 24) & 128) : code);
      }
    };
  };

  typedef Moment<true> M;
  typedef Moment<false> V;

  struct Finished { float m_k, m_top, v_k, v_top; };

  static Finished finish(const Bytes& job, int64_t b, F top_m, F top_v, Least low_m, Least low_v) {
    float ends[W] = {top(top_m), low_m.value(), top(top_v), low_v.value()}, logs[W];
    job.m_scale[b] = ends[0];
    job.v_scale[b] = ends[2];
    store(logs, log2(load(ends)));
    const int m_power = power(logs[0], logs[1]), v_power = power(logs[2], logs[3]);
    job.m_power[b] = (uint8_t)(m_power - 1);
    job.v_power[b] = (uint8_t)(v_power - 1);
    return {m_power * 0.0625f, logs[0], v_power * 0.0625f, logs[2]};
  }
  static M::Encode encode_m(const Bytes&, Finished f) { return {set(f.m_k), set(f.m_top)}; }
  static V::Encode encode_v(const Bytes&, Finished f) { return {set(f.v_k), set(f.v_top)}; }

  static int power(float high, float low) {
    float spread = SIXTEENTHS / (high - low);
    // Also where the block is constant (infinity) or not finite.
    return spread < 256 ? std::max(1, (int)spread) : 256;
  }
};

template <class P, class G, class Form>
struct ByteKernel {
  // A block whose new moments are not yet written as bytes.
  struct Pending {
    alignas(64) float m[LONGEST], v[LONGEST];
    uint8_t *m_code, *v_code;
    int count;
    typename Form::Finished finished;
  };

  static void update(const Bytes& job, int64_t b, P* p, const G* g, Pending& out) {
    const typename Form::M mf(job, b);
    const typename Form::V vf(job, b);
    const auto decode_m = mf.decode();
    const auto decode_v = vf.decode();
    const F c1 = set(job.c1), c2 = set(job.c2), decay = set(job.decay), step = set(-job.step),
            root2 = set(job.root2), eps = set(job.eps);
    F top_m = set(0), top_v = set(0);
    typename Form::Least low_m, low_v;
    for (int i = 0; i < out.count; i += W) {
      F x = load(g + i);
      F m = decode_m(out.m_code + i) + c1 * x;
      F v = decode_v(out.v_code + i) + c2 * (x * x);
      F moved = load(p + i) * decay + (step * m) / (root(v) * root2 + eps);
      store(p + i, moved);
      F size = magnitude(m);
      top_m = bits_max(top_m, size);
      top_v = bits_max(top_v, magnitude(v));
      low_m.take(size);
      low_v.take(v);
      store(out.m + i, m);
      store(out.v + i, v);
    }
    out.finished = Form::finish(job, b, top_m, top_v, low_m, low_v);
  }

  static void write(const Bytes& job, const Pending& from) {
    const auto m = Form::encode_m(job, from.finished);
    const auto v = Form::encode_v(job, from.finished);
    for (int i = 0; i < from.count; i += W) {
      m(load(from.m + i), from.m_code + i);
      v(load(from.v + i), from.v_code + i);
    }
  }

  static void run(const Bytes& job, int64_t first, int64_t last) {
    // One block behind, so that the long chain from maxima to factors overlaps with the next block.
    Pending two[2];
    Pending* before = nullptr;
    const int64_t whole = std::min(last, job.n / job.block);
    for (int64_t b = first; b < whole; ++b) {
      const int64_t at = b * job.block;
      Pending& now = two[b & 1];
      now.m_code = job.m_code + at;
      now.v_code = job.v_code + at;
      now.count = job.block;
      update(job, b, (P*)job.p + at, (const G*)job.g + at, now);
      if (before) write(job, *before);
      before = &now;
    }
    if (before) write(job, *before);
    if (whole < last) ragged(job, whole, two[0]);
  }

  // The last block as a padded copy of whole vectors.
  static void ragged(const Bytes& job, int64_t b, Pending& now) {
    const int64_t at = b * job.block, left = job.n - at;
    P copy_p[LONGEST] = {}, *p = (P*)job.p + at;
    G copy_g[LONGEST] = {};
    const G* g = (const G*)job.g + at;
    uint8_t copy_m[LONGEST], copy_v[LONGEST], *m = job.m_code + at, *v = job.v_code + at;
    std::fill(copy_m, copy_m + LONGEST, job.m_zero);
    std::fill(copy_v, copy_v + LONGEST, (uint8_t)0);
    std::copy(p, p + left, copy_p);
    std::copy(g, g + left, copy_g);
    std::copy(m, m + left, copy_m);
    std::copy(v, v + left, copy_v);
    now.m_code = copy_m;
    now.v_code = copy_v;
    now.count = (int)((left + 15) / 16 * 16);
    update(job, b, copy_p, copy_g, now);
    write(job, now);
    std::copy(copy_p, copy_p + left, p);
    std::copy(copy_m, copy_m + left, m);
    std::copy(copy_v, copy_v + left, v);
  }
};

template <class P, class G>
ByteRange byte_range_of(bool expanded) {
  return expanded ? ByteKernel<P, G, Expanded>::run : ByteKernel<P, G, Dynamic>::run;
}

inline ByteRange adamw8(bool p_bf16, bool g_bf16, bool expanded) {
  if (p_bf16)
    return g_bf16 ? byte_range_of<bf16, bf16>(expanded) : byte_range_of<bf16, float>(expanded);
  return g_bf16 ? byte_range_of<float, bf16>(expanded) : byte_range_of<float, float>(expanded);
}
