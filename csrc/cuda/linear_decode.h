// Launcher of the CUDA linear for few tokens: raw pointers and a stream, so that neither side sees the other's headers.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"
#include "kernels/linear_decode_plan.h"

namespace loraxs::cuda {

struct LinearDecodeArgs {
  void* y;
  float* p;
  const void *x, *w, *bias, *a, *bt, *pages;  // bias may be null
  int64_t page_stride;
  const int32_t* slots;  // may be null
  int64_t M, K, N, S;
  int r;
  double scale;
  Dtype dtype, pages_dtype;
  float* workspace;  // plan.workspace(M, r) floats
};

// Shapes and meanings as in kernels/linear_decode.cuh; `plan` is that of these shapes, and fits. Where parts meet in
// global memory, their counters are cleared in the stream first.
cudaError_t linear_decode(const LinearDecodeArgs& args, const decode::Plan& plan, cudaStream_t stream);

}  // namespace loraxs::cuda
