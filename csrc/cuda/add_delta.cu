#include "cuda/add_delta.h"
#include "kernels/add_delta.cuh"

namespace loraxs::cuda {
namespace {

static_assert(kMaxAddDeltaRank == kMaxRank);

template <class A, class T, class P>
cudaError_t launch(const AddDeltaArgs& g, cudaStream_t stream) {
  const AddDelta<T, P> args{static_cast<T*>(g.y),
                            static_cast<const T*>(g.x),
                            static_cast<const T*>(g.a),
                            static_cast<const T*>(g.bt),
                            static_cast<const P*>(g.pages),
                            g.page_stride,
                            g.slots,
                            g.rng,
                            g.cutoff,
                            g.M,
                            g.K,
                            g.N,
                            g.S,
                            g.r,
                            g.scale,
                            g.keep_scale};
  const unsigned blocks = unsigned((g.M + kTokens - 1) / kTokens);
  add_delta_kernel<A, T, P><<<blocks, kThreads, size_t(2 * kTokens * g.r) * sizeof(A), stream>>>(args);
  return cudaGetLastError();
}

template <class A, class T>
cudaError_t launch_pages(const AddDeltaArgs& g, cudaStream_t stream) {
  return g.pages_dtype == g.dtype ? launch<A, T, T>(g, stream) : launch<A, T, float>(g, stream);
}

}  // namespace

cudaError_t add_delta(const AddDeltaArgs& g, cudaStream_t stream) {
  switch (g.dtype) {
    case Dtype::f32:
      return launch<float, float, float>(g, stream);
    case Dtype::bf16:
      return launch_pages<float, __nv_bfloat16>(g, stream);
    case Dtype::f16:
      return launch_pages<float, __half>(g, stream);
    case Dtype::f64:
      return launch_pages<double, double>(g, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace loraxs::cuda
