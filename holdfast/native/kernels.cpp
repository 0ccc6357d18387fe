// Native kernels for CPUs: a C interface on raw pointers, called through ctypes.
//
// Each kernel exists three times, for AVX-512, AVX2 and any CPU; `hf_variants` says which run here.
// All of them give bitwise equal results (see lanes.h). Threads are those of the caller's OpenMP.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

// Clang does not know the target pragmas below; it builds the portable variant.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define HOLDFAST_X86 1
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

typedef uint16_t bf16;
constexpr int BLOCK = 128;
constexpr int AXES = 8;

enum Second { OWN, RANK1, FACTOR };

inline int bits(float x) { int b; std::memcpy(&b, &x, sizeof b); return b; }
inline float value(int b) { float x; std::memcpy(&x, &b, sizeof x); return x; }

inline float smaller(float a, float b) { return value(std::min(bits(a), bits(b))); }
inline float larger(float a, float b) { return value(std::max(bits(a), bits(b))); }

// A scale near the end of the normal range, infinite or NaN encodes everything as zero; 16 times the
// result is finite.
inline float reciprocal(float scale) { return scale >= 0x1p-122f ? 1 / scale : 0; }

// One AdamW step on one tensor; for the maxima of rank-1, axes come in order, the last one apart.
struct Job {
  void* p;
  const void* g;
  uint8_t *m_code, *v_code;
  float *m_scale, *v_scale;
  const float *m_map, *m_mid, *v_map;
  float v_faded[16];
  int64_t n;
  float b1, b2, c1, c2, step, decay, root2, eps;
  int outer;
  int64_t size[AXES], columns;
  const float *axis[AXES], *inverse[AXES], *column, *column_inverse;
  float* fresh[AXES];
};

typedef void (*Range)(const Job&, int pass, int64_t first, int64_t last, float* column);

// A row of a tensor whose last axis is `columns` long, and where in it we are.
struct Rows {
  const Job& job;
  int64_t at, index[AXES];
  float scale, inverse, peak;

  Rows(const Job& j, int64_t element) : job(j), at(element % j.columns) {
    int64_t row = element / j.columns;
    for (int a = j.outer - 1; a >= 0; --a) {
      index[a] = row % j.size[a];
      row /= j.size[a];
    }
    open();
  }

  void open() {
    scale = value(0x7fffffff);
    inverse = peak = 0;
    for (int a = 0; a < job.outer; ++a) {
      scale = smaller(scale, job.axis[a][index[a]]);
      if (job.inverse[a]) inverse = std::max(inverse, job.inverse[a][index[a]]);
    }
  }

  // Rows may be shared by two threads, and an index of one axis by many rows.
  void flush() {
    for (int a = 0; a < job.outer; ++a) {
      int* target = (int*)(job.fresh[a] + index[a]);
      int mine = bits(peak), seen = __atomic_load_n(target, __ATOMIC_RELAXED);
      while (seen < mine && !__atomic_compare_exchange_n(target, &seen, mine, true,
                                                         __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
    }
  }

  bool inside() const { return at + BLOCK <= job.columns; }

  void advance(int64_t count) {
    at += count;
    if (at < job.columns) return;
    at = 0;
    if (peak != 0) flush();
    peak = 0;
    for (int a = job.outer - 1; a >= 0 && ++index[a] == job.size[a]; --a)
      if (a > 0) index[a] = 0;
    if (index[0] < job.size[0]) open();
  }

  // Calls visit(i, column, length, *this) for each stretch of block b that lies in one row.
  template <class Visit>
  void walk(int64_t b, Visit visit) {
    int64_t count = std::min<int64_t>(BLOCK, job.n - b * BLOCK);
    for (int64_t i = 0; i < count;) {
      int64_t length = std::min(count - i, job.columns - at);
      visit(i, at, length, *this);
      advance(length);
      i += length;
    }
  }
};

// Where block b of the parameter and the gradient lies; a ragged last block is a padded copy.
template <class P, class G>
struct Slice {
  P *p, *home, copy_p[BLOCK];
  const G* g;
  G copy_g[BLOCK];
  int64_t count;

  Slice(const Job& job, int64_t b)
      : p((P*)job.p + b * BLOCK), home(p), g((const G*)job.g + b * BLOCK),
        count(std::min<int64_t>(BLOCK, job.n - b * BLOCK)) {
    if (count == BLOCK) return;
    std::fill(std::copy(p, p + count, copy_p), copy_p + BLOCK, P(0));
    std::fill(std::copy(g, g + count, copy_g), copy_g + BLOCK, G(0));
    p = copy_p;
    g = copy_g;
  }
  ~Slice() {
    if (count < BLOCK) std::copy(p, p + count, home);
  }
};

namespace portable {
#define HOLDFAST_WIDTH 4
#include "lanes.h"
#include "adamw4.h"
#undef HOLDFAST_WIDTH
}  // namespace portable

#ifdef HOLDFAST_X86
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#define HOLDFAST_WIDTH 8
#include "lanes.h"
#include "adamw4.h"
#undef HOLDFAST_WIDTH
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define HOLDFAST_WIDTH 16
#include "lanes.h"
#include "adamw4.h"
#undef HOLDFAST_WIDTH
}  // namespace avx512
#pragma GCC pop_options
#endif

enum Variant { PORTABLE, AVX2, AVX512 };

Range adamw4(int variant, bool p_bf16, bool g_bf16, Second second) {
#ifdef HOLDFAST_X86
  if (variant == AVX512) return avx512::adamw4(p_bf16, g_bf16, second);
  if (variant == AVX2) return avx2::adamw4(p_bf16, g_bf16, second);
#endif
  return portable::adamw4(p_bf16, g_bf16, second);
}

struct Hyper { double lr, b1, b2, eps, weight_decay, step; };

// The factors of one step in double precision, rounded once, as torch rounds Python numbers.
void set_hyper(Job& job, const Hyper& h) {
  job.b1 = (float)h.b1;
  job.b2 = (float)h.b2;
  job.c1 = (float)(1 - h.b1);
  job.c2 = (float)(1 - h.b2);
  job.step = (float)(h.lr / (1 - std::pow(h.b1, h.step)));
  job.root2 = (float)(1 / std::sqrt(1 - std::pow(h.b2, h.step)));
  job.decay = (float)(1 - h.lr * h.weight_decay);
  job.eps = (float)h.eps;
}

template <class T> inline float read(T x);
template <> inline float read(float x) { return x; }
template <> inline float read(bf16 x) { return value((int)((uint32_t)x << 16)); }
inline void write(float* p, float x) { *p = x; }
inline void write(bf16* p, float x) {
  uint32_t b = (uint32_t)bits(x);
  *p = x != x ? 0x7fc0 : (bf16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

template <class P, class G>
void dense(const Job& job, P* p, const G* g, float* m, float* v) {
  for (int64_t i = 0; i < job.n; ++i) {
    float x = read(g[i]);
    m[i] = job.b1 * m[i] + job.c1 * x;
    v[i] = job.b2 * v[i] + job.c2 * (x * x);
    write(p + i, read(p[i]) * job.decay + (-job.step * m[i]) / (std::sqrt(v[i]) * job.root2 + job.eps));
  }
}

}  // namespace

extern "C" {

// The best variant that this CPU runs: 0 portable, 1 AVX2, 2 AVX-512; all below run too.
int hf_variants() {
#ifdef HOLDFAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
  return PORTABLE;
}

// One AdamW step in place. `second`: 0 blocks, 1 rank-1 maxima, 2 factored (v_scale holds row and
// column factors, already updated). `tables`: 16 levels and 15 midpoints for m, 16 levels for v.
// Returns 0, or 1 when scratch memory could not be had; nothing was changed then.
int hf_adamw4(int variant, int threads, int second, int64_t n, int axes, const int64_t* sizes,
              void* p, int p_bf16, const void* g, int g_bf16, uint8_t* m_code, float* m_scale,
              uint8_t* v_code, float* v_scale, const float* tables, const Hyper* hyper) {
  Job job = {};
  job.p = p;
  job.g = g;
  job.n = n;
  job.m_code = m_code;
  job.v_code = v_code;
  job.m_scale = m_scale;
  job.v_scale = v_scale;
  job.m_map = tables;
  job.m_mid = tables + 16;
  job.v_map = tables + 31;
  set_hyper(job, *hyper);
  for (int k = 0; k < 16; ++k) job.v_faded[k] = job.v_map[k] * job.b2;

  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, blocks / 64));
  const Range range = adamw4(variant, p_bf16, g_bf16, (Second)second);

  int64_t total = 0, columns = 0;
  if (second != OWN) {
    job.outer = axes - 1;
    columns = job.columns = sizes[axes - 1];
    for (int a = 0; a < axes; ++a) total += sizes[a];
  }
  std::vector<float> scratch;
  if (second == RANK1) try {
    // New maxima, 16 / maxima, and a row of column maxima per thread.
    scratch.assign(2 * total + threads * columns, 0.0f);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  float *fresh = scratch.data(), *inverse = fresh + total, *columns_of = inverse + total;
  if (second != OWN) {
    int64_t at = 0;
    for (int a = 0; a < job.outer; at += sizes[a++]) {
      job.size[a] = sizes[a];
      job.axis[a] = v_scale + at;
      if (second == RANK1) {
        job.fresh[a] = fresh + at;
        job.inverse[a] = inverse + at;
      }
    }
    job.column = v_scale + total - columns;
    if (second == RANK1) job.column_inverse = inverse + total - columns;
  }

#pragma omp parallel num_threads(threads)
  {
    int me = 0, all = 1;
#ifdef _OPENMP
    me = omp_get_thread_num();
    all = omp_get_num_threads();
#endif
    const int64_t first = blocks * me / all, last = blocks * (me + 1) / all;
    if (second == RANK1) {
      if (first < last) range(job, 1, first, last, columns_of + me * columns);
#pragma omp barrier
#pragma omp single
      {
        int* column = (int*)(fresh + total - columns);
        for (int t = 0; t < all; ++t)
          for (int64_t c = 0; c < columns; ++c)
            column[c] = std::max(column[c], ((int*)(columns_of + t * columns))[c]);
        for (int64_t k = 0; k < total; ++k) inverse[k] = 16 * reciprocal(fresh[k]);
      }
    }
    if (first < last) range(job, 2, first, last, nullptr);
  }
  if (second == RANK1) std::memcpy(v_scale, fresh, total * sizeof(float));
  return 0;
}

// One AdamW step in place on fp32 moments, for tensors too small to be worth codes.
void hf_adamw(int64_t n, void* p, int p_bf16, const void* g, int g_bf16, float* m, float* v,
              const Hyper* hyper) {
  Job job = {};
  job.n = n;
  set_hyper(job, *hyper);
  if (p_bf16)
    g_bf16 ? dense(job, (bf16*)p, (const bf16*)g, m, v) : dense(job, (bf16*)p, (const float*)g, m, v);
  else
    g_bf16 ? dense(job, (float*)p, (const bf16*)g, m, v) : dense(job, (float*)p, (const float*)g, m, v);
}

}  // extern "C"

#include "bits.h"
#include "adamw8.h"
