// Lanes: the few vector operations the kernels need, for AVX-512, AVX2 and any other CPU.
//
// Every operation rounds as IEEE 754 says and nothing is contracted (-ffp-contract=off), so that the
// variants give bitwise equal results. Maxima are taken over the bits of non-negative floats: integer
// order is float order there, NaN ranks above inf, and the order of reduction cannot matter.
//
// Included once per variant, inside a namespace and a `#pragma GCC target` region.

#if HOLDFAST_WIDTH == 16

constexpr int W = 16;
typedef __m512 F;
typedef int I __attribute__((vector_size(64)));
typedef __m512 Table;

inline F load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, F v) { _mm512_storeu_ps(x, v); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline I seti(int x) { return (I)_mm512_set1_epi32(x); }
inline F root(F x) { return _mm512_sqrt_ps(x); }
inline F bits_max(F a, F b) { return (F)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline F bits_min(F a, F b) { return (F)_mm512_min_epi32((__m512i)a, (__m512i)b); }
inline I codes(const uint8_t* c) {
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)c));
}
inline void store_codes(uint8_t* c, I v) {
  _mm_storeu_si128((__m128i*)c, _mm512_cvtepi32_epi8((__m512i)v));
}
inline Table table(const float* x) { return load(x); }
inline F look(Table t, I code) { return _mm512_permutexvar_ps((__m512i)code, t); }
inline I ceiling(F x) {
  return (I)_mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}
inline I positive(I x) { return (I)_mm512_max_epi32((__m512i)x, _mm512_setzero_si512()); }
inline F load(const bf16* x) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
}
inline void store_high(bf16* x, I v) {
  _mm256_storeu_si256((__m256i*)x, _mm512_cvtepi32_epi16((__m512i)v));
}
inline I pick(I mask, I a, I b) {
  return (I)_mm512_mask_blend_epi32(_mm512_movepi32_mask((__m512i)mask), (__m512i)b, (__m512i)a);
}
inline I is_nan(F x) {
  return (I)_mm512_movm_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
}

inline float top(F x) { return value(_mm512_reduce_max_epi32((__m512i)x)); }

// The number of midpoints below x, by bisection: `mid` has 15 of them in rising order.
struct Search {
  F middle, low, high;
  Table odd, even;
  explicit Search(const float* mid)
      : middle(set(mid[7])), low(set(mid[3])), high(set(mid[11])), odd(load(mid + 1)),
        even(load(mid)) {}
  I operator()(F x) const {
    __mmask16 k = _mm512_cmp_ps_mask(x, middle, _CMP_GT_OQ);
    __m512i i = _mm512_maskz_set1_epi32(k, 8);
    k = _mm512_cmp_ps_mask(x, _mm512_mask_blend_ps(k, low, high), _CMP_GT_OQ);
    i = _mm512_mask_add_epi32(i, k, i, _mm512_set1_epi32(4));
    k = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(i, odd), _CMP_GT_OQ);
    i = _mm512_mask_add_epi32(i, k, i, _mm512_set1_epi32(2));
    k = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(i, even), _CMP_GT_OQ);
    return (I)_mm512_mask_add_epi32(i, k, i, _mm512_set1_epi32(1));
  }
};

#elif HOLDFAST_WIDTH == 8

constexpr int W = 8;
typedef __m256 F;
typedef int I __attribute__((vector_size(32)));
struct Table { F low, high; };

inline F load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* x, F v) { _mm256_storeu_ps(x, v); }
inline F set(float x) { return _mm256_set1_ps(x); }
inline I seti(int x) { return (I)_mm256_set1_epi32(x); }
inline F root(F x) { return _mm256_sqrt_ps(x); }
inline F bits_max(F a, F b) { return (F)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline F bits_min(F a, F b) { return (F)_mm256_min_epi32((__m256i)a, (__m256i)b); }
inline I codes(const uint8_t* c) {
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)c));
}
inline void store_codes(uint8_t* c, I v) {
  __m128i w = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v),
                               _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)c, _mm_packus_epi16(w, w));
}
inline Table table(const float* x) { return {load(x), load(x + 8)}; }
inline F look(Table t, I code) {
  F low = _mm256_permutevar8x32_ps(t.low, (__m256i)code);
  F high = _mm256_permutevar8x32_ps(t.high, (__m256i)code);
  return _mm256_blendv_ps(low, high, (F)_mm256_slli_epi32((__m256i)code, 28));
}
inline I ceiling(F x) { return (I)_mm256_cvtps_epi32(_mm256_ceil_ps(x)); }
inline I positive(I x) { return (I)_mm256_max_epi32((__m256i)x, _mm256_setzero_si256()); }
inline F load(const bf16* x) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16);
}
inline void store_high(bf16* x, I v) {
  _mm_storeu_si128((__m128i*)x, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v),
                                                 _mm256_extracti128_si256((__m256i)v, 1)));
}
inline I pick(I mask, I a, I b) {
  return (I)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)mask);
}
inline I is_nan(F x) { return (I)_mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
inline float top(F x) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x),
                            _mm256_extracti128_si256((__m256i)x, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return value(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}

struct Search {
  F middle, low, high, odd, even;
  explicit Search(const float* mid)
      : middle(set(mid[7])), low(set(mid[3])), high(set(mid[11])) {
    // A permutation sees the three low bits of i / 2, hence every second midpoint.
    float every[8], other[8];
    for (int i = 0; i < 8; ++i) {
      every[i] = mid[2 * i];
      other[i] = mid[2 * (i & ~1) + 1];
    }
    even = load(every);
    odd = load(other);
  }
  I operator()(F x) const {
    F k = _mm256_cmp_ps(x, middle, _CMP_GT_OQ);
    I i = (I)k & 8;
    F t = _mm256_blendv_ps(low, high, k);
    i += (I)_mm256_cmp_ps(x, t, _CMP_GT_OQ) & 4;
    t = _mm256_permutevar8x32_ps(odd, (__m256i)(i >> 1));
    i += (I)_mm256_cmp_ps(x, t, _CMP_GT_OQ) & 2;
    t = _mm256_permutevar8x32_ps(even, (__m256i)(i >> 1));
    return i - (I)_mm256_cmp_ps(x, t, _CMP_GT_OQ);
  }
};

#else

constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int I __attribute__((vector_size(16)));
struct Table { const float* x; };

inline F load(const float* x) { F v; std::memcpy(&v, x, sizeof v); return v; }
inline void store(float* x, F v) { std::memcpy(x, &v, sizeof v); }
inline F set(float x) { return F{x, x, x, x}; }
inline I seti(int x) { return I{x, x, x, x}; }
inline F root(F x) { return F{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])}; }
inline I pick(I mask, I a, I b) { return (mask & a) | (~mask & b); }
inline F bits_max(F a, F b) { return (F)pick((I)a > (I)b, (I)a, (I)b); }
inline F bits_min(F a, F b) { return (F)pick((I)a < (I)b, (I)a, (I)b); }
inline I codes(const uint8_t* c) { return I{c[0], c[1], c[2], c[3]}; }
inline void store_codes(uint8_t* c, I v) { for (int i = 0; i < W; ++i) c[i] = (uint8_t)v[i]; }
inline Table table(const float* x) { return {x}; }
// Like the permutations of the others, it sees the low four bits of a code.
inline F look(Table t, I code) {
  const I c = code & 15;
  return F{t.x[c[0]], t.x[c[1]], t.x[c[2]], t.x[c[3]]};
}
// Only ever asked for what lies below 16; NaN and negatives give 0 through `positive`.
inline int up(float x) { return x > 0 ? (int)std::ceil(x) : 0; }
inline I ceiling(F x) { return I{up(x[0]), up(x[1]), up(x[2]), up(x[3])}; }
inline I positive(I x) { return pick(x > 0, x, I{}); }
inline F load(const bf16* x) { return (F)(I{x[0], x[1], x[2], x[3]} << 16); }
inline void store_high(bf16* x, I v) { for (int i = 0; i < W; ++i) x[i] = (bf16)v[i]; }
inline I is_nan(F x) { return x != x; }
inline float top(F x) {
  return value(std::max(std::max(bits(x[0]), bits(x[1])), std::max(bits(x[2]), bits(x[3]))));
}

struct Search {
  const float* mid;
  explicit Search(const float* m) : mid(m) {}
  I operator()(F x) const {
    I i = {};
    for (int k = 0; k < 15; ++k) i -= x > set(mid[k]);
    return i;
  }
};

#endif

typedef unsigned U __attribute__((vector_size(4 * W)));

inline F magnitude(F x) { return (F)((I)x & 0x7fffffff); }

// bf16 by rounding to nearest even; NaN becomes the one quiet NaN that torch writes.
inline void store(bf16* x, F v) {
  I b = (I)v, up = (I)((U)(b + 0x7fff + (I)((U)b >> 16 & 1)) >> 16);
  store_high(x, pick(is_nan(v), seti(0x7fc0), up));
}
