// Statistics and gradient of a row from one reading of its logits. A cluster of up to 8 blocks holds the row in shared
// memory (512 KiB at 131072 columns), exchanges its statistics, and writes the gradient over it.
//
// Per logit, at 8192 × 131072 on an H200 (4.3 TB/s, 132 multiprocessors):
//
//     memory      4 B read, 2 B written in 16 bits             1.5 ms (two kernels that meet in memory: 10 B, 2.5 ms)
//     exp         2 (6 special functions with a softcap)       0.6 ms (1.7 ms) at 16 a clock
//     shared      4 B copied in, 8 B read                      0.4 ms at 128 B a clock
//     issue       about 16 instructions                        0.6 ms at 128 lanes a clock
//
// The slices of three rows' clusters fit a multiprocessor at V = 131072 and 151936: while one block writes, others load.
//
// A block copies its slice in chunks, each with a barrier of its own, and folds a chunk as soon as it is there. Every
// thread keeps a running state of its own; states meet in warps, then in the block, then in the cluster, always in the
// same order, which follows from v alone. Nothing is written before all blocks have read their slices, so the gradient
// may go over the tile, also in 16 bits over the first half of each row.
//
// Compiled without contraction (-fmad=false): z must be the same number wherever it is used, so that the largest logit
// contributes exp(0) = 1 and no log-prob is above 0. Multiply-adds that cannot hurt are written out.
#pragma once

#include <cmath>
#include <cstring>

#include "device.cuh"
#include "fastalign/row_loss_grad.h"

namespace fastalign {

constexpr int MAX_CHUNKS = 16, MAX_WARPS = 8;
constexpr float LOG2E = 1.44269504f;

// Of the columns seen so far: max z, Σe, Σe·(z−m), Σe², Σz with e = exp(z − m), and the first argmax.
struct State {
  float m, s, ent, sq, sz;
  int arg;
};

struct Shared {  // at the start of a block's shared memory; its slice follows at SHARED_HEADER
  device::Barrier loaded[MAX_CHUNKS];
  float warps[MAX_WARPS][8];            // what the warps, then the blocks of the cluster contribute: State as floats, and z_y
  float blocks[MAX_CLUSTER][8];
};
static_assert(sizeof(Shared) <= SHARED_HEADER && SHARED_HEADER % 128 == 0);

FASTALIGN_DEVICE float exponential(float x) { return device::exp2_approx(x * LOG2E); }
FASTALIGN_DEVICE float finite(float m) { return m == -INFINITY ? 0.0f : m; }  // exp(-inf − 0) is 0, exp(-inf + inf) NaN

// tanh(x), and 1 − tanh²(x), both without cancellation (Cephes' polynomial near 0).
FASTALIGN_DEVICE float tanh_and_slope(float x, float& slope) {
  const float a = fabsf(x), q = a * a;
  const float w = device::divide_approx(2.0f, device::exp2_approx(a * (2.0f * LOG2E)) + 1.0f);  // 1 − tanh a
  float p = fmaf(fmaf(q, -5.70498872745e-3f, 2.06390887954e-2f), q, -5.37397155531e-2f);
  p = fmaf(fmaf(p, q, 1.33314422036e-1f), q, -3.33332819422e-1f);
  const float near = fmaf(a * q, p, a);
  slope = a < 0.625f ? fmaf(near, -near, 1.0f) : w * (2.0f - w);
  return copysignf(a < 0.625f ? near : 1.0f - w, x);
}

template <bool SOFTCAP>
FASTALIGN_DEVICE float logit(const RowLossGrad& a, float u) {  // u with its bias
  float z = u * a.in_scale, slope;
  if constexpr (SOFTCAP) z = tanh_and_slope(z, slope) * a.out_scale;
  return z;
}

// N logits of ascending columns: column, column + 1, … in groups of four that are `step` apart.
template <bool SUMS, int N>
FASTALIGN_DEVICE void fold(State& t, const float (&z)[N], int column, int step) {
  float m = z[0];
  int arg = column;
#pragma unroll
  for (int i = 1; i < N; ++i) {
    if constexpr (SUMS) arg = z[i] > m ? column + (i / 4) * step + i % 4 : arg;
    m = fmaxf(m, z[i]);
  }
  const float top = fmaxf(t.m, m), ref = finite(top), scale = exponential(t.m - ref);
  if constexpr (SUMS) {
    t.arg = m > t.m ? arg : t.arg;
    t.ent = (t.ent + (t.m == -INFINITY ? 0.0f : t.m - ref) * t.s) * scale;
    t.sq *= scale * scale;
  }
  t.s *= scale, t.m = top;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float d = z[i] - ref, e = exponential(d);
    t.s += e;
    if constexpr (SUMS) {
      t.ent = fmaf(e, fmaxf(d, -3.0e38f), t.ent);  // 0·log 0 = 0
      t.sq = fmaf(e, e, t.sq);
      t.sz += z[i];
    }
  }
}

// The state of earlier columns with that of later ones, or of any others where the lesser argmax wins a tie.
template <bool SUMS>
FASTALIGN_DEVICE State merge(const State& x, const State& y) {
  State t;
  t.m = fmaxf(x.m, y.m);
  const float ref = finite(t.m), a = exponential(x.m - ref), b = exponential(y.m - ref);
  t.s = x.s * a + y.s * b;
  if constexpr (SUMS) {
    const float from_x = x.m == -INFINITY ? 0.0f : x.m - ref, from_y = y.m == -INFINITY ? 0.0f : y.m - ref;
    t.ent = (x.ent + from_x * x.s) * a + (y.ent + from_y * y.s) * b;
    t.sq = x.sq * a * a + y.sq * b * b;
    t.sz = x.sz + y.sz;
    t.arg = x.m == y.m ? (x.arg < y.arg ? x.arg : y.arg) : (x.m > y.m ? x.arg : y.arg);
  }
  return t;
}

template <bool SUMS>
FASTALIGN_DEVICE void put(float (&to)[8], const State& t) {
  to[0] = t.m, to[1] = t.s;
  if constexpr (SUMS) to[2] = t.ent, to[3] = t.sq, to[4] = t.sz, memcpy(&to[5], &t.arg, sizeof t.arg);
}

template <bool SUMS>
FASTALIGN_DEVICE State take(const float (&from)[8]) {
  State t{from[0], from[1], 0, 0, 0, 0};
  if constexpr (SUMS) t.ent = from[2], t.sq = from[3], t.sz = from[4], memcpy(&t.arg, &from[5], sizeof t.arg);
  return t;
}

// One row. A block's part of it: columns [first, first + length) of the row, in `data`.
template <int THREADS, int CHUNK, class OUT, bool SOFTCAP, bool SUMS>
struct Row {
  static constexpr int GROUPS = CHUNK / 4 / THREADS;  // of four columns, a thread's part of a chunk
  static constexpr int WARPS = THREADS / 32;
  static_assert(GROUPS * 4 * THREADS == CHUNK && WARPS <= MAX_WARPS && (WARPS & (WARPS - 1)) == 0);

  const RowLossGrad& a;
  Shared& shared;
  float* const data;
  const int thread = device::thread(), rank, cluster;
  const int64_t row;
  const int first, length;
  const bool aligned;  // rows of the tile and of `out` start on 16 and 4·sizeof(OUT) bytes

  FASTALIGN_DEVICE Row(const RowLossGrad& args, const ClusterShape& shape, bool is_aligned, char* memory)
      : a(args), shared(*reinterpret_cast<Shared*>(memory)), data(reinterpret_cast<float*>(memory + SHARED_HEADER)),
        rank(device::cluster_rank()), cluster(shape.cluster), row(device::block() / shape.cluster),
        first(rank * shape.slice), length(clamp(args.v - first, shape.slice)), aligned(is_aligned) {}

  FASTALIGN_DEVICE static int clamp(int64_t x, int most) { return x < 0 ? 0 : x > most ? most : static_cast<int>(x); }

  FASTALIGN_DEVICE void load() const {
    const float* source = a.tile + row * a.tile_stride + first;
    const int whole = aligned ? length / 4 * 4 : 0;  // the copying unit takes 16 bytes at a time
    if (thread == 0) {
      for (int i = 0; i * CHUNK < whole; ++i) device::barrier_init(&shared.loaded[i]);
      device::barriers_are_initialised();
      for (int i = 0; i * CHUNK < whole; ++i) {
        const int start = i * CHUNK, count = whole - start < CHUNK ? whole - start : CHUNK;
        device::bulk_load(data + start, source + start, 4 * count, &shared.loaded[i]);
      }
    }
    for (int i = whole + thread; i < length; i += THREADS) data[i] = source[i];
    device::block_sync();
  }

  // Head outputs of the group of four columns from `i` on, with their bias.
  FASTALIGN_DEVICE void outputs(float (&u)[4], int i) const {
    device::load4(u, data + i);
    if (a.bias) {
#pragma unroll
      for (int k = 0; k < 4; ++k) u[k] += a.bias[first + i + k];
    }
  }
  FASTALIGN_DEVICE float output(int i) const { return a.bias ? data[i] + a.bias[first + i] : data[i]; }

  FASTALIGN_DEVICE State statistics() const {
    State t{-INFINITY, 0, 0, 0, 0, 0};
    for (int chunk = 0; chunk * CHUNK < length; ++chunk) {
      const int start = chunk * CHUNK, end = length - start < CHUNK ? length : start + CHUNK;
      if (aligned && start + 4 <= length) device::barrier_wait(&shared.loaded[chunk]);
      if (end - start == CHUNK) {
        float z[4 * GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) logits_at(z + 4 * g, start + 4 * (g * THREADS + thread));
        fold<SUMS>(t, z, first + start + 4 * thread, 4 * THREADS);
        continue;
      }
      for (int i = start + 4 * thread; i + 4 <= end; i += 4 * THREADS) {
        float z[4];
        logits_at(z, i);
        fold<SUMS>(t, z, first + i, 0);
      }
      const int i = end / 4 * 4 + thread;
      if (i < end) {
        const float z[1] = {logit<SOFTCAP>(a, output(i))};
        fold<SUMS>(t, z, first + i, 0);
      }
    }
    return t;
  }
  FASTALIGN_DEVICE void logits_at(float* z, int i) const {
    float u[4];
    outputs(u, i);
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] = logit<SOFTCAP>(a, u[k]);
  }

  // The state of `width` lanes together, a power of two, in each of them: merging is commutative to the bit.
  FASTALIGN_DEVICE static State meet(State t, int width) {
    for (int mask = width / 2; mask; mask /= 2) {
      State other{device::shuffle_xor(t.m, mask), device::shuffle_xor(t.s, mask), 0, 0, 0, 0};
      if constexpr (SUMS) {
        other.ent = device::shuffle_xor(t.ent, mask), other.sq = device::shuffle_xor(t.sq, mask);
        other.sz = device::shuffle_xor(t.sz, mask), other.arg = device::shuffle_xor(t.arg, mask);
      }
      t = merge<SUMS>(t, other);
    }
    return t;
  }

  // The row's state and its target's logit, in every thread of every block.
  FASTALIGN_DEVICE State exchange(State t, int y, float& z_y) const {
    t = meet(t, 32);
    if (thread % 32 == 0) put<SUMS>(shared.warps[thread / 32], t);
    device::block_sync();
    device::cluster_wait();  // the other blocks have begun, so that their memory may be written
    if (thread < 32) {
      t = meet(take<SUMS>(shared.warps[thread % WARPS]), WARPS);
      if (thread < cluster) {
        float mine[8];
        put<SUMS>(mine, t);
        mine[6] = y >= 0 ? logit<SOFTCAP>(a, output(y)) : 0.0f;
#pragma unroll
        for (int k = 0; k < 7; ++k)
          if (SUMS || k < 2 || k == 6) device::push(&shared.blocks[rank][k], thread, mine[k]);
      }
    }
    device::cluster_arrive();
    device::cluster_wait();  // all slices have been read: from here on the row may be overwritten
    z_y = 0.0f;
    for (int b = 0; b < cluster; ++b) z_y += shared.blocks[b][6];  // 0 from all blocks but the target's
    return meet(take<SUMS>(shared.blocks[thread % cluster]), cluster);
  }

  FASTALIGN_DEVICE void write_state(const State& t, float z_y) const {
    float* values = a.values + row;
    values[0] = t.m, values[a.n] = t.s, values[2 * a.n] = z_y;
    if constexpr (SUMS) {
      values[3 * a.n] = t.ent, values[4 * a.n] = t.sq, values[5 * a.n] = t.sz;
      if (a.argmax) a.argmax[row] = t.arg;
    }
  }

  // G_v = p_v·(base − e·log p_v), times dz/du.
  FASTALIGN_DEVICE float gradient(float u, float m, float log_sum, float base, float e) const {
    float z = u * a.in_scale, slope = a.in_scale;
    if constexpr (SOFTCAP) {
      z = tanh_and_slope(z, slope) * a.out_scale;
      slope *= a.in_scale * a.out_scale;
    }
    const float logp = (z - m) - log_sum, p = exponential(logp);
    if constexpr (SUMS) base = p > 0.0f ? fmaf(-e, logp, base) : 0.0f;  // z = −inf: 0, not 0·∞
    return p * base * slope;
  }

  FASTALIGN_DEVICE void write_gradient(const State& t, float z_y, int y) const {
    const float grad_logps = a.grad_logps[row], e = SUMS && a.grad_entropy ? a.grad_entropy[row] : 0.0f;
    const bool live = grad_logps != 0.0f || e != 0.0f;
    const float log_sum = logf(t.s), logp_y = (z_y - t.m) - log_sum;
    float base = -grad_logps, at_target = base * expm1f(logp_y);
    if constexpr (SUMS) {
      if (e != 0.0f) {
        const float entropy = log_sum - t.ent / t.s;
        base -= e * entropy;
        at_target -= e * expf(logp_y) * (logp_y + entropy);
      }
    }
    OUT* out = reinterpret_cast<OUT*>(a.out) + row * a.out_stride + first;
    const int whole = aligned ? length / 4 * 4 : 0;
#pragma unroll 4
    for (int i = 4 * thread; i < whole; i += 4 * THREADS) {
      float u[4];
      outputs(u, i);
#pragma unroll
      for (int k = 0; k < 4; ++k) u[k] = live ? gradient(u[k], t.m, log_sum, base, e) : 0.0f;
      device::store4(out + i, u);
    }
    for (int i = whole + thread; i < length; i += THREADS)
      device::store(out + i, live ? gradient(output(i), t.m, log_sum, base, e) : 0.0f);
    if (y < 0 || !live) return;  // the same for all threads of a block
    device::block_sync();        // the target's column has been written by some thread
    if (thread == 0) {
      float slope = a.in_scale;
      if constexpr (SOFTCAP) {
        tanh_and_slope(output(y) * a.in_scale, slope);
        slope *= a.in_scale * a.out_scale;
      }
      device::store(out + y, at_target * slope);
    }
  }

  FASTALIGN_DEVICE void run() const {
    device::cluster_arrive();
    load();
    const int64_t target = a.targets[row] - first;  // may lie in another block
    const int y = target < 0 || target >= length ? -1 : static_cast<int>(target);
    float z_y;
    const State t = exchange(statistics(), y, z_y);
    if (rank == 0 && thread == 0) write_state(t, z_y);
    write_gradient(t, z_y, y);
  }
};

}  // namespace fastalign
