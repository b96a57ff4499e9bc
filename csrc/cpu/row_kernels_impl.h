// The kernels for one instruction set: included by a file that sets LANES, KERNELS and the compiler's target.
// Written in vector extensions, so that one text serves every instruction set. No standard header may define inline
// functions here: compiled for a newer processor, the linker could pick them for an older one.
//
// Traffic: stats read 4 bytes a logit, grad reads 4 and writes 4, in place. About 20 vector instructions for a logit's
// exponential, so on slabs that are still in cache the kernels run at a few per cent of the GEMMs around them.

#include "fastalign/row_kernels.h"

namespace fastalign {
namespace {

using F = float __attribute__((vector_size(LANES * 4)));
using I = int32_t __attribute__((vector_size(LANES * 4)));
using U = uint32_t __attribute__((vector_size(LANES * 4)));
using H = uint16_t __attribute__((vector_size(LANES * 2)));

constexpr int UNROLL = 4;         // vectors of rows worked on together
constexpr int COLUMNS = 32;       // columns folded per new maximum: COLUMNS × UNROLL × LANES floats stay in L1
constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
constexpr float NEGATIVE_INFINITY = -__builtin_inff();

inline F splat(float x) { return F{} + x; }
inline F bits(I x) { F y; __builtin_memcpy(&y, &x, sizeof y); return y; }
inline I bits(F x) { I y; __builtin_memcpy(&y, &x, sizeof y); return y; }
inline F larger(F a, F b) { return a > b ? a : b; }

// Keeps a product from being contracted into a later subtraction: z must be the same number wherever it is used.
inline F rounded(F x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

inline F load(const float* p, int count) {
  F x{};
  if (count == LANES) __builtin_memcpy(&x, p, sizeof x);
  else __builtin_memcpy(&x, p, count * sizeof(float));
  return x;
}

inline void store(float* p, F x, int count) {
  if (count == LANES) __builtin_memcpy(p, &x, sizeof x);
  else __builtin_memcpy(p, &x, count * sizeof(float));
}

inline F load_bf16(const uint16_t* p, int count) {
  H h{};
  if (count == LANES) __builtin_memcpy(&h, p, sizeof h);
  else __builtin_memcpy(&h, p, count * sizeof(uint16_t));
  U wide = __builtin_convertvector(h, U) << 16;
  F x;
  __builtin_memcpy(&x, &wide, sizeof x);
  return x;
}

// The first `count` of p[rows[0]], p[rows[1]], …
template <class T>
inline void pick(T* to, const T* p, const int64_t* rows, int count) {
  for (int lane = 0; lane < count; ++lane) to[lane] = p[rows[lane]];
}

inline void store_bf16(uint16_t* p, F x, int count) {  // round to nearest, ties to even; nan stays nan
  U b;
  __builtin_memcpy(&b, &x, sizeof b);
  U up = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  I is_nan = x != x;
  U mask;
  __builtin_memcpy(&mask, &is_nan, sizeof mask);
  H h = __builtin_convertvector((up & ~mask) | (mask & 0x7fc0), H);
  if (count == LANES) __builtin_memcpy(p, &h, sizeof h);
  else __builtin_memcpy(p, &h, count * sizeof(uint16_t));
}

// exp for x up to 88, relative error below 2e-7 (Cephes); 0 below −87.3; nan stays nan.
inline F exponential(F x) {
  F y = x < -88.0f ? splat(-88.0f) : x;
  y = y > 88.0f ? splat(88.0f) : y;
  const F magic = splat(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  F shifted = rounded(y * LOG2E + magic);
  F k = rounded(shifted - magic);
  F r = y - k * LN2_HIGH - k * LN2_LOW;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I exponent = (bits(shifted) - bits(magic) + 127) << 23;
  F e = p * bits(exponent);
  return x < -87.3f ? F{} : e;
}

// tanh, relative error below 5e-7: a polynomial near 0, where 1 − exp would cancel (Cephes).
inline F hyperbolic_tangent(F x) {
  I sign = bits(x) & (I{} + INT32_MIN);
  F a = bits(bits(x) & (I{} + INT32_MAX));
  F e = exponential(-2.0f * a);
  F far = bits(bits((1.0f - e) / (1.0f + e)) | sign);
  F s = x * x;
  F p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  F near = p * s * x + x;
  return a < 0.625f ? near : (x == x ? far : x);
}

inline F shifted(const Logits& l, F u, int64_t column) { return l.bias ? rounded(u + l.bias[column]) : u; }

inline F logit(const Logits& l, F u, int64_t column) {
  F x = rounded(shifted(l, u, column) * l.in_scale);
  return l.softcap ? rounded(hyperbolic_tangent(x) * l.out_scale) : x;
}

// The column of a row's target among those from v0 on. Unsigned: no target is so far off that this overflows.
inline uint64_t target_column(const int64_t* targets, int64_t row, int64_t v0) { return (uint64_t)targets[row] - (uint64_t)v0; }

// ---- stats

template <int K>
void stats_block(const RowStats& a, int64_t column, int64_t columns, int64_t row, int count) {
  float z[COLUMNS][K * LANES];
  F block_max[K], total[K];
  I best[K];
  for (int k = 0; k < K; ++k) block_max[k] = splat(NEGATIVE_INFINITY), total[k] = F{}, best[k] = I{};
  for (int64_t j = 0; j < columns; ++j) {
    const float* p = a.tile + (column + j) * a.stride + row;
    for (int k = 0; k < K; ++k) {
      F x = logit(a.logits, load(p + k * LANES, count), column + j);
      store(&z[j][k * LANES], x, LANES);
      if (a.argmax) best[k] = x > block_max[k] ? I{} + (int32_t)j : best[k];
      if (a.sum_z) total[k] += x;
      block_max[k] = larger(block_max[k], x);
    }
  }
  for (int k = 0; k < K; ++k) {
    auto value = [&](int which) { return a.values + which * a.n + row + k * LANES; };
    F old_max = load(value(0), count), new_max = larger(old_max, block_max[k]);
    F center = new_max == NEGATIVE_INFINITY ? F{} : new_max;  // all logits −inf so far: exp(−inf − 0) = 0
    F delta = old_max - center;
    F scale = exponential(delta);
    F sum = load(value(1), count), ent = F{}, sq = F{}, e_sum = F{};
    for (int64_t j = 0; j < columns; ++j) {
      F x = load(&z[j][k * LANES], LANES) - center;
      F e = exponential(x);
      e_sum += e;
      if (a.entropy) ent += x < -87.3f ? F{} : e * x;
      if (a.sum_sq) sq += e * e;
    }
    if (a.argmax) {
      for (int lane = 0; lane < count; ++lane)
        if (block_max[k][lane] > old_max[lane]) a.argmax[row + k * LANES + lane] = a.v0 + column + best[k][lane];
    }
    if (a.entropy) {
      F carried = sum > 0.0f ? (load(value(3), count) + delta * sum) * scale : F{};
      store(value(3), carried + ent, count);
    }
    if (a.sum_sq) store(value(4), load(value(4), count) * scale * scale + sq, count);
    if (a.sum_z) store(value(5), load(value(5), count) + total[k], count);
    store(value(1), sum * scale + e_sum, count);
    store(value(0), new_max, count);
  }
}

void stats(const RowStats& a, int64_t first, int64_t last) {
  for (int64_t column = 0; column < a.v; column += COLUMNS) {
    int64_t columns = a.v - column < COLUMNS ? a.v - column : COLUMNS;
    int64_t row = first;
    for (; row + UNROLL * LANES <= last; row += UNROLL * LANES) stats_block<UNROLL>(a, column, columns, row, LANES);
    for (; row < last; row += LANES)
      stats_block<1>(a, column, columns, row, last - row < LANES ? (int)(last - row) : LANES);
  }
  for (int64_t row = first; row < last; ++row) {
    uint64_t column = target_column(a.targets, row, a.v0);
    if (column >= (uint64_t)a.v) continue;
    F u = splat(a.tile[(int64_t)column * a.stride + row]);
    a.values[2 * a.n + row] = logit(a.logits, u, (int64_t)column)[0];
  }
}

// ---- grad

inline int64_t tile_row(const RowGrad& a, int64_t row) { return a.rows ? a.rows[row] : row; }

// Picked rows ascend, so rows[i] >= i: over the tile itself, nothing is written that is still to be read.
template <bool EXPONENTIALS, bool SOFTCAP, bool ENTROPY>
void grad_columns(const RowGrad& a, int64_t first, int64_t last) {
  auto values = [&](int64_t column, int64_t row, int count) {
    const float* p = (const float*)a.tile + column * a.stride;
    if (!a.rows) return load(p + row, count);
    float picked[LANES] = {};
    pick(picked, p, a.rows + row, count);
    return load(picked, LANES);
  };
  auto exps = [&](int64_t column, int64_t row, int count) {
    const uint16_t* p = (const uint16_t*)a.tile + column * a.stride;
    if (!a.rows) return load_bf16(p + row, count);
    uint16_t picked[LANES] = {};
    pick(picked, p, a.rows + row, count);
    return load_bf16(picked, LANES);
  };
  for (int64_t column = first; column < last; ++column) {
    for (int64_t row = 0; row < a.n; row += LANES) {
      int count = a.n - row < LANES ? (int)(a.n - row) : LANES;
      F base = load(a.base + row, count), log_sum = load(a.log_sum + row, count), g;
      if (EXPONENTIALS) {
        g = exps(column, row, count) * (exponential(-log_sum) * base) * a.logits.in_scale;
      } else {
        F x = rounded(shifted(a.logits, values(column, row, count), column) * a.logits.in_scale);
        F slope = splat(a.logits.in_scale);
        if (SOFTCAP) {
          F t = hyperbolic_tangent(x);
          slope = (1.0f - t * t) * (a.logits.in_scale * a.logits.out_scale);
          x = rounded(t * a.logits.out_scale);
        }
        F logp = (x - load(a.max + row, count)) - log_sum;
        F p = exponential(logp);
        if (ENTROPY) base = p > 0.0f ? base - load(a.entropy + row, count) * logp : F{};
        g = p * base * slope;
      }
      store(a.out + column * a.out_stride + row, g, count);
    }
  }
}

void grad(const RowGrad& a, int64_t first, int64_t last) {
  // what the gradient at the target needs of u, read before the tile may be overwritten
  constexpr int PIECE = 256;
  float slopes[PIECE];
  auto visit = [&](auto&& body) {
    for (int64_t row = 0; row < a.n; ++row) {
      uint64_t column = target_column(a.targets, row, a.v0);
      if (column >= (uint64_t)first && column < (uint64_t)last) body(row, (int64_t)column);
    }
  };
  auto slope_at = [&](int64_t row, int64_t column) {
    F x = shifted(a.logits, splat(((const float*)a.tile)[column * a.stride + tile_row(a, row)]), column) * a.logits.in_scale;
    F t = hyperbolic_tangent(x);
    return ((1.0f - t * t) * (a.logits.in_scale * a.logits.out_scale))[0];
  };
  if (a.logits.softcap && a.n > PIECE) {  // rarely: rows in pieces whose slopes fit the buffer
    RowGrad part = a;
    for (int64_t row = 0; row < a.n; row += PIECE) {
      part.n = a.n - row < PIECE ? a.n - row : PIECE;
      part.tile = (const float*)a.tile + (a.rows ? 0 : row), part.rows = a.rows ? a.rows + row : nullptr;
      part.targets = a.targets + row, part.max = a.max + row, part.log_sum = a.log_sum + row;
      part.base = a.base + row, part.target = a.target + row;
      part.entropy = a.entropy ? a.entropy + row : nullptr, part.out = a.out + row;
      grad(part, first, last);
    }
    return;
  }
  if (a.logits.softcap) visit([&](int64_t row, int64_t column) { slopes[row] = slope_at(row, column); });
  if (a.exponentials) grad_columns<true, false, false>(a, first, last);
  else if (a.logits.softcap && a.entropy) grad_columns<false, true, true>(a, first, last);
  else if (a.logits.softcap) grad_columns<false, true, false>(a, first, last);
  else if (a.entropy) grad_columns<false, false, true>(a, first, last);
  else grad_columns<false, false, false>(a, first, last);
  visit([&](int64_t row, int64_t column) {
    a.out[column * a.out_stride + row] = a.target[row] * (a.logits.softcap ? slopes[row] : a.logits.in_scale);
  });
}

// ---- exp

void exponentials(const RowExp& a, int64_t first, int64_t last) {
  for (int64_t column = first; column < last; ++column) {
    for (int64_t row = 0; row < a.n; row += LANES) {
      int count = a.n - row < LANES ? (int)(a.n - row) : LANES;
      F z = logit(a.logits, load(a.tile + column * a.stride + row, count), column);
      store_bf16(a.out + column * a.out_stride + row, exponential(z - load(a.max + row, count)), count);
    }
  }
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {NAME, LANES, stats, grad, exponentials};

}  // namespace fastalign
