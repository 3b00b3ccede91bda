#include "cpu/driver.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/arena.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/row_lists.h"

namespace loraxs::cpu {
namespace {

// A fork and join costs about 10 us (two cores of a Sapphire Rapids): this many multiply-adds of one core, by vectors
// and by matrix tiles.
constexpr int64_t kInlineWork = 800'000, kInlineTileWork = 2'500'000;

// Where 16 x 32 matrix tiles beat dot products (Sapphire Rapids, widths 384 and 1024): part-filled tiles pay off for
// large ranks only.
constexpr bool wide_enough(int64_t M, int64_t r) { return M >= 16 || (M >= 8 && r >= 32); }

// Rows are dealt out in whole tiles, columns in whole words of the dropout mask, ranks in whole register blocks.
constexpr int64_t kRowGrain = 16, kColumnGrain = 64, kRankGrain = 16;

// Whether M * r * width multiply-adds are done sooner on the calling thread alone.
template <class T>
bool runs_inline(int64_t M, int64_t r, int64_t width) {
  const bool tiles = std::is_same_v<T, bf16> && isa() == Isa::amx_bf16 && wide_enough(M, r);
  return M * r * width < (tiles ? kInlineTileWork : kInlineWork);
}

template <class F>
void in_grains(int64_t n, int64_t grain, const F& fn) {
  parallel_for((n + grain - 1) / grain, [&](int64_t b, int64_t e) { fn(b * grain, std::min(e * grain, n)); });
}

// project(rows, ranks), rotate(rows), expand(rows, columns) over M x r and M x N, threaded the way the shape suits.
template <class Step1, class Step2, class Step3>
void run(int64_t M, int64_t r, int64_t N, bool alone, const Step1& project, const Step2& rotate, const Step3& expand) {
  const int threads = alone ? 1 : thread_count();
  const auto rows = [&](int64_t m0, int64_t m1) {
    project(m0, m1, 0, r);
    rotate(m0, m1);
    expand(m0, m1, 0, N);
  };
  if (threads == 1) {
    rows(0, M);
  } else if (M >= threads * kRowGrain) {
    in_grains(M, kRowGrain, rows);
  } else {
    in_grains(r, kRankGrain, [&](int64_t i0, int64_t i1) { project(0, M, i0, i1); });
    rotate(0, M);
    in_grains(N, kColumnGrain, [&](int64_t n0, int64_t n1) { expand(0, M, n0, n1); });
  }
}

const int32_t* from_row(const int32_t* slots, int64_t m) { return slots ? slots + m : nullptr; }

template <class T>
auto projector(const T* x, int64_t ldx, const T* a, acc_t<T>* p, int64_t M, int64_t r, double alpha,
               const Dropout* dropout) {
  const Dense<T>& k = table<T>();
  return [=, &k](int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
    k.project({x + m0 * ldx, a + i0 * ldx, p + m0 * r + i0, ldx, ldx, r, m1 - m0, ldx, i1 - i0, acc_t<T>(alpha),
               dropout, m0, wide_enough(M, r)});
  };
}

template <class T>
auto expander(const T* in, T* out, const acc_t<T>* q, const T* b, int64_t M, int64_t N, int64_t r, const int32_t* slots,
              const Dropout* dropout) {
  const Dense<T>& k = table<T>();
  return [=, &k](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    k.expand({in ? in + m0 * N + n0 : nullptr, out + m0 * N + n0, q + m0 * r, b + n0, N, r, N, m1 - m0, n1 - n0, r,
              from_row(slots, m0), dropout, m0, n0, wide_enough(M, r)});
  };
}

// So many numbers of gradients are written by one thread in the time of a fork and join.
constexpr int64_t kInlineNumbers = 64 << 10;

// From so many slots on, a thread sums whole pages.
constexpr int64_t kManySlots = 32;

// More than kFewRows rows go by matrix tiles, in bf16, where torch's own product is no better (Sapphire Rapids): W has
// to be brought into another order first, which pays off if it is small, or rows are many.
constexpr int64_t kTileWeight = 3 << 18, kLargeTileWeight = 1 << 22, kLargeTileRows = 1024, kTileRank = 256;

// dx in one pass over the weight and dq, for a few rows. Every thread projects all rows for itself: that costs less
// than to wait for each other once more.
template <class T, class P>
void few_rows(const Backward<T, P>& g, acc_t<T>* dq) {
  using A = acc_t<T>;
  const Dense<T>& dense = table<T>();
  const Paged<A, P>& paged = table<T>();
  const auto columns = [&](int64_t k0, int64_t k1) {
    Scratch<A> own(k0 == 0 ? 0 : g.M * g.r), rotated(g.M * g.r);
    A *q = k0 == 0 ? dq : own.get(), *dp = rotated.get();
    dense.project({g.dy, g.bt, q, g.N, g.N, g.r, g.M, g.N, g.r, A(g.scale), nullptr, 0, wide_enough(g.M, g.r)});
    paged.rotate({q, g.pages, g.page_stride, g.slots, dp, g.M, g.r, A(1), true});
    dense.across({g.dy, g.weight + k0, dp, g.a + k0, g.dx + k0, g.N, g.K, g.r, g.K, g.K, g.M, g.N, k1 - k0, g.r});
  };
  const int64_t work = g.M * g.N * g.K;
  work < kInlineWork / 8 ? columns(0, g.K) : in_grains(g.K, kColumnGrain, columns);
}

// The same for many rows: the layer's own product, with the weight and every R transposed.
template <class T, class P>
void many_rows(const Backward<T, P>& g, acc_t<T>* dq) {
  if constexpr (std::is_same_v<T, bf16>) {
    const FusedLayer<T, P> layer{{g.M, g.N, g.K, g.r, g.dy, g.bt, g.a, g.pages, g.page_stride, g.slots, nullptr, g.dx,
                                  dq, g.scale, nullptr, 1.0},
                                 g.weight,
                                 nullptr,
                                 true};
    many_tokens(layer);
  }
}

template <class T, class P>
void sum_pages(const Backward<T, P>& g, const acc_t<T>* dq) {
  using A = acc_t<T>;
  const Paged<A, P>& k = table<T>();
  const int64_t r = g.r, blocks = (r + 3) / 4;
  const auto block = [&](int64_t slot, const int32_t* rows, int64_t count, int64_t b0, int64_t b1) {
    k.outer({dq, g.p, rows, count, r, b0 * 4, std::min(b1 * 4, r), g.dpages + slot * r * r});
  };
  const bool small = g.M * r * r < kInlineWork && g.S * r * r < kInlineNumbers;
  if (g.slots == nullptr) {
    for (int64_t i = 1; i < g.S; ++i) block(i, nullptr, 0, 0, blocks);
    const auto task = [&](int64_t b0, int64_t b1) { block(0, nullptr, g.M, b0, b1); };
    small ? task(0, blocks) : parallel_for(blocks, task);
    return;
  }
  const RowLists lists(g.slots, g.M, g.S);
  // Few slots are shared out in parts.
  const int64_t parts = g.S < kManySlots ? blocks : 1, step = blocks / parts;
  const auto task = [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t slot = t / parts, b = t % parts * step;
      block(slot, lists.rows.data() + lists.start[slot], lists.start[slot + 1] - lists.start[slot], b, b + step);
    }
  };
  small ? task(0, g.S * parts) : parallel_for(g.S * parts, task);
}

}  // namespace

template <class T, class P>
void forward(const Forward<T, P>& g) {
  using A = acc_t<T>;
  Scratch<A> scratch(g.M * g.r);
  A* q = scratch.get();
  const Paged<A, P>& k = table<T>();
  const auto rotate = [&](int64_t m0, int64_t m1) {
    k.rotate(
        {g.p + m0 * g.r, g.pages, g.page_stride, from_row(g.slots, m0), q + m0 * g.r, m1 - m0, g.r, A(g.scale), false});
  };
  run(g.M, g.r, g.N, runs_inline<T>(g.M, g.r, g.K + g.N),
      projector(g.x, g.K, g.a, g.p, g.M, g.r, g.keep_scale, g.dropout), rotate,
      expander(g.in, g.out, q, g.bt, g.M, g.N, g.r, g.slots, nullptr));
}

template <class T>
bool has_one_pass(int64_t M, int64_t N, int64_t K, int64_t r) {
  const Dense<T>& dense = table<T>();
  if (M <= kFewRows) return dense.across != nullptr;
  const Many<bf16>& k = kernels();
  return std::is_same_v<T, bf16> && k.product != nullptr && r <= kTileRank &&
         N * K <= (M < kLargeTileRows ? kTileWeight : kLargeTileWeight);
}

template <class T, class P>
void backward(const Backward<T, P>& g) {
  using A = acc_t<T>;
  Scratch<A> dq_scratch(g.M * g.r), dp_scratch(g.dx && !g.weight ? g.M * g.r : 0);
  A *dq = dq_scratch.get(), *dp = dp_scratch.get();
  const Paged<A, P>& k = table<T>();
  const auto project = projector(g.dy, g.N, g.bt, dq, g.M, g.r, g.scale, nullptr);
  if (g.dx && g.weight) {
    g.M <= kFewRows ? few_rows(g, dq) : many_rows(g, dq);
  } else if (g.dx) {
    const auto rotate = [&](int64_t m0, int64_t m1) {
      k.rotate({dq + m0 * g.r, g.pages, g.page_stride, from_row(g.slots, m0), dp + m0 * g.r, m1 - m0, g.r,
                A(g.keep_scale), true});
    };
    run(g.M, g.r, g.K, runs_inline<T>(g.M, g.r, g.K + g.N), project, rotate,
        expander(g.in, g.dx, dp, g.a, g.M, g.K, g.r, g.slots, g.dropout));
  } else {
    run(
        g.M, g.r, 0, runs_inline<T>(g.M, g.r, g.N), project, [](int64_t, int64_t) {},
        [](int64_t, int64_t, int64_t, int64_t) {});
  }
  if (g.dpages) sum_pages(g, dq);
}

template bool has_one_pass<float>(int64_t, int64_t, int64_t, int64_t);
template bool has_one_pass<bf16>(int64_t, int64_t, int64_t, int64_t);
template bool has_one_pass<f16>(int64_t, int64_t, int64_t, int64_t);
template bool has_one_pass<double>(int64_t, int64_t, int64_t, int64_t);

#define INSTANTIATE(T, P)                            \
  template void forward<T, P>(const Forward<T, P>&); \
  template void backward<T, P>(const Backward<T, P>&);
INSTANTIATE(float, float)
INSTANTIATE(bf16, bf16)
INSTANTIATE(bf16, float)
INSTANTIATE(f16, f16)
INSTANTIATE(f16, float)
INSTANTIATE(double, double)
INSTANTIATE(double, float)
#undef INSTANTIATE

}  // namespace loraxs::cpu
