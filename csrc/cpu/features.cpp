#include "cpu/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace loraxs::cpu {
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r;
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Which register files the operating system saves on a context switch.
uint64_t xcr0() {
  uint32_t lo, hi;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return uint64_t(hi) << 32 | lo;
}

// Linux grants the 8 KiB of tile state on request only, once for the whole process.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr bool has(uint32_t word, int bit) { return word >> bit & 1; }

}  // namespace

Features detect_features() {
  const Registers basic = cpuid(1, 0), ext = cpuid(7, 0), ext1 = cpuid(7, 1);
  Features f{};
  if (!has(basic.c, 27)) return f;  // no OSXSAVE: xgetbv would fault
  const uint64_t saved = xcr0();
  const bool ymm = (saved & 0x6) == 0x6, zmm = ymm && (saved & 0xe0) == 0xe0, tiles = (saved & 0x60000) == 0x60000;
  const bool fma = has(basic.c, 12), f16c = has(basic.c, 29), bmi2 = has(ext.b, 8);
  f.avx2 = ymm && fma && f16c && bmi2 && has(ext.b, 5);
  const bool f_dq_bw_vl = has(ext.b, 16) && has(ext.b, 17) && has(ext.b, 30) && has(ext.b, 31);
  f.avx512 = f.avx2 && zmm && f_dq_bw_vl;
  f.avx512_bf16 = f.avx512 && has(ext1.a, 5);
  f.amx_bf16 = f.avx512_bf16 && tiles && has(ext.d, 22) && has(ext.d, 24) && request_tiles();
  return f;
}

}  // namespace loraxs::cpu
#else
namespace loraxs::cpu {
Features detect_features() { return {}; }
}  // namespace loraxs::cpu
#endif
