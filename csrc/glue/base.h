// The base model's matrix products, done by torch.
#pragma once
#include "glue/contract.h"

namespace loraxs {

// What torch's linear gives for these arguments, bit for bit; contiguous.
Tensor base_linear(const Problem& g, const Tensor& x, const Tensor& weight, const MaybeTensor& bias);

// Whether a product with these rows reads them and the weight as plain matrices.
bool is_one_product(const Tensor& rows, const Tensor& weight);

// dy W; contiguous.
Tensor base_backward(const Problem& g, const Tensor& dy, const Tensor& weight);

}  // namespace loraxs
