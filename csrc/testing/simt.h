// Runs a CUDA kernel's source on the CPU under g++, for tests: one fiber per thread, one block after another.
//
// It knows indices, dynamic shared memory, __syncthreads and the warp shuffle that our kernels use, finds divergent
// barriers, and poisons shared memory before each block. It cannot see data races, nor anything about speed.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LORAXS_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::block->shared.data())

namespace simt {

struct Index {
  unsigned x = 0;
};

enum class Wait { none, block, warp, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index index;
  Wait wait;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<uint64_t> exchange;  // one word per thread, for shuffles
  std::function<void()> body;
  ucontext_t scheduler;
  Thread* current = nullptr;
  Index index;
};

inline Block* block = nullptr;
constexpr size_t kStack = 256 << 10;
constexpr unsigned kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

inline void wait(Wait why) {
  block->current->wait = why;
  swapcontext(&block->current->context, &block->scheduler);
}

inline void thread_main() {
  block->body();
  wait(Wait::done);
}

// Lets threads [first, last) go on if every one of them waits for `why` or is done; true if somebody did.
inline bool release(Block& b, size_t first, size_t last, Wait why) {
  size_t waiting = 0, done = 0;
  for (size_t t = first; t < last; ++t) waiting += b.threads[t].wait == why, done += b.threads[t].wait == Wait::done;
  if (waiting == 0 || waiting + done != last - first) return false;
  if (done != 0) fail("some threads left the kernel before a barrier that others reached");
  for (size_t t = first; t < last; ++t) b.threads[t].wait = Wait::none;
  return true;
}

inline void run_block(Block& b) {
  for (bool progress = true; progress;) {
    progress = false;
    for (Thread& t : b.threads) {
      if (t.wait != Wait::none) continue;
      b.current = &t;
      swapcontext(&b.scheduler, &t.context);
      progress = true;
    }
    for (size_t w = 0; w < b.threads.size(); w += kWarp) progress |= release(b, w, w + kWarp, Wait::warp);
    progress |= release(b, 0, b.threads.size(), Wait::block);
  }
  for (const Thread& t : b.threads)
    if (t.wait != Wait::done) fail("threads wait at different barriers");
}

// kernel<<<blocks, threads, shared_bytes>>>(args...); `threads` is a multiple of 32.
template <class Kernel, class... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, const Args&... args) {
  Block b;
  block = &b;
  b.threads.resize(threads);
  b.exchange.resize(threads);
  b.body = [&] { kernel(args...); };
  for (Thread& t : b.threads) t.stack.reset(new char[kStack]);
  for (b.index.x = 0; b.index.x < blocks; ++b.index.x) {
    b.shared.assign(shared_bytes, 0xff);  // NaN in every float format: what is read unwritten shows up
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = b.threads[i];
      t.index.x = i, t.wait = Wait::none;
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = kStack, t.context.uc_link = nullptr;
      makecontext(&t.context, thread_main, 0);
    }
    run_block(b);
  }
  block = nullptr;
}

}  // namespace simt

#define threadIdx (simt::block->current->index)
#define blockIdx (simt::block->index)

inline void __syncthreads() { simt::wait(simt::Wait::block); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned me = threadIdx.x, other = (me & ~(simt::kWarp - 1)) | ((me ^ unsigned(mask)) & (simt::kWarp - 1));
  std::memcpy(&simt::block->exchange[me], &value, sizeof(T));
  simt::wait(simt::Wait::warp);
  T got;
  std::memcpy(&got, &simt::block->exchange[other], sizeof(T));
  simt::wait(simt::Wait::warp);
  return got;
}

namespace loraxs {

struct Bfloat16 {
  uint16_t bits;
};

inline void widen(float x, float& out) { out = x; }
inline void widen(float x, double& out) { out = x; }
inline void widen(double x, double& out) { out = x; }
inline void widen(Bfloat16 x, float& out) {
  const uint32_t u = uint32_t(x.bits) << 16;
  std::memcpy(&out, &u, 4);
}
inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, Bfloat16& out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out.bits = uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // tests use no NaN
}
inline void stop() { simt::fail("the kernel stopped on a slot out of range"); }

}  // namespace loraxs
