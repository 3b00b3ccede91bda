#include "glue/cuda.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>

namespace loraxs {

// The symbol lives in libtorch_cuda, which a CPU-only torch does not have and torch loads privately: ask the loaded
// library, so that this module also imports without it.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (get == nullptr) throw std::runtime_error("loraxs: this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int capability_major(int32_t device) {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess ? major : 0;
}

cuda::Dtype dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::BFloat16:
      return cuda::Dtype::bf16;
    case ScalarType::Half:
      return cuda::Dtype::f16;
    case ScalarType::Double:
      return cuda::Dtype::f64;
    default:
      return cuda::Dtype::f32;
  }
}

Tensor empty_cuda(const int64_t* sizes, int64_t dim, ScalarType dtype, int32_t device) {
  return empty_on(sizes, dim, dtype, aoti_torch_device_type_cuda(), device);
}

Tensor aligned(const Tensor& t) {
  const Tensor rows = dense(t);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

void expect_launched(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("loraxs::") + op + ": " + cudaGetErrorString(error));
}

}  // namespace loraxs
