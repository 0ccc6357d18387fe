// AdamW on 8-bit and on expanded FP8 states.
//
// Included once, after the variants of lanes.h.

namespace {

constexpr int LONGEST = 256;
// 16 * log2(448^2 / 2): sixteenths of k for a block whose magnitudes span one octave.
constexpr float SIXTEENTHS = 265.8353575f;

// One map of 256 rising codes as arithmetic. With n = code + 1, or 2 * |code - 127| + 1 where codes
// have a sign, and e = floor(log2(n)): level = (18 * n + offset[e]) / denominator[e], where e is
// kept as the low four bits of a float's exponent. From y in [0, 1] back, where r of the first seven
// bounds lie below it: n or |code - 127| = min(y * slope[r] + start[r], last[r]), and beyond the
// eighth bound the level 1.
struct DynamicTable {
  float offset[16], denominator[16], bounds[8], slope[8], start[8], last[8];
};

struct Bytes : Job {
  int block;
  uint8_t m_zero, *m_power, *v_power;
  const DynamicTable* dynamic;
  const float* levels;
};

typedef void (*ByteRange)(const Bytes&, int64_t first, int64_t last);

namespace portable {
#define HOLDFAST_WIDTH 4
#include "adamw8_lanes.h"
#undef HOLDFAST_WIDTH
}  // namespace portable

#ifdef HOLDFAST_X86
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#define HOLDFAST_WIDTH 8
#include "adamw8_lanes.h"
#undef HOLDFAST_WIDTH
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define HOLDFAST_WIDTH 16
#include "adamw8_lanes.h"
#undef HOLDFAST_WIDTH
}  // namespace avx512
#pragma GCC pop_options
#endif

ByteRange adamw8(int variant, bool p_bf16, bool g_bf16, bool expanded) {
#ifdef HOLDFAST_X86
  if (variant == AVX512) return avx512::adamw8(p_bf16, g_bf16, expanded);
  if (variant == AVX2) return avx2::adamw8(p_bf16, g_bf16, expanded);
#endif
  return portable::adamw8(p_bf16, g_bf16, expanded);
}

}  // namespace

// One AdamW step in place on one byte per moment and element. Without powers, codes are those of the
// dynamic maps and `tables` holds the one with a sign and the one without; with powers, codes are
// E4M3 and `tables` holds (q / 448)^(1 / k) for 256 powers k = 1/16, 2/16, .. by 128 codes q.
// `block` is a multiple of 16 up to 256.
extern "C" void hf_adamw8(int variant, int threads, int64_t n, int block, void* p, int p_bf16,
                          const void* g, int g_bf16, uint8_t* m_code, float* m_scale,
                          uint8_t* m_power, uint8_t* v_code, float* v_scale, uint8_t* v_power,
                          const float* tables, const Hyper* hyper) {
  Bytes job = {};
  job.p = p;
  job.g = g;
  job.n = n;
  job.block = block;
  job.m_code = m_code;
  job.m_scale = m_scale;
  job.m_power = m_power;
  job.v_code = v_code;
  job.v_scale = v_scale;
  job.v_power = v_power;
  job.m_zero = m_power ? 0 : 127;
  job.dynamic = (const DynamicTable*)tables;
  job.levels = tables;
  set_hyper(job, *hyper);
  const int64_t blocks = (n + block - 1) / block;
  threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, n / 8192));
  const ByteRange range = adamw8(variant, p_bf16, g_bf16, m_power != nullptr);
#pragma omp parallel num_threads(threads)
  {
    int me = 0, all = 1;
#ifdef _OPENMP
    me = omp_get_thread_num();
    all = omp_get_num_threads();
#endif
    range(job, blocks * me / all, blocks * (me + 1) / all);
  }
}
