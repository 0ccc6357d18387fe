// Packed codes: squeezing and spreading them, step functions and affine groups read through them.
//
// Included once, after the variants of lanes.h.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "codes form a little-endian bit stream");

namespace {

// A step function: forward x -> codes by bounds, backward codes, gy -> gx by levels.
struct Stepped {
  const void* x;
  void* out;
  uint8_t* packed;
  const float* table;
  bool even;
};

struct Affine {
  const uint8_t *codes, *zero;
  const float* scale;
  float *out, middle;
  int64_t stride, groups, group;
};

typedef void (*Tiles)(const Stepped&, int64_t start, int64_t n);
typedef void (*Rewrite)(const uint8_t* from, uint8_t* to, int64_t n);
typedef void (*AffineRows)(const Affine&, int64_t first, int64_t last);

namespace portable {
#include "bits_lanes.h"
}

#ifdef HOLDFAST_X86
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "bits_lanes.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#include "bits_lanes.h"
}
#pragma GCC pop_options
#define HOLDFAST_PICK(call) \
  (variant == AVX512 ? avx512::call : variant == AVX2 ? avx2::call : portable::call)
#else
#define HOLDFAST_PICK(call) ((void)variant, portable::call)
#endif

// Elements that are worth one more thread.
constexpr int64_t PER_THREAD = 1 << 15;

int useful(int threads, int64_t n) {
  return (int)std::max<int64_t>(1, std::min<int64_t>(threads, n / PER_THREAD));
}

}  // namespace

extern "C" {

// Rows of n codes of `bits` bits, one per byte, to and from rows of ceil(n * bits / 8) bytes.
void hf_pack(int variant, int threads, int unpacking, int bits, int64_t rows, int64_t n,
             const uint8_t* from, uint8_t* to) {
  const Rewrite rewrite = HOLDFAST_PICK(rewrite(unpacking, bits));
  const int64_t bytes = (n * bits + 7) / 8;
  // Rows that end on a byte follow each other like one.
  if (n * bits % 8 == 0) {
    n *= rows;
    rows = 1;
  }
  const int64_t tile = portable::TILE, tiles = (n + tile - 1) / tile;
#pragma omp parallel for num_threads(useful(threads, rows * n)) schedule(static)
  for (int64_t k = 0; k < rows * tiles; ++k) {
    const int64_t row = k / tiles, start = k % tiles * tile, count = std::min(tile, n - start);
    const int64_t code = row * n + start, byte = row * bytes + start / 8 * bits;
    unpacking ? rewrite(from + byte, to + code, count) : rewrite(from + code, to + byte, count);
  }
}

// `backward` 0: x -> packed codes, how many of 15 rising bounds are below x (|x| where `even`).
// `backward` 1: packed codes and gy in x -> out = levels[code] * gy, of 16 levels.
void hf_steps(int variant, int threads, int backward, int bits, int even, int64_t n, const void* x,
              int x_bf16, uint8_t* packed, const float* table, void* out) {
  const Stepped job = {x, out, packed, table, even != 0};
  const Tiles tiles = HOLDFAST_PICK(tiles(x_bf16, backward, bits));
  const int64_t tile = portable::TILE;
#pragma omp parallel for num_threads(useful(threads, n)) schedule(static)
  for (int64_t k = 0; k < (n + tile - 1) / tile; ++k)
    tiles(job, k * tile, std::min(tile, n - k * tile));
}

// Rows of packed codes, `stride` bytes apart -> out (rows, groups * group) fp32, (code - zero) *
// scale. Without `zero` all zero points are the middle code.
void hf_affine(int variant, int threads, int bits, int64_t rows, int64_t groups, int64_t group,
               const uint8_t* codes, int64_t stride, const float* scale, const uint8_t* zero,
               float* out) {
  const Affine job = {codes, zero, scale, out, (float)(1 << (bits - 1)), stride, groups, group};
  const AffineRows range = HOLDFAST_PICK(affine(bits));
  threads = useful(threads, rows * groups * group);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) range(job, rows * t / threads, rows * (t + 1) / threads);
}

}  // extern "C"
