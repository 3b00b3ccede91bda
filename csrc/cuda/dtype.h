#pragma once

namespace loraxs::cuda {

enum class Dtype { f32, bf16, f16, f64 };

}  // namespace loraxs::cuda
