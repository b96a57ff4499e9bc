// Runs every kernel of every instruction set on exactly sized heap buffers, odd sizes included, under the sanitizers.
// Numbers are checked elsewhere; here a result must be finite, equal between thread counts, and stay in its buffer.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fastalign/row_kernels.h"

using namespace fastalign;

static void require(bool ok, const char* what, const char* isa, int64_t n, int64_t v) {
  if (ok) return;
  std::fprintf(stderr, "%s: %s at n=%ld v=%ld\n", isa, what, (long)n, (long)v);
  std::exit(1);
}

// The gradient of some rows, gathered to the front of a tile of its own and of the tile itself, is that of all rows.
static void check_gathered(const char* isa, int64_t n, int64_t v, int64_t stride, const std::vector<float>& tile, const Logits& logits,
                           const std::vector<int64_t>& targets, const std::vector<float>& maximum, const std::vector<float>& log_sum,
                           const std::vector<float>& base, const std::vector<float>& target, const std::vector<float>& entropy) {
  std::vector<float> whole(tile.size());
  row_grad({tile.data(), stride, n, v, false, logits, targets.data(), 100, maximum.data(), log_sum.data(), base.data(), target.data(),
            entropy.data(), whole.data(), stride, nullptr}, 1);
  std::vector<int64_t> rows, own_targets;
  std::vector<float> parts[5];  // exactly as long as there are rows
  const std::vector<float>* vectors[5] = {&maximum, &log_sum, &base, &target, &entropy};
  for (int64_t i = n > 1 ? 1 : 0; i < n; i += 1 + std::rand() % 3) {
    rows.push_back(i), own_targets.push_back(targets[i]);
    for (int k = 0; k < 5; ++k) parts[k].push_back((*vectors[k])[i]);
  }
  const int64_t live = rows.size();
  std::vector<float> apart((v - 1) * live + live), in_place(tile);
  RowGrad grad{tile.data(), stride, live, v, false, logits, own_targets.data(), 100, parts[0].data(), parts[1].data(), parts[2].data(),
               parts[3].data(), parts[4].data(), apart.data(), live, rows.data()};
  row_grad(grad, 3);
  grad.tile = in_place.data(), grad.out = in_place.data(), grad.out_stride = stride;
  row_grad(grad, 3);
  for (int64_t c = 0; c < v; ++c)
    for (int64_t i = 0; i < live; ++i) {
      require(apart[c * live + i] == whole[c * stride + rows[i]], "gradient of gathered rows differs", isa, n, v);
      require(in_place[c * stride + i] == whole[c * stride + rows[i]], "gradient of rows gathered in place differs", isa, n, v);
    }
}

static void check(const char* isa, int64_t n, int64_t v, int64_t stride, bool softcap, bool with_bias) {
  // the last column ends with its last row: a read or write past it leaves the allocation
  std::vector<float> tile((v - 1) * stride + n), bias(v), values[2];
  for (auto& x : tile) x = (std::rand() % 2000 - 1000) / 200.0f;
  for (auto& x : bias) x = (std::rand() % 2000 - 1000) / 500.0f;
  std::vector<int64_t> targets(n), argmax(n);
  for (auto& t : targets) t = 100 + std::rand() % (v + 2) - 1;  // some outside the slab
  targets[0] = n % 2 ? INT64_MIN : INT64_MAX;  // as far as a target can be
  Logits logits{softcap ? 0.2f : 1.3f, 5.0f, softcap, with_bias ? bias.data() : nullptr};
  for (int threads : {1, 3}) {
    auto& state = values[threads == 3];
    state.assign(6 * n, 0.0f);
    for (int64_t i = 0; i < n; ++i) state[i] = -INFINITY;
    row_stats({tile.data(), stride, n, v, logits, targets.data(), 100, state.data(), argmax.data(), true, true, true}, threads);
  }
  for (int64_t i = 0; i < 6 * n; ++i) {
    require(std::isfinite(values[0][i]), "statistic is not finite", isa, n, v);
    require(values[0][i] == values[1][i], "statistic depends on the thread count", isa, n, v);
  }
  for (int64_t i = 0; i < n; ++i) require(argmax[i] >= 100 && argmax[i] < 100 + v, "argmax is out of range", isa, n, v);
  std::vector<float> log_sum(n), base(n, -0.5f), target(n, 0.3f), entropy(n, 0.1f), out(tile.size());
  for (int64_t i = 0; i < n; ++i) log_sum[i] = std::log(values[0][n + i]);
  for (const float* e : {(const float*)nullptr, (const float*)entropy.data()}) {
    std::vector<float> in_place(tile);
    RowGrad grad{tile.data(), stride, n, v, false, logits, targets.data(), 100, values[0].data(), log_sum.data(), base.data(),
                 target.data(), e, out.data(), stride, nullptr};
    row_grad(grad, 3);
    grad.tile = in_place.data(), grad.out = in_place.data();
    row_grad(grad, 1);
    for (int64_t c = 0; c < v; ++c)
      for (int64_t i = 0; i < n; ++i) {
        require(std::isfinite(out[c * stride + i]), "gradient is not finite", isa, n, v);
        require(out[c * stride + i] == in_place[c * stride + i], "gradient in place differs", isa, n, v);
      }
  }
  check_gathered(isa, n, v, stride, tile, logits, targets, values[0], log_sum, base, target, entropy);
  std::vector<uint16_t> kept(tile.size());
  row_exp({tile.data(), stride, n, v, logits, values[0].data(), kept.data(), stride}, 3);
  logits.softcap = false;
  row_grad({kept.data(), stride, n, v, true, logits, targets.data(), 100, nullptr, log_sum.data(), base.data(), target.data(),
            nullptr, out.data(), stride, nullptr}, 3);
}

int main() {
  int tested = 0;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!choose_kernels(isa)) continue;
    ++tested;
    for (int64_t n : {1, 3, 15, 16, 17, 64, 65, 300})
      for (int64_t v : {1, 2, 31, 32, 33, 70})
        for (int flags = 0; flags < 4; ++flags) check(isa, n, v, n + (flags & 1) * 5, flags & 1, flags & 2);
  }
  require(!choose_kernels("tpu"), "an unknown instruction set was accepted", "tpu", 0, 0);
  std::printf("%d instruction sets\n", tested);
}
