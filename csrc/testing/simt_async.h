// Asynchronous copies, clusters and dependent launches for simt.h; the names of kernels/async.cuh.
#pragma once
#include <utility>

#include "testing/simt.h"

namespace loraxs {

constexpr bool kHasHopperCode = true;

inline void expect_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) simt::fail(what);
}

inline void copy16(void* shared, const void* global, bool valid) {
  expect_aligned(shared, "cp.async: the shared address is not a multiple of 16");
  expect_aligned(global, "cp.async: the global address is not a multiple of 16");
  const auto run = [=] { valid ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16); };
  if (simt::late_copies)
    simt::current->copies.back().push_back(run);
  else
    run();
}
inline void commit_copies() { simt::current->copies.emplace_back(); }
template <int kPending>
inline void wait_copies() {
  auto& groups = simt::current->copies;  // the last one is not committed
  while (groups.size() > kPending + 1) {
    for (const auto& run : groups.front()) run();
    groups.erase(groups.begin());
  }
}

inline void prefetch(const void* global) {
  // Reads, so that a sanitizer sees an address out of bounds.
  volatile unsigned char byte = *static_cast<const unsigned char*>(global);
  (void)byte;
}
inline float load_fresh(const float* global) { return *global; }

struct Barrier {
  uint8_t arrivals, missing;
  uint16_t phase;
  int32_t bytes;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline Barrier load_barrier(const uint64_t* bar) {
  Barrier b;
  std::memcpy(&b, bar, sizeof b);
  return b;
}
inline void store_barrier(uint64_t* bar, Barrier b) {
  if (b.missing == 0 && b.bytes == 0) b.missing = b.arrivals, ++b.phase;
  std::memcpy(bar, &b, sizeof b);
}

inline void barrier_init(uint64_t* bar, unsigned arrivals) {
  const Barrier b{uint8_t(arrivals), uint8_t(arrivals), 0, 0};
  std::memcpy(bar, &b, sizeof b);
}
inline void barrier_init_done() {}
inline void barrier_arrive_expecting(uint64_t* bar, unsigned bytes) {
  Barrier b = load_barrier(bar);
  if (b.missing == 0) simt::fail("mbarrier: more arrivals than it was made for");
  --b.missing, b.bytes += int32_t(bytes);
  store_barrier(bar, b);
}
inline void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* bar) {
  expect_aligned(shared, "cp.async.bulk: the shared address is not a multiple of 16");
  expect_aligned(global, "cp.async.bulk: the global address is not a multiple of 16");
  if (bytes % 16 != 0) simt::fail("cp.async.bulk: the size is not a multiple of 16");
  const auto run = [=] {
    std::memcpy(shared, global, bytes);
    Barrier b = load_barrier(bar);
    b.bytes -= int32_t(bytes);
    store_barrier(bar, b);
  };
  if (simt::late_copies)
    simt::cluster->copies.push_back({bar, run});
  else
    run();
}
inline void barrier_wait(uint64_t* bar, unsigned parity) {
  auto& copies = simt::cluster->copies;
  for (int polls = 0; load_barrier(bar).phase % 2 == parity; ++polls) {
    if (polls > 1000) simt::fail("mbarrier: waited for a phase that does not complete");
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].barrier != bar) {
        ++i;
        continue;
      }
      copies[i].run();
      copies.erase(copies.begin() + ptrdiff_t(i));
    }
    simt::wait(simt::Wait::none);
  }
}

inline void cluster_sync() { simt::wait(simt::Wait::cluster); }
template <class T>
const T* cluster_shared(const T* p, unsigned rank) {
  const auto* mine = simt::current->block->shared.get();
  return reinterpret_cast<const T*>(simt::cluster->blocks[rank].shared.get() +
                                    (reinterpret_cast<const unsigned char*>(p) - mine));
}

// Kernels run one after another here.
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

}  // namespace loraxs
