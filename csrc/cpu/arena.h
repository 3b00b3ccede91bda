// Scratch memory of a call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace loraxs::cpu {

// Memory that a thread keeps between calls, so that its pages are mapped once.
class Arena {
 public:
  // A thread has one arena for what it does alone, and one for what it shares with others meanwhile.
  enum Use { kOwn, kShared };

  // Starts a call that takes at most this much.
  explicit Arena(int64_t bytes, Use use = kOwn) {
    static thread_local Block blocks[2];
    Block& block = blocks[use];
    if (block.size < bytes) {
      block.memory.reset();
      block.memory.reset(static_cast<std::byte*>(::operator new[](size_t(bytes), kAlign)));
      block.size = bytes;
    }
    next_ = block.memory.get();
  }
  template <class A>
  A* take(int64_t n) {
    A* p = reinterpret_cast<A*>(next_);
    next_ += padded<A>(n);
    return p;
  }
  template <class A>
  static int64_t padded(int64_t n) {
    return (n * int64_t(sizeof(A)) + 63) / 64 * 64;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, kAlign); }
  };
  struct Block {
    std::unique_ptr<std::byte[], Free> memory;
    int64_t size = 0;
  };
  std::byte* next_;
};

// Scratch that stays on the stack for decode-sized problems.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    if (n > kOnStack) heap_.reset(new (std::align_val_t(64)) A[size_t(n)]);
  }
  A* get() { return heap_ ? heap_.get() : stack_; }

 private:
  struct Free {
    void operator()(A* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  static constexpr int64_t kOnStack = 1024;
  alignas(64) A stack_[kOnStack];
  std::unique_ptr<A[], Free> heap_;
};

}  // namespace loraxs::cpu
