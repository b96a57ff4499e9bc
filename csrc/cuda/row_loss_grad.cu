// Launches of the kernel in row_loss_grad.cuh, and its instances.
#include "row_loss_grad.cuh"

#include <cuda_runtime.h>

#include "launch.h"

namespace fastalign {
namespace {

constexpr int THREADS = 256, CHUNK = 4096;
static_assert(MAX_CHUNKS * CHUNK * 4 >= SHARED_LIMIT - SHARED_HEADER);

template <class OUT, bool SOFTCAP, bool SUMS>
__global__ void __launch_bounds__(THREADS, 3) row_loss_grad_kernel(const RowLossGrad a, const ClusterShape shape, bool aligned) {
  extern __shared__ __align__(128) char memory[];
#if __CUDA_ARCH__ >= 900
  Row<THREADS, CHUNK, OUT, SOFTCAP, SUMS>(a, shape, aligned, memory).run();
#endif
}

using Kernel = void (*)(RowLossGrad, ClusterShape, bool);

template <class OUT>
Kernel instance(bool softcap, bool sums) {
  if (softcap) return sums ? row_loss_grad_kernel<OUT, true, true> : row_loss_grad_kernel<OUT, true, false>;
  return sums ? row_loss_grad_kernel<OUT, false, true> : row_loss_grad_kernel<OUT, false, false>;
}

Kernel instance(Element out, bool softcap, bool sums) {
  switch (out) {
    case Element::float32: return instance<float>(softcap, sums);
    case Element::bfloat16: return instance<device::Bf16>(softcap, sums);
    default: return instance<device::Fp16>(softcap, sums);
  }
}

bool multiple(const void* p, int64_t stride_bytes, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0 && stride_bytes % bytes == 0;
}

}  // namespace

const char* row_loss_grad(const RowLossGrad& a, Element out, bool softcap, bool sums, void* stream) {
  const int64_t element = out == Element::float32 ? 4 : 2;
  const bool aligned = multiple(a.tile, 4 * a.tile_stride, 16) && multiple(a.out, element * a.out_stride, 4 * element);
  const ClusterShape shape = cluster_shape(a.v);
  const Kernel kernel = instance(out, softcap, sums);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(SHARED_LIMIT));
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(a.n * shape.cluster));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster, config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, a, shape, aligned);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* why_not(int device) {
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (major < 9) return "it needs thread block clusters (compute capability 9.0 or later)";
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, instance(Element::bfloat16, false, false));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastalign
