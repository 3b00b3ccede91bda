// CPU features by cpuid, xgetbv and, for AMX, the kernel's permission.
#pragma once

namespace loraxs::cpu {

struct Features {
  bool avx2, avx512, avx512_bf16, amx_bf16;
};

// Asks the CPU and the operating system; on other architectures than x86-64 everything is false.
Features detect_features();

}  // namespace loraxs::cpu
