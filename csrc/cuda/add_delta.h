// Launcher of the CUDA add_delta: raw pointers and a stream, so that neither side sees the other's headers.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace loraxs::cuda {

constexpr int kMaxAddDeltaRank = 384;

struct AddDeltaArgs {
  void* y;
  const void *x, *a, *bt, *pages;
  int64_t page_stride;
  const int32_t* slots;
  const int64_t* rng;
  uint32_t cutoff;
  int64_t M, K, N, S;
  int r;
  double scale, keep_scale;
  Dtype dtype, pages_dtype;
};

// Shapes and meanings as in kernels/add_delta.cuh; r <= kMaxAddDeltaRank.
cudaError_t add_delta(const AddDeltaArgs& args, cudaStream_t stream);

}  // namespace loraxs::cuda
