// Threads of row_scale: R L for every slot first, then the rows of W.
#include <algorithm>
#include <type_traits>

#include "cpu/arena.h"
#include "cpu/driver.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace loraxs::cpu {
namespace {

// Multiply-adds of one core in the time of a fork and join, about 10 us.
constexpr int64_t kInlineWork = 800'000;

// Rows of R L, and rows of W, that are dealt out together: whole register blocks.
constexpr int64_t kCoreGrain = 16, kRowGrain = 256;

template <class F>
void in_grains(int64_t n, int64_t grain, bool alone, const F& fn) {
  if (alone) return fn(0, n);
  parallel_for((n + grain - 1) / grain, [&](int64_t b, int64_t e) { fn(b * grain, std::min(e * grain, n)); });
}

}  // namespace

template <class T>
void row_scale(const RowScales<T>& g) {
  using A = acc_t<T>;
  const int64_t r = g.r, rows = g.S * r;
  Arena arena(Arena::padded<A>(g.root ? rows * r : 0));
  const A* cores = g.pages;
  int64_t core_stride = g.page_stride;
  if (g.root) {
    A* products = arena.take<A>(rows * r);
    const Dense<A>& k = table<A>();
    in_grains(rows, kCoreGrain, rows * r * r < kInlineWork, [&](int64_t i0, int64_t i1) {
      while (i0 < i1) {
        const int64_t slot = i0 / r, first = i0 % r, count = std::min(i1 - i0, r - first);
        k.expand({nullptr, products + i0 * r, g.pages + slot * g.page_stride + first * r, g.root, r, r, r, count, r, r,
                  nullptr, nullptr, 0, 0, false});
        i0 += count;
      }
    });
    cores = products;
    core_stride = r * r;
  }
  const Lengths<T>& k = table<T>();
  // Slot after slot, the rows of each in whole grains: a grain belongs to one slot.
  const int64_t grains = (g.N + kRowGrain - 1) / kRowGrain;
  in_grains(g.S * grains, 1, g.S * g.N * r * r < kInlineWork, [&](int64_t i0, int64_t i1) {
    while (i0 < i1) {
      const int64_t slot = i0 / grains, first = i0 % grains, last = std::min(first + i1 - i0, grains);
      k.row_scale({g.bt, g.ct, cores + slot * core_stride, g.sigma, g.rho, g.m + slot * g.N, g.g + slot * g.N,
                   g.inverse + slot * g.N, g.N, r, first * kRowGrain, std::min(last * kRowGrain, g.N), A(g.scale)});
      i0 += last - first;
    }
  });
}

template void row_scale<float>(const RowScales<float>&);
template void row_scale<bf16>(const RowScales<bf16>&);
template void row_scale<f16>(const RowScales<f16>&);
template void row_scale<double>(const RowScales<double>&);

}  // namespace loraxs::cpu
