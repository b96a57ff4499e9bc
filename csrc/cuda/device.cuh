// What the kernels need of the machine, one thin function each: clusters, distributed shared memory, bulk copies, exp2.
// Tests replace this file by an emulation on the host (tests/csrc/emulated_device.h), so kernels use nothing else.
#ifndef FASTALIGN_DEVICE_CUH
#define FASTALIGN_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FASTALIGN_DEVICE __device__ __forceinline__

namespace fastalign::device {

using Barrier = uint64_t;

FASTALIGN_DEVICE int thread() { return threadIdx.x; }
FASTALIGN_DEVICE int64_t block() { return blockIdx.x; }
FASTALIGN_DEVICE void block_sync() { __syncthreads(); }

template <class T>
FASTALIGN_DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

FASTALIGN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- clusters: all blocks arrive, then wait; what was written before arriving is seen after waiting

FASTALIGN_DEVICE int cluster_rank() { uint32_t r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
FASTALIGN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
FASTALIGN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Writes to the same place in the shared memory of another block of the cluster.
FASTALIGN_DEVICE void push(const float* place, int rank, float value) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(place)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// ---- bulk copies: one thread starts them, and announces their bytes to a barrier that everyone waits on

FASTALIGN_DEVICE void barrier_init(Barrier* b) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory");
}
FASTALIGN_DEVICE void barriers_are_initialised() {  // to the unit that copies
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// bytes and both addresses are multiples of 16.
FASTALIGN_DEVICE void bulk_load(float* shared, const float* global, uint32_t bytes, Barrier* b) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(b))
               : "memory");
}
FASTALIGN_DEVICE void barrier_wait(Barrier* b) {  // for its first completion
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(b))
      : "memory");
}

// ---- numbers

FASTALIGN_DEVICE float exp2_approx(float x) {  // 2 ulp; 2^0 = 1 exactly; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTALIGN_DEVICE float divide_approx(float a, float b) { return __fdividef(a, b); }  // 2 ulp; b beyond 2^126 gives 0

struct Bf16 { __nv_bfloat16 x; };
struct Fp16 { __half x; };

FASTALIGN_DEVICE void store(float* p, float a) { *p = a; }
FASTALIGN_DEVICE void store(Bf16* p, float a) { p->x = __float2bfloat16_rn(a); }
FASTALIGN_DEVICE void store(Fp16* p, float a) { p->x = __float2half_rn(a); }

// Four neighbours at once; p is aligned to them.
FASTALIGN_DEVICE void store4(float* p, const float (&g)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(g[0], g[1], g[2], g[3]);
}
FASTALIGN_DEVICE void store4(Bf16* p, const float (&g)[4]) {
  __nv_bfloat162 h[2] = {__floats2bfloat162_rn(g[0], g[1]), __floats2bfloat162_rn(g[2], g[3])};
  *reinterpret_cast<uint2*>(p) = *reinterpret_cast<uint2*>(h);
}
FASTALIGN_DEVICE void store4(Fp16* p, const float (&g)[4]) {
  __half2 h[2] = {__floats2half2_rn(g[0], g[1]), __floats2half2_rn(g[2], g[3])};
  *reinterpret_cast<uint2*>(p) = *reinterpret_cast<uint2*>(h);
}
FASTALIGN_DEVICE void load4(float (&x)[4], const float* shared) {
  const float4 v = *reinterpret_cast<const float4*>(shared);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

}  // namespace fastalign::device

#endif
