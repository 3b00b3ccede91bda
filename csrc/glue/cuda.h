// What the CUDA owners need of torch: its stream, its allocator, dtypes.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/dtype.h"
#include "glue/contract.h"

namespace loraxs {

// The stream that torch's operations run on now; throws if torch was built without CUDA.
cudaStream_t current_stream(int32_t device);

// Major compute capability; 0 where there is no such device.
int capability_major(int32_t device);

cuda::Dtype dtype_of(ScalarType t);

// Uninitialised and contiguous, from torch's caching allocator, which knows streams and graphs.
Tensor empty_cuda(const int64_t* sizes, int64_t dim, ScalarType dtype, int32_t device);

// Contiguous from an address that is a multiple of 16 bytes on; a copy where it is not.
Tensor aligned(const Tensor& t);

// Throws if a launch went wrong.
void expect_launched(const char* op, cudaError_t error);

}  // namespace loraxs
