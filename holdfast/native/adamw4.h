// AdamW on 4-bit states, one range of blocks; included once per variant after lanes.h.
//
// A block is 128 consecutive elements; byte j of its 64 holds code j and, shifted by 4, code j + 64.
// What a step does to one element, in this order, everywhere:
//   m = beta1 * m + (1 - beta1) * g          v = beta2 * v + (1 - beta2) * (g * g)
//   p = decay * p + (-step * m) / (sqrt(v) * (1 / sqrt(correction2)) + eps)

// 128 floats of scratch, in L1.
struct alignas(64) Block { float x[BLOCK]; };

// Where a block's second-moment scales (or their reciprocals, or the moments) come from. These are
// structs and not lambdas because GCC compiles lambdas without the namespace's target.
struct Given {
  const float* x;
  F operator()(int i) const { return load(x + i); }
};
struct OneRow {
  F row;
  const float* column;
  F operator()(int i) const { return bits_min(row, load(column + i)); }
};
struct OneInverse {
  F row;
  const float* column;
  F operator()(int i) const { return bits_max(row, load(column + i)); }
};
struct Product {
  F row;
  const float* column;
  F operator()(int i) const { return row * load(column + i); }
};

// Where a block's new second moments go in pass 1: into maxima, or into scratch.
struct Peaks {
  float* column;
  F row;
  void operator()(int i, F v) {
    row = bits_max(row, v);
    store(column + i, bits_max(load(column + i), v));
  }
};
struct Keep {
  float* out;
  void operator()(int i, F v) { store(out + i, v); }
};

template <class P, class G, Second S>
struct Kernel {
  const Job& job;
  const F c1 = set(job.c1), c2 = set(job.c2), decay = set(job.decay),
          step = set(-job.step), root2 = set(job.root2), eps = set(job.eps);
  const Search search{job.m_mid};
  const Table faded = table(job.v_faded);

  explicit Kernel(const Job& j) : job(j) {}

  void update(P* p, int i, F m, F v) const {
    F x = load(p + i) * decay + (step * m) / (root(v) * root2 + eps);
    store(p + i, x);
  }

  static void fold(float* out, const float* map, float scale, float beta) {
    for (int k = 0; k < 16; ++k) out[k] = map[k] * beta * scale;
  }

  I v_code(F v, F inverse16) const { return positive(ceiling(v * inverse16 - set(1.5f))); }

  void encode_m(const float* m, float scale, uint8_t* out) const {
    F inverse = set(reciprocal(scale));
    for (int j = 0; j < BLOCK / 2; j += W) {
      I low = search(load(m + j) * inverse), high = search(load(m + j + BLOCK / 2) * inverse);
      store_codes(out + j, low | (high << 4));
    }
  }

  // One block with its own scale for v.
  void own_scale(P* p, const G* g, int64_t b) const {
    alignas(64) float fold_m[16], fold_v[16];
    Block m, v;
    fold(fold_m, job.m_map, job.m_scale[b], job.b1);
    fold(fold_v, job.v_map, job.v_scale[b], job.b2);
    const Table tm = table(fold_m), tv = table(fold_v);
    uint8_t *mc = job.m_code + b * BLOCK / 2, *vc = job.v_code + b * BLOCK / 2;
    F top_m = set(0), top_v = set(0);
    for (int j = 0; j < BLOCK / 2; j += W) {
      I cm = codes(mc + j), cv = codes(vc + j);
      for (int half = 0; half < 2; ++half) {
        int i = j + half * BLOCK / 2;
        F x = load(g + i);
        F mi = look(tm, half ? cm >> 4 : cm & 15) + c1 * x;
        F vi = look(tv, half ? cv >> 4 : cv & 15) + c2 * (x * x);
        top_m = bits_max(top_m, magnitude(mi));
        top_v = bits_max(top_v, magnitude(vi));
        update(p, i, mi, vi);
        store(m.x + i, mi);
        store(v.x + i, vi);
      }
    }
    job.m_scale[b] = top(top_m);
    encode_m(m.x, job.m_scale[b], mc);
    job.v_scale[b] = top(top_v);
    F inverse = set(16 * reciprocal(job.v_scale[b]));
    for (int j = 0; j < BLOCK / 2; j += W) {
      I low = v_code(load(v.x + j), inverse), high = v_code(load(v.x + j + BLOCK / 2), inverse);
      store_codes(vc + j, low | (high << 4));
    }
  }

  // The new second moments of one block under the scales of its rows and columns, without a write.
  template <class Scale, class Take>
  void second(const G* g, int64_t b, Scale scale, Take& take) const {
    const uint8_t* vc = job.v_code + b * BLOCK / 2;
    for (int j = 0; j < BLOCK / 2; j += W) {
      I cv = codes(vc + j);
      for (int half = 0; half < 2; ++half) {
        int i = j + half * BLOCK / 2;
        F x = load(g + i);
        take(i, magnitude(look(faded, half ? cv >> 4 : cv & 15) * scale(i) + c2 * (x * x)));
      }
    }
  }

  // One block whose second moments lie under rows and columns: v_of(i) gives them, inverse(i) what
  // encodes them (rank-1 scales; the factored form keeps no codes).
  template <class Scale, class Inverse>
  void shared_scale(P* p, const G* g, int64_t b, Scale scale, Inverse inverse) const {
    alignas(64) float fold_m[16];
    Block m;
    fold(fold_m, job.m_map, job.m_scale[b], job.b1);
    const Table tm = table(fold_m);
    uint8_t *mc = job.m_code + b * BLOCK / 2, *vc = job.v_code + b * BLOCK / 2;
    F top_m = set(0);
    for (int j = 0; j < BLOCK / 2; j += W) {
      I cm = codes(mc + j), cv = {}, next = {};
      if (S == RANK1) cv = codes(vc + j);
      for (int half = 0; half < 2; ++half) {
        int i = j + half * BLOCK / 2;
        F x = load(g + i), vi;
        F mi = look(tm, half ? cm >> 4 : cm & 15) + c1 * x;
        if (S == RANK1) {
          vi = magnitude(look(faded, half ? cv >> 4 : cv & 15) * scale(i) + c2 * (x * x));
          I code = v_code(vi, inverse(i));
          next = half ? next | (code << 4) : code;
        } else {
          vi = scale(i);
        }
        top_m = bits_max(top_m, magnitude(mi));
        update(p, i, mi, vi);
        store(m.x + i, mi);
      }
      if (S == RANK1) store_codes(vc + j, next);
    }
    job.m_scale[b] = top(top_m);
    encode_m(m.x, job.m_scale[b], mc);
  }

  // Pass 1 of rank-1: maxima of the new second moments along every axis; nothing else is written.
  void maxima(int64_t first, int64_t last, float* column) const {
    Rows rows(job, first * BLOCK);
    for (int64_t b = first; b < last; ++b) {
      Slice<P, G> slice(job, b);
      if (rows.inside()) {
        Peaks peaks{column + rows.at, set(rows.peak)};
        second(slice.g, b, OneRow{set(rows.scale), job.column + rows.at}, peaks);
        rows.peak = top(peaks.row);
        rows.advance(BLOCK);
        continue;
      }
      Block s = {};
      Rows(rows).walk(b, [&](int64_t i, int64_t c, int64_t length, const Rows& r) {
        for (int64_t k = 0; k < length; ++k) s.x[i + k] = smaller(r.scale, job.column[c + k]);
      });
      Block v;
      Keep keep{v.x};
      second(slice.g, b, Given{s.x}, keep);
      rows.walk(b, [&](int64_t i, int64_t c, int64_t length, Rows& r) {
        for (int64_t k = 0; k < length; ++k) {
          r.peak = larger(r.peak, v.x[i + k]);
          column[c + k] = larger(column[c + k], v.x[i + k]);
        }
      });
    }
    if (rows.peak != 0) rows.flush();
  }

  // Pass 2 of rank-1, and the factored form: everything is written.
  void apply(int64_t first, int64_t last) const {
    Rows rows(job, first * BLOCK);
    for (int64_t b = first; b < last; ++b) {
      Slice<P, G> slice(job, b);
      if (rows.inside()) {
        const float* column = job.column + rows.at;
        if (S == RANK1)
          shared_scale(slice.p, slice.g, b, OneRow{set(rows.scale), column},
                       OneInverse{set(rows.inverse), job.column_inverse + rows.at});
        else
          shared_scale(slice.p, slice.g, b, Product{set(rows.scale), column}, Given{nullptr});
        rows.advance(BLOCK);
        continue;
      }
      Block s = {}, t = {};
      rows.walk(b, [&](int64_t i, int64_t c, int64_t length, const Rows& r) {
        for (int64_t k = 0; k < length; ++k) {
          if (S == RANK1) {
            s.x[i + k] = smaller(r.scale, job.column[c + k]);
            t.x[i + k] = larger(r.inverse, job.column_inverse[c + k]);
          } else {
            s.x[i + k] = r.scale * job.column[c + k];
          }
        }
      });
      shared_scale(slice.p, slice.g, b, Given{s.x}, Given{t.x});
    }
  }

  static void run(const Job& job, int pass, int64_t first, int64_t last, float* column) {
    Kernel kernel(job);
    if (S == OWN)
      for (int64_t b = first; b < last; ++b) {
        Slice<P, G> slice(job, b);
        kernel.own_scale(slice.p, slice.g, b);
      }
    else if (pass == 1)
      kernel.maxima(first, last, column);
    else
      kernel.apply(first, last);
  }
};

template <class P, class G>
Range range_of(Second s) {
  return s == OWN ? Kernel<P, G, OWN>::run
         : s == RANK1 ? Kernel<P, G, RANK1>::run : Kernel<P, G, FACTOR>::run;
}

inline Range adamw4(bool p_bf16, bool g_bf16, Second s) {
  if (p_bf16) return g_bf16 ? range_of<bf16, bf16>(s) : range_of<bf16, float>(s);
  return g_bf16 ? range_of<float, bf16>(s) : range_of<float, float>(s);
}
