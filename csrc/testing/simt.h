// Runs a CUDA kernel's source on the CPU under g++, for tests: one fiber per thread, one cluster after another.
//
// It knows indices, dynamic shared memory, barriers of warp, block and cluster, and the warp operations that our
// kernels use; it finds divergent barriers, and poisons shared memory before each block. It cannot see data races, nor
// anything about speed. simt_mma.h and simt_async.h add tensor cores and asynchronous copies.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LORAXS_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::current->block->shared.get())

namespace simt {

struct Index {
  unsigned x = 0, y = 0;
};

enum class Wait { none, warp, block, cluster, done };

// A stack that can be switched to. AddressSanitizer wants to hear of every switch.
struct Fiber {
  ucontext_t context;
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* sanitizer_stack = nullptr;

  void switch_to(Fiber& next, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &sanitizer_stack, next.stack, next.stack_size);
#endif
    swapcontext(&context, &next.context);
    arrived();
  }
  // `from` learns which stack was left, if that is not known yet.
  void arrived([[maybe_unused]] Fiber* from = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(sanitizer_stack, from ? &from->stack : nullptr, from ? &from->stack_size : nullptr);
#endif
  }
};

struct Block;

struct Thread {
  Fiber fiber;
  std::unique_ptr<char[]> stack;
  Index index;
  Block* block;
  Wait wait;
  // What the thread brings to operations of its warp: two, since the others may read one while it brings the next.
  alignas(16) unsigned char brought[2][32];
  int turn;
  std::vector<std::vector<std::function<void()>>> copies;  // see simt_async.h
};

struct Block {
  std::vector<Thread> threads;
  std::unique_ptr<unsigned char[]> shared;
  Index index;
};

struct BulkCopy {
  void* barrier;
  std::function<void()> run;
};

struct Cluster {
  std::vector<Block> blocks;
  std::function<void()> body;
  Fiber scheduler;
  std::vector<BulkCopy> copies;
};

inline Cluster* cluster = nullptr;
inline Thread* current = nullptr;
// What the hardware leaves open and a right kernel does not notice: asynchronous copies land at once or as late as they
// may; threads run in rising or falling order.
inline bool late_copies = false, falling_order = false;

constexpr size_t kStack = 128 << 10;
constexpr unsigned kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

inline void wait(Wait why) {
  Thread& me = *current;
  me.wait = why;
  me.fiber.switch_to(cluster->scheduler, why == Wait::done);
}

inline void thread_main() {
  current->fiber.arrived(&cluster->scheduler);
  cluster->body();
  wait(Wait::done);
}

// Lets these threads go on if every one of them waits for `why`; true if they do.
inline bool release(const std::vector<Thread*>& threads, Wait why) {
  size_t waiting = 0, done = 0;
  for (const Thread* t : threads) waiting += t->wait == why, done += t->wait == Wait::done;
  if (waiting == 0 || waiting + done != threads.size()) return false;
  if (done != 0) fail("some threads left the kernel before a barrier that others reached");
  for (Thread* t : threads) t->wait = Wait::none;
  return true;
}

inline void run_cluster(Cluster& c) {
  std::vector<Thread*> all;
  for (Block& b : c.blocks)
    for (Thread& t : b.threads) all.push_back(&t);
  const size_t block = c.blocks[0].threads.size();
  const auto release_groups = [&](size_t size, Wait why) {
    bool any = false;
    for (auto first = all.begin(); first != all.end(); first += ptrdiff_t(size))
      any |= release({first, first + ptrdiff_t(size)}, why);
    return any;
  };
  std::vector<Thread*> order = all;
  if (falling_order) std::reverse(order.begin(), order.end());
  for (bool progress = true; progress;) {
    progress = false;
    for (Thread* t : order) {
      if (t->wait != Wait::none) continue;
      current = t;
      c.scheduler.switch_to(t->fiber);
      progress = true;
    }
    progress |= release_groups(kWarp, Wait::warp);
    progress |= release_groups(block, Wait::block);
    progress |= release_groups(all.size(), Wait::cluster);
  }
  for (const Thread* t : all)
    if (t->wait != Wait::done) fail("threads wait at different barriers");
}

struct Launch {
  Index grid;
  unsigned threads;  // a multiple of 32
  size_t shared_bytes;
  unsigned cluster = 1;  // blocks of neighbouring x that run together
};

// kernel<<<grid, threads, shared_bytes>>>(args...).
template <class Kernel, class... Args>
void launch(Kernel kernel, const Launch& how, const Args&... args) {
  Cluster c;
  cluster = &c;
  c.blocks.resize(how.cluster);
  c.body = [&] { kernel(args...); };
  for (Block& b : c.blocks) {
    b.threads = std::vector<Thread>(how.threads);
    for (Thread& t : b.threads) t.stack.reset(new char[kStack]);
  }
  for (unsigned i = 0; i < how.grid.x * how.grid.y; i += how.cluster) {
    for (unsigned rank = 0; rank < how.cluster; ++rank) {
      Block& b = c.blocks[rank];
      b.index = {i % how.grid.x + rank, i / how.grid.x};
      // Exactly as large as asked for; NaN in every float format, so that what is read unwritten shows up.
      b.shared.reset(new unsigned char[how.shared_bytes]);
      std::memset(b.shared.get(), 0xff, how.shared_bytes);
      for (unsigned n = 0; n < how.threads; ++n) {
        Thread& t = b.threads[n];
        t.index = {n, 0}, t.block = &b, t.wait = Wait::none, t.turn = 0;
        t.copies.assign(1, {});
        Fiber& f = t.fiber;
        f.stack = t.stack.get(), f.stack_size = kStack, f.sanitizer_stack = nullptr;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = t.stack.get(), f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
        makecontext(&f.context, thread_main, 0);
      }
    }
    run_cluster(c);
  }
  cluster = nullptr;
}

// Brings a value to an operation of the whole warp and returns everybody's, in the order of the lanes.
template <class T>
std::array<T, kWarp> gather(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Thread::brought[0]));
  Thread& me = *current;
  const int turn = me.turn;
  me.turn ^= 1;
  std::memcpy(me.brought[turn], &mine, sizeof(T));
  wait(Wait::warp);
  std::array<T, kWarp> all;
  const unsigned first = me.index.x / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    std::memcpy(&all[lane], me.block->threads[first + lane].brought[turn], sizeof(T));
  return all;
}

inline unsigned lane() { return current->index.x % kWarp; }

}  // namespace simt

#define threadIdx (simt::current->index)
#define blockIdx (simt::current->block->index)

inline void __syncthreads() { simt::wait(simt::Wait::block); }
inline void __syncwarp() { simt::wait(simt::Wait::warp); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::gather(value)[(simt::lane() ^ unsigned(mask)) % simt::kWarp];
}

inline unsigned atomicInc(unsigned* counter, unsigned last) {
  const unsigned was = *counter;
  *counter = was >= last ? 0 : was + 1;
  return was;
}

inline int min(int a, int b) { return a < b ? a : b; }

namespace loraxs {

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  _Float16 value;
};

inline void widen(float x, float& out) { out = x; }
inline void widen(float x, double& out) { out = x; }
inline void widen(double x, double& out) { out = x; }
inline void widen(Bfloat16 x, float& out) {
  const uint32_t u = uint32_t(x.bits) << 16;
  std::memcpy(&out, &u, 4);
}
inline void widen(Half x, float& out) { out = float(x.value); }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, Bfloat16& out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  // NaN keeps its upper half, which has a bit of the fraction set in ours.
  out.bits = uint16_t(x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16);
}
inline void narrow(float x, Half& out) { out.value = _Float16(x); }
inline void stop() { simt::fail("the kernel stopped on a slot out of range"); }

}  // namespace loraxs
