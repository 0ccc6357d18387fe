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

inline float sum(const F& v) {
  F8 a[2];
  std::memcpy(a, &v, sizeof a);
  a[0] += a[1];
  F4 b[2];
  std::memcpy(b, a, sizeof b);
  b[0] += b[1];
  return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
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

// Squared distances to the codes of `n` entries: sum of weight * (q - code)^2.
void scan(const float* q, const float* weight, const uint8_t* list, int64_t n, int d, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* entry = list + i * (d + 4);
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
