// Generalised advantage estimation, a sequence at a time from its last token; in double, which costs nothing here.
#include "fastalign/scans.h"

#include "fastalign/parallel.h"

namespace fastalign {

void gae(const Gae& a, int threads) {
  parallel_for(a.batch, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      int64_t at = row * a.length;
      double next_value = 0, next_advantage = 0;
      for (int64_t i = at + a.length - 1; i >= at; --i) {
        if (!a.mask[i]) {
          a.advantages[i] = a.returns[i] = 0;
          continue;
        }
        double value = a.values[i];
        next_advantage = a.rewards[i] + a.gamma * next_value - value + a.gamma * a.lam * next_advantage;
        next_value = value;
        a.advantages[i] = static_cast<float>(next_advantage);
        a.returns[i] = static_cast<float>(next_advantage + value);
      }
    }
  });
}

}  // namespace fastalign
