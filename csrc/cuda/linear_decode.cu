#include <atomic>

#include "cuda/linear_decode.h"
#include "kernels/linear_decode.cuh"
#include "kernels/linear_project.cuh"

namespace loraxs::cuda {
namespace {

// One launch attribute list for all kernels here. A cluster spans the grid's x.
template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared, bool cluster, bool early,
                   const Args& args, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (cluster) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {grid.x, 1, 1};
  }
  if (early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// More shared memory than the default has to be allowed once per kernel and device.
template <auto kKernel>
cudaError_t allow_shared(int bytes) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (device < 64 && (done.load() & bit)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < 64) done |= bit;
  return error;
}

template <class T>
cudaError_t run(const LinearDecodeArgs& g, const decode::Plan& plan, cudaStream_t stream) {
  const bool wide_pages = g.pages_dtype == Dtype::f32;
  const auto* x = static_cast<const T*>(g.x);
  const auto* a = static_cast<const T*>(g.a);
  const int M = int(g.M), K = int(g.K), N = int(g.N);
  decode::Args<T> args{static_cast<T*>(g.y),
                       g.p,
                       static_cast<const T*>(g.bias),
                       {x, static_cast<const T*>(g.w), a, M, N, K, g.r},
                       static_cast<const T*>(g.bt),
                       g.pages,
                       g.page_stride,
                       g.slots,
                       nullptr,
                       nullptr,
                       nullptr,
                       g.S,
                       plan.splits,
                       float(g.scale),
                       wide_pages,
                       decode::whole_pieces(g.pages, g.page_stride, g.r, wide_pages ? sizeof(float) : sizeof(T))};
  if (plan.two_kernels) {
    args.q = g.workspace;
    const project::Args<T> first{g.p, g.workspace, x,   a,   g.pages,        g.page_stride, g.slots,
                                 M,   K,           g.r, g.S, float(g.scale), wide_pages};
    const dim3 grid(project::kBlocks, unsigned((M + project::kTokens - 1) / project::kTokens));
    const cudaError_t error = launch(project::linear_project_kernel<T>, grid, project::kThreads,
                                     project::shared_bytes(g.r), true, false, first, stream);
    if (error != cudaSuccess) return error;
  } else if (plan.parts_in_global()) {
    args.parts = g.workspace;
    args.counters = reinterpret_cast<unsigned*>(g.workspace + plan.parts());
    const cudaError_t error = cudaMemsetAsync(args.counters, 0, size_t(plan.tiles) * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  return decode::choose(plan, [&]<int kTokenTiles, int kRankTiles, class Copies, bool kCluster>() {
    constexpr auto kKernel = decode::linear_decode_kernel<T, kTokenTiles, kRankTiles, Copies, kCluster>;
    constexpr int kShared = Copies::template Pipe<T, kTokenTiles, kRankTiles>::kBytes;
    const cudaError_t error = allow_shared<kKernel>(kShared);
    if (error != cudaSuccess) return error;
    return launch(kKernel, dim3(unsigned(plan.splits), unsigned(plan.tiles)), decode::kThreads, kShared, kCluster,
                  kRankTiles == 0, args, stream);
  });
}

}  // namespace

cudaError_t linear_decode(const LinearDecodeArgs& g, const decode::Plan& plan, cudaStream_t stream) {
  switch (g.dtype) {
    case Dtype::bf16:
      return run<__nv_bfloat16>(g, plan, stream);
    case Dtype::f16:
      return run<__half>(g, plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace loraxs::cuda
