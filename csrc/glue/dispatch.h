// From the dtypes of a call to the C++ types of its kernels.
#pragma once
#include "cpu/driver.h"
#include "glue/contract.h"

namespace loraxs {

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T, class P>
struct Types {
  using Element = T;
  using Page = P;
};

// Calls fn(Types<T, P>{}) for a checked combination of element and page dtype.
template <class F>
void visit_dtypes(const Problem& g, const F& fn) {
  const bool wide_pages = g.pages_dtype == ScalarType::Float;
  switch (g.dtype) {
    case ScalarType::BFloat16:
      return wide_pages ? fn(Types<cpu::bf16, float>{}) : fn(Types<cpu::bf16, cpu::bf16>{});
    case ScalarType::Half:
      return wide_pages ? fn(Types<cpu::f16, float>{}) : fn(Types<cpu::f16, cpu::f16>{});
    case ScalarType::Double:
      return wide_pages ? fn(Types<double, float>{}) : fn(Types<double, double>{});
    default:
      return fn(Types<float, float>{});
  }
}

// out = in + low-rank part; p [M, r] is written. `in` and `out` are contiguous, and may be the same tensor.
void add_low_rank(const Problem& g, const Tensor& in, const Tensor& x, const Tensor& a, const Tensor& b,
                  const Tensor& pages, const int32_t* slots, double scale, const Tensor& out, const Tensor& p);

}  // namespace loraxs
