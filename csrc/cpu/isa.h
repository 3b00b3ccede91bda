// Which instruction sets this machine has, and which level the kernels use.
#pragma once
#include <type_traits>

#include "cpu/lowrank.h"

namespace loraxs::cpu {

enum class Isa : int { portable, avx2, avx512, avx512_bf16, amx_bf16 };
constexpr int kIsaCount = 5;
constexpr const char* kIsaNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// The highest level that this build contains, this CPU has and this kernel permits; each level includes those below.
Isa best_isa();

// The level in use: best_isa(), capped by the environment variable LORAXS_CPU_ISA and by set_isa.
Isa isa();

// Kernels of the level in use.
const Kernels& kernels();

// The same for elements T: fp64 has one level only.
template <class T>
const auto& table() {
  if constexpr (std::is_same_v<T, double>)
    return portable_kernels64;
  else
    return kernels();
}

}  // namespace loraxs::cpu

extern "C" {
// For loraxs_ext._C, which finds these in the loaded _ops.so. set: 0, or -1 when the name is unknown or too high.
[[gnu::visibility("default")]] const char* loraxs_cpu_isa();
[[gnu::visibility("default")]] int loraxs_set_cpu_isa(const char* name);
}
