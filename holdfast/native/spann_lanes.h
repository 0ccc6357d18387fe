// The arithmetic of the disk index, included once per variant inside its namespace and target.
//
// Sums run over sixteen lanes whatever the width of the CPU's registers, and nothing is contracted,
// so that the variants give bitwise equal distances. Rows are padded to a multiple of sixteen.

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));

#if HOLDFAST_WIDTH == 16
inline F codes(const uint8_t* c) {
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)c)));
}
#elif HOLDFAST_WIDTH == 8
inline F codes(const uint8_t* c) {
  const __m256 half[2] = {
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)c))),
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(c + 8))))};
  F v;
  std::memcpy(&v, half, sizeof v);
  return v;
}
#else
inline F codes(const uint8_t* c) {
  F v;
  for (int i = 0; i < 16; ++i) v[i] = c[i];
  return v;
}
#endif

inline void load(F& v, const float* x) { std::memcpy(&v, x, sizeof v); }

// Sixteen lanes to four, always in this order.
inline F4 quarter(const F& v) {
  F8 a[2];
  std::memcpy(a, &v, sizeof a);
  a[0] += a[1];
  F4 b[2];
  std::memcpy(b, a, sizeof b);
  return b[0] + b[1];
}

inline float sum(const F& v) {
  const F4 a = quarter(v);
  return (a[0] + a[2]) + (a[1] + a[3]);
}

inline float distance(const float* q, const float* x, int d) {
  F total = {}, a, b;
  for (int j = 0; j < d; j += 16) {
    load(a, q + j);
    load(b, x + j);
    a -= b;
    total += a * a;
  }
  return sum(total);
}

void rows(const float* q, const float* x, int64_t n, int d, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = distance(q, x + i * d, d);
}

void gather(const float* q, const float* x, const uint32_t* which, int64_t n, int d, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = distance(q, x + (int64_t)which[i] * d, d);
}

// Squared distances to the codes of `n` entries, `size` bytes apart: sum of weight * (q - code)^2.
// Four at a time: one load of the query serves four, and their sums do not wait for each other.
void scan(const float* q, const float* weight, const uint8_t* list, int64_t n, int d, int64_t size,
          float* out) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const uint8_t* entry = list + i * size;
    F t0 = {}, t1 = {}, t2 = {}, t3 = {}, a, w;
    for (int j = 0; j < d; j += 16) {
      load(a, q + j);
      load(w, weight + j);
      const F x0 = a - codes(entry + j), x1 = a - codes(entry + size + j);
      const F x2 = a - codes(entry + 2 * size + j), x3 = a - codes(entry + 3 * size + j);
      t0 += x0 * x0 * w;
      t1 += x1 * x1 * w;
      t2 += x2 * x2 * w;
      t3 += x3 * x3 * w;
    }
    const F4 s0 = quarter(t0), s1 = quarter(t1), s2 = quarter(t2), s3 = quarter(t3);
    const F4 r0 = {s0[0], s1[0], s2[0], s3[0]}, r1 = {s0[1], s1[1], s2[1], s3[1]};
    const F4 r2 = {s0[2], s1[2], s2[2], s3[2]}, r3 = {s0[3], s1[3], s2[3], s3[3]};
    const F4 four = (r0 + r2) + (r1 + r3);
    std::memcpy(out + i, &four, sizeof four);
  }
  for (; i < n; ++i) {
    const uint8_t* entry = list + i * size;
    F total = {}, a, w;
    for (int j = 0; j < d; j += 16) {
      load(a, q + j);
      load(w, weight + j);
      a -= codes(entry + j);
      total += a * a * w;
    }
    out[i] = sum(total);
  }
}

// Two sums of 32-bit words, the second weighted by position: (sum w, sum (i + 1) w) mod 2^32.
uint64_t sums(const uint8_t* data, int64_t words) {
  U a = {}, b = {}, at, w;
  for (uint32_t i = 0; i < 16; ++i) at[i] = i + 1;
  int64_t i = 0;
  for (; i + 16 <= words; i += 16) {
    std::memcpy(&w, data + 4 * i, sizeof w);
    a += w;
    b += w * at;
    at += 16;
  }
  uint32_t first = 0, second = 0;
  for (int k = 0; k < 16; ++k) {
    first += a[k];
    second += b[k];
  }
  for (; i < words; ++i) {
    uint32_t word;
    std::memcpy(&word, data + 4 * i, 4);
    first += word;
    second += word * (uint32_t)(i + 1);
  }
  return (uint64_t)second << 32 | first;
}
