// A random campaign over the kernels of every instruction set, under the sanitizers: shapes, strides, slabs, targets and
// numbers of any kind, on heap buffers of just their size.
//
//     campaign SECONDS SEED      prints what it tried; exits with 1 at the first thing that does not hold
#include <sys/mman.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "fastalign/row_kernels.h"
#include "fastalign/scans.h"

using namespace fastalign;

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return next() % (uint64_t)n; }
  bool one_in(int64_t n) { return below(n) == 0; }
  float number(float scale) { return ((float)below(20001) / 10000 - 1) * scale; }
};

static uint64_t case_seed;
static const char* isa;

static void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "%s, case %llu: %s\n", isa, (unsigned long long)case_seed, what);
  std::exit(1);
}

static bool same(float a, float b) { return a == b || (a != a && b != b); }

static const float INF = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
static const float SPECIAL[] = {NOT_A_NUMBER, INF, -INF, 3.4e38f, -3.4e38f, 1e-45f, -0.0f};
constexpr float UNTOUCHED = 1.25e-7f;

struct Problem {
  int64_t n, v, stride, v0;
  std::vector<float> tile, bias;
  std::vector<int64_t> targets;
  std::vector<bool> spoilt;  // rows that hold a special number
  Logits logits;
  int threads;

  explicit Problem(Random& r) {
    n = r.one_in(8) ? 1 + r.below(600) : 1 + r.below(50), v = 1 + r.below(r.one_in(4) ? 300 : 60);
    stride = n + (r.one_in(2) ? 0 : r.below(20));
    v0 = r.one_in(4) ? (int64_t)(r.next() >> 2) : r.below(200000);
    threads = 1 + r.below(4);
    tile.assign((v - 1) * stride + n, UNTOUCHED);
    const float scale = r.one_in(3) ? 80.0f : 4.0f;
    for (int64_t c = 0; c < v; ++c)
      for (int64_t i = 0; i < n; ++i) tile[c * stride + i] = r.number(scale);
    spoilt.assign(n, false);
    for (int64_t k = r.one_in(3) ? 0 : r.below(4); k > 0; --k) {
      const int64_t i = r.below(n);
      spoilt[i] = true;
      tile[r.below(v) * stride + i] = SPECIAL[r.below(7)];
    }
    if (r.one_in(2)) {
      bias.resize(v);
      for (auto& x : bias) x = r.number(3.0f);
      if (r.one_in(6)) bias[r.below(v)] = -INF;  // a masked column
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t anywhere[] = {INT64_MIN, INT64_MAX, -1, v0 - 1, v0 + v, v0, v0 + v - 1, (int64_t)r.next()};
      targets.push_back(r.one_in(3) ? anywhere[r.below(8)] : v0 + r.below(v));
    }
    logits = {r.one_in(2) ? 1.0f : r.number(2.0f), 1 + std::abs(r.number(30.0f)), r.one_in(3), bias.empty() ? nullptr : bias.data()};
  }
  bool inside(int64_t i) const { return targets[i] >= v0 && targets[i] - v0 < v; }
};

struct Stats {
  std::vector<float> values;
  std::vector<int64_t> argmax;
  bool entropy, sum_sq, sum_z;

  Stats(const Problem& p, uint64_t flags, int threads, const std::vector<float>& tile) {
    entropy = flags & 1, sum_sq = flags & 2, sum_z = flags & 4;
    values.assign(6 * p.n, 0.0f), argmax.assign(flags & 8 ? p.n : 0, -7);
    for (int64_t i = 0; i < p.n; ++i) values[i] = -INF, values[2 * p.n + i] = UNTOUCHED;
    row_stats({tile.data(), p.stride, p.n, p.v, p.logits, p.targets.data(), p.v0, values.data(), argmax.empty() ? nullptr : argmax.data(),
               entropy, sum_sq, sum_z}, threads);
  }
};

static void check_stats(const Problem& p, const Stats& s, const Stats& again, const Stats& sound) {
  for (int64_t k = 0; k < 6; ++k)
    for (int64_t i = 0; i < p.n; ++i) {
      const float value = s.values[k * p.n + i];
      require(same(value, again.values[k * p.n + i]), "a statistic depends on the thread count");
      if (!p.spoilt[i]) require(same(value, sound.values[k * p.n + i]), "a row's statistic depends on what another row holds");
    }
  for (int64_t i = 0; i < p.n; ++i) {
    const float target = s.values[2 * p.n + i];
    if (!p.inside(i)) require(target == UNTOUCHED, "a target outside the slab was looked up");
    if (!s.argmax.empty()) require(s.argmax[i] == -7 || (s.argmax[i] >= p.v0 && s.argmax[i] < p.v0 + p.v), "argmax is no column");
    bool lost = false;  // whether no log-prob of the row is a number
    for (int64_t c = 0; c < p.v && !lost; ++c) {
      const float u = p.tile[c * p.stride + i], x = (p.bias.empty() ? u : u + p.bias[c]) * p.logits.in_scale;
      lost = x != x || (x == INF && !p.logits.softcap);
    }
    const float logp = (target - s.values[i]) - std::log(s.values[p.n + i]);
    if (lost) require(!std::isfinite(logp), "a finite log-prob of a row whose logits are not numbers");
  }
}

static std::vector<float> gradient(const Problem& p, const RowGrad& shape, std::vector<float>& memory, int threads) {
  RowGrad grad = shape;
  grad.out = memory.data();
  row_grad(grad, threads);
  std::vector<float> found(grad.n * p.v);
  for (int64_t c = 0; c < p.v; ++c)
    for (int64_t i = 0; i < grad.n; ++i) found[c * grad.n + i] = memory[c * grad.out_stride + i];
  for (int64_t c = 0; c + 1 < p.v; ++c)
    for (int64_t i = p.n; i < grad.out_stride; ++i) require(memory[c * grad.out_stride + i] == UNTOUCHED, "the gradient was written between columns");
  return found;
}

static void check_grad(const Problem& p, const Stats& s, Random& r) {
  std::vector<float> log_sum(p.n), base(p.n), target(p.n), entropy(p.n);
  for (int64_t i = 0; i < p.n; ++i) {
    log_sum[i] = std::log(s.values[p.n + i]);
    base[i] = r.one_in(9) ? SPECIAL[r.below(7)] : r.number(1.0f), target[i] = r.number(1.0f), entropy[i] = r.one_in(3) ? 0.0f : r.number(1.0f);
  }
  const bool with_entropy = r.one_in(2);
  RowGrad whole{p.tile.data(), p.stride, p.n, p.v, false, p.logits, p.targets.data(), p.v0, s.values.data(), log_sum.data(), base.data(),
                target.data(), with_entropy ? entropy.data() : nullptr, nullptr, p.stride, nullptr};
  std::vector<float> apart(p.tile.size(), UNTOUCHED), in_place(p.tile);
  const auto right = gradient(p, whole, apart, 1);
  whole.tile = in_place.data();
  const auto over = gradient(p, whole, in_place, p.threads);
  for (size_t k = 0; k < right.size(); ++k) require(same(right[k], over[k]), "the gradient in place differs");

  std::vector<int64_t> rows, own_targets;
  std::vector<float> parts[5];
  const std::vector<float>* vectors[] = {&s.values, &log_sum, &base, &target, &entropy};
  for (int64_t i = r.below(p.n); i < p.n; i += 1 + r.below(4)) {
    rows.push_back(i), own_targets.push_back(p.targets[i]);
    for (int k = 0; k < 5; ++k) parts[k].push_back((*vectors[k])[i]);
  }
  const int64_t live = rows.size();
  std::vector<float> gathered((p.v - 1) * live + live), front(p.tile);
  RowGrad some{p.tile.data(), p.stride, live, p.v, false, p.logits, own_targets.data(), p.v0, parts[0].data(), parts[1].data(),
               parts[2].data(), parts[3].data(), with_entropy ? parts[4].data() : nullptr, gathered.data(), live, rows.data()};
  row_grad(some, p.threads);
  some.tile = front.data(), some.out = front.data(), some.out_stride = p.stride;
  row_grad(some, p.threads);
  for (int64_t c = 0; c < p.v; ++c)
    for (int64_t i = 0; i < live; ++i) {
      require(same(gathered[c * live + i], right[c * p.n + rows[i]]), "the gradient of gathered rows differs");
      require(same(front[c * p.stride + i], right[c * p.n + rows[i]]), "the gradient of rows gathered in place differs");
    }

  std::vector<uint16_t> kept(p.tile.size()), again(p.tile.size());
  row_exp({p.tile.data(), p.stride, p.n, p.v, p.logits, s.values.data(), kept.data(), p.stride}, p.threads);
  row_exp({p.tile.data(), p.stride, p.n, p.v, p.logits, s.values.data(), again.data(), p.stride}, 1);
  require(kept == again, "exponentials depend on the thread count");
  whole.tile = kept.data(), whole.exponentials = true, whole.logits.softcap = false, whole.logits.bias = nullptr, whole.entropy = nullptr;
  gradient(p, whole, apart, p.threads);
}

static void check_gae(Random& r) {
  const int64_t batch = 1 + r.below(9), length = 1 + r.below(70);
  std::vector<float> rewards(batch * length), values(rewards), advantages(rewards), returns(rewards);
  std::vector<uint8_t> mask(rewards.size());
  for (size_t i = 0; i < mask.size(); ++i) {
    mask[i] = !r.one_in(3);
    rewards[i] = mask[i] ? r.number(2.0f) : SPECIAL[r.below(7)], values[i] = mask[i] ? r.number(2.0f) : SPECIAL[r.below(7)];
  }
  const double gamma = r.below(1001) / 1000.0, lam = r.below(1001) / 1000.0;
  gae({rewards.data(), values.data(), mask.data(), batch, length, gamma, lam, advantages.data(), returns.data()}, 1 + r.below(4));
  for (int64_t b = 0; b < batch; ++b) {
    double next_value = 0, next = 0;
    for (int64_t i = (b + 1) * length - 1; i >= b * length; --i) {
      if (!mask[i]) {
        require(advantages[i] == 0 && returns[i] == 0, "an advantage outside the mask");
        continue;
      }
      next = rewards[i] + gamma * next_value - values[i] + gamma * lam * next, next_value = values[i];
      require(std::abs(advantages[i] - next) <= 1e-5 * (1 + std::abs(next)), "an advantage is not that of the recurrence");
    }
  }
}

// Columns more than 2^31 elements apart, in memory that is reserved and, but for a few pages, never there.
static void check_far_columns(Random& r) {
  const int64_t n = 5, v = 3, far = (int64_t{1} << 31) + 24;
  Problem p(r);
  p.n = n, p.v = v, p.stride = n, p.v0 = 1000, p.spoilt.assign(n, false), p.bias.clear(), p.logits.bias = nullptr;
  p.tile.resize(n * v);
  for (auto& x : p.tile) x = r.number(4.0f);
  p.targets.resize(n);
  for (int64_t i = 0; i < n; ++i) p.targets[i] = 1000 + i % v;
  const size_t bytes = ((v - 1) * far + n) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("no address space for far columns\n");
    return;
  }
  float* tile = static_cast<float*>(memory);
  for (int64_t c = 0; c < v; ++c)
    for (int64_t i = 0; i < n; ++i) tile[c * far + i] = p.tile[c * n + i];
  const Stats near(p, 15, 1, p.tile);
  std::vector<float> values(6 * n, 0.0f), log_sum(n), base(n, -0.5f), target(n, 0.5f), right(n * v);
  std::vector<int64_t> argmax(n, -7);
  for (int64_t i = 0; i < n; ++i) values[i] = -INF, values[2 * n + i] = UNTOUCHED, log_sum[i] = std::log(near.values[n + i]);
  row_stats({tile, far, n, v, p.logits, p.targets.data(), p.v0, values.data(), argmax.data(), true, true, true}, 2);
  for (size_t k = 0; k < values.size(); ++k) require(values[k] == near.values[k], "a statistic of far columns differs");
  require(argmax == near.argmax, "the argmax of far columns differs");
  RowGrad grad{p.tile.data(), n, n, v, false, p.logits, p.targets.data(), p.v0, values.data(), log_sum.data(), base.data(), target.data(),
               nullptr, right.data(), n, nullptr};
  row_grad(grad, 1);
  grad.tile = tile, grad.out = tile, grad.stride = grad.out_stride = far;
  row_grad(grad, 2);
  for (int64_t c = 0; c < v; ++c)
    for (int64_t i = 0; i < n; ++i) require(tile[c * far + i] == right[c * n + i], "the gradient of far columns differs");
  munmap(memory, bytes);
}

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: campaign SECONDS SEED\n"), 2;
  const double seconds = std::atof(argv[1]);
  const auto start = std::chrono::steady_clock::now();
  std::vector<const char*> sets;
  for (const char* name : {"baseline", "avx2", "avx512"})
    if (choose_kernels(name)) sets.push_back(name);
  long long cases = 0;
  for (case_seed = std::strtoull(argv[2], nullptr, 10);; ++case_seed) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    isa = sets[cases++ % sets.size()];
    choose_kernels(isa);
    Random r{case_seed * 0x2545f4914f6cdd1du};
    Problem p(r);
    std::vector<float> sound(p.tile);  // the same, without what is special
    for (int64_t c = 0; c < p.v; ++c)
      for (int64_t i = 0; i < p.n; ++i)
        if (p.spoilt[i]) sound[c * p.stride + i] = 0.5f;
    const uint64_t flags = r.below(16);
    const Stats stats(p, flags, p.threads, p.tile);
    check_stats(p, stats, Stats(p, flags, 1, p.tile), Stats(p, flags, p.threads, sound));
    check_grad(p, stats, r);
    check_gae(r);
    if (cases <= (long long)sets.size()) check_far_columns(r);
  }
  std::printf("%lld cases, %zu instruction sets\n", cases, sets.size());
}
