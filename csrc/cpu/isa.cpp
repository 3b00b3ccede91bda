#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/features.h"

namespace loraxs::cpu {
namespace {

#if LORAXS_X86
const Kernels* const kTables[kIsaCount] = {&portable_kernels, &avx2_kernels, &avx512_kernels, &avx512_bf16_kernels,
                                           &amx_bf16_kernels};
#else
const Kernels* const kTables[kIsaCount] = {&portable_kernels};
#endif

int find(const char* name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (std::strcmp(name, kIsaNames[i]) == 0) return i;
  return -1;
}

int initial() {
  const char* cap = std::getenv("LORAXS_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return int(best_isa());
  const int level = find(cap);
  if (level < 0)
    throw std::invalid_argument("LORAXS_CPU_ISA must be portable, avx2, avx512, avx512_bf16 or amx_bf16, got '" +
                                std::string(cap) + "'");
  return std::min(level, int(best_isa()));
}

std::atomic<int>& current() {
  static std::atomic<int> level{initial()};
  return level;
}

}  // namespace

Isa best_isa() {
#if LORAXS_X86
  static const Isa best = [] {
    const Features f = detect_features();
    return f.amx_bf16      ? Isa::amx_bf16
           : f.avx512_bf16 ? Isa::avx512_bf16
           : f.avx512      ? Isa::avx512
           : f.avx2        ? Isa::avx2
                           : Isa::portable;
  }();
  return best;
#else
  return Isa::portable;
#endif
}

Isa isa() { return Isa(current().load(std::memory_order_relaxed)); }

const Kernels& kernels() { return *kTables[int(isa())]; }

}  // namespace loraxs::cpu

const char* loraxs_cpu_isa() { return loraxs::cpu::kIsaNames[int(loraxs::cpu::isa())]; }

int loraxs_set_cpu_isa(const char* name) {
  const int level = loraxs::cpu::find(name);
  if (level < 0 || level > int(loraxs::cpu::best_isa())) return -1;
  loraxs::cpu::current().store(level, std::memory_order_relaxed);
  return 0;
}
