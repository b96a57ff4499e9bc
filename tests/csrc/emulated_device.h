// Stands in for csrc/cuda/device.cuh on a host: one cluster of blocks, every CUDA thread a fiber of this thread.
//
// Fibers run until they have to wait, in an order drawn anew for every round from a seed: a missing barrier shows as a
// result that depends on the seed. Bulk copies happen at once or as late as they may, also by the seed. Shared memory
// starts as NaN, ends with a canary, and accesses that must be aligned are checked to be.
#ifndef FASTALIGN_DEVICE_CUH
#define FASTALIGN_DEVICE_CUH

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define FASTALIGN_DEVICE inline

namespace fastalign::device {

using Barrier = uint64_t;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}
inline void require(bool ok, const char* what) {
  if (!ok) fail(what);
}
inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

struct Meeting {  // of all threads of a warp, a block or a cluster
  int size = 0, arrived = 0;
  int64_t generation = 0;
  int64_t arrive() {
    const int64_t mine = generation;
    if (++arrived == size) arrived = 0, ++generation;
    return mine;
  }
};

struct Copy {
  float* to;
  const float* from;
  uint32_t bytes;
};

struct Block {
  Meeting meeting;
  std::vector<Meeting> warps;
  std::vector<std::vector<float>> lanes;
  std::vector<uint64_t> memory;
  std::vector<std::pair<Barrier*, std::vector<Copy>>> copies;  // of each barrier, those under way
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int thread, rank;
  int64_t cluster_phase = 0;
  bool done = false;
};

struct Machine {
  int64_t row = 0, shared_bytes = 0, progress = 0;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Meeting cluster;
  std::mt19937 random;
  bool copy_late = false;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  std::function<void(char*)> kernel;

  Block& block() { return blocks[now->rank]; }
  char* shared(int rank) { return reinterpret_cast<char*>(blocks[rank].memory.data()); }
  void yield() { swapcontext(&now->context, &scheduler); }
  void wait(const Meeting& meeting, int64_t generation) {
    while (meeting.generation == generation) yield();
    ++progress;
  }

  static void enter();

  // Runs kernel(shared memory) in every thread of one cluster, that of `which_row`.
  void run(int64_t which_row, int threads, int cluster_size, int64_t bytes, int seed) {
    row = which_row, shared_bytes = bytes, random.seed(seed), copy_late = seed % 2;
    blocks.assign(cluster_size, {});
    cluster = {threads * cluster_size};
    for (Block& b : blocks) {
      b.meeting = {threads};
      b.warps.assign(threads / 32, {32});
      b.lanes.assign(threads / 32, std::vector<float>(32));
      b.memory.assign((bytes + 7) / 8 + 16, 0x7fc000007fc00000);  // two NaNs
    }
    fibers.clear();
    fibers.resize(threads * cluster_size);
    std::vector<int> order;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& f = fibers[i];
      f.thread = i % threads, f.rank = i / threads;
      constexpr size_t STACK = 64 * 1024;
      f.stack.reset(new char[STACK]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = STACK, f.context.uc_link = &scheduler;
      makecontext(&f.context, enter, 0);
      order.push_back(i);
    }
    size_t left = fibers.size();
    while (left) {
      const int64_t before = progress;
      std::shuffle(order.begin(), order.end(), random);
      for (int i : order) {
        now = &fibers[i];
        if (now->done) continue;
        swapcontext(&scheduler, &now->context);
        if (now->done) --left, ++progress;
      }
      require(progress != before, "deadlock");
    }
    for (Block& b : blocks) {
      for (size_t i = (bytes + 7) / 8; i < b.memory.size(); ++i)
        require(b.memory[i] == 0x7fc000007fc00000, "shared memory was written past its end");
      for (auto& [barrier, copies] : b.copies) require(copies.empty(), "a copy was never waited for");
    }
  }
};

inline Machine machine;
inline void Machine::enter() {
  machine.kernel(machine.shared(machine.now->rank));
  machine.now->done = true;
}

inline int thread() { return machine.now->thread; }
inline int64_t block() { return machine.row * static_cast<int64_t>(machine.blocks.size()) + machine.now->rank; }
inline void block_sync() {
  Meeting& m = machine.block().meeting;
  machine.wait(m, m.arrive());
}

template <class T>
T shuffle_xor(T x, int mask) {
  static_assert(sizeof(T) == sizeof(float));
  const int lane = thread() % 32, warp = thread() / 32;
  Meeting& meeting = machine.block().warps[warp];
  std::vector<float>& lanes = machine.block().lanes[warp];
  std::memcpy(&lanes[lane], &x, sizeof x);
  machine.wait(meeting, meeting.arrive());
  T other;
  std::memcpy(&other, &lanes[lane ^ mask], sizeof other);
  machine.wait(meeting, meeting.arrive());
  return other;
}

inline int cluster_rank() { return machine.now->rank; }
inline void cluster_arrive() { machine.cluster.arrive(); }
inline void cluster_wait() {
  machine.wait(machine.cluster, machine.now->cluster_phase);
  ++machine.now->cluster_phase;
}
inline void push(const float* place, int rank, float value) {
  require(machine.cluster.generation > 0, "another block's memory was written before that block had surely begun");
  const auto offset = reinterpret_cast<const char*>(place) - machine.shared(machine.now->rank);
  require(offset >= 0 && offset + 4 <= machine.shared_bytes, "push from outside of shared memory");
  std::memcpy(machine.shared(rank) + offset, &value, 4);
}

inline void perform(std::vector<Copy>& copies) {
  for (const Copy& c : copies) std::memcpy(c.to, c.from, c.bytes);
  copies.clear();
}
inline std::vector<Copy>& copies_of(Barrier* b) {
  for (auto& [barrier, copies] : machine.block().copies)
    if (barrier == b) return copies;
  fail("a barrier was used before it was initialised");
}
inline void barrier_init(Barrier* b) { machine.block().copies.push_back({b, {}}); }
inline void barriers_are_initialised() {}
inline void bulk_load(float* shared, const float* global, uint32_t bytes, Barrier* b) {
  require(bytes > 0 && bytes % 16 == 0 && aligned(shared, 16) && aligned(global, 16), "bulk copy is not aligned");
  const auto offset = reinterpret_cast<char*>(shared) - machine.shared(machine.now->rank);
  require(offset >= 0 && offset + bytes <= machine.shared_bytes, "bulk copy past the end of shared memory");
  copies_of(b).push_back({shared, global, bytes});
  if (!machine.copy_late) perform(copies_of(b));
}
inline void barrier_wait(Barrier* b) { perform(copies_of(b)); }

inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float divide_approx(float a, float b) { return a / b; }

struct Bf16 { uint16_t bits; };
struct Fp16 { _Float16 x; };

inline void store(float* p, float a) { *p = a; }
inline void store(Bf16* p, float a) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  p->bits = a != a ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline void store(Fp16* p, float a) { p->x = static_cast<_Float16>(a); }
template <class T>
void store4(T* p, const float (&g)[4]) {
  require(aligned(p, 4 * sizeof(T)), "store of four is not aligned");
  for (int k = 0; k < 4; ++k) store(p + k, g[k]);
}
inline void load4(float (&x)[4], const float* shared) {
  require(aligned(shared, 16), "load of four is not aligned");
  std::memcpy(x, shared, sizeof x);
}

}  // namespace fastalign::device

#endif
