// The CUDA add_delta kernel as a C function on CPU memory, for python_tests/ops/test_cuda_kernels.py.
#include "kernels/add_delta.cuh"

namespace {

using namespace loraxs;

template <class A, class T, class P>
void run(void* y, const void* x, const void* a, const void* bt, const void* pages, const int32_t* slots,
         const int64_t* rng, uint32_t cutoff, const int64_t* sizes, double scale, double keep_scale) {
  const int64_t M = sizes[0], K = sizes[1], N = sizes[2], r = sizes[3], S = sizes[4], page_stride = sizes[5];
  const AddDelta<T, P> g{static_cast<T*>(y),
                         static_cast<const T*>(x),
                         static_cast<const T*>(a),
                         static_cast<const T*>(bt),
                         static_cast<const P*>(pages),
                         page_stride,
                         slots,
                         rng,
                         cutoff,
                         M,
                         K,
                         N,
                         S,
                         int(r),
                         scale,
                         keep_scale};
  simt::launch(add_delta_kernel<A, T, P>,
               {{unsigned((M + kTokens - 1) / kTokens), 1}, kThreads, size_t(2 * kTokens * r) * sizeof(A)}, g);
}

}  // namespace

#define LORAXS_EXPORT(name, A, T, P)                                                                                   \
  extern "C" void name(void* y, const void* x, const void* a, const void* bt, const void* pages, const int32_t* slots, \
                       const int64_t* rng, uint32_t cutoff, const int64_t* sizes, double scale, double keep_scale) {   \
    run<A, T, P>(y, x, a, bt, pages, slots, rng, cutoff, sizes, scale, keep_scale);                                    \
  }
LORAXS_EXPORT(add_delta_fp32, float, float, float)
LORAXS_EXPORT(add_delta_bf16, float, Bfloat16, Bfloat16)
LORAXS_EXPORT(add_delta_bf16_fp32_pages, float, Bfloat16, float)
LORAXS_EXPORT(add_delta_fp64, double, double, double)
