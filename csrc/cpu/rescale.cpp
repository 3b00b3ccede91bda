// Threads and the order of sums of rescale and its backward.
#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/driver.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/row_lists.h"

namespace loraxs::cpu {
namespace {

// Elements of one core in the time of a fork and join, about 10 us.
constexpr int64_t kInlineElements = 64 << 10;

// Rows are dealt out as the products before and after deal them out, so that they are found in the same core's cache.
constexpr int64_t kRowGrain = 16;

// A slot's rows are summed in pieces of this many, and the pieces in order: the result depends on nothing but the
// slot's own rows, and rounding errors grow with a piece and with the number of pieces only.
constexpr int64_t kPiece = 32;

template <class F>
void split(int64_t n, bool alone, const F& fn) {
  alone ? fn(0, n) : parallel_for(n, fn);
}

template <class T>
void copy_base_rows(const int32_t* slots, const T* from, T* to, int64_t M, int64_t N) {
  for (int64_t m = 0; m < M; ++m)
    if (slots[m] < 0) std::memcpy(to + m * N, from + m * N, size_t(N) * sizeof(T));
}

}  // namespace

template <class T, class P>
void rescale(const Rescale<T, P>& r) {
  const Scaled<T, P>& k = table<T>();
  const auto rows = [&](int64_t g0, int64_t g1) {
    const int64_t m0 = g0 * kRowGrain, m1 = std::min(g1 * kRowGrain, r.M), at = m0 * r.N;
    k.rescale({r.z + at, r.g, r.slots ? r.slots + m0 : nullptr, r.bias, r.y + at, m1 - m0, r.N});
  };
  split((r.M + kRowGrain - 1) / kRowGrain, r.M * r.N < kInlineElements, rows);
}

template <class T, class P>
void rescale_backward(const RescaleGradients<T, P>& g) {
  using A = acc_t<T>;
  if (g.z == nullptr) {
    if (g.dz) rescale<T, P>({g.dy, g.g, g.slots, nullptr, g.dz, g.M, g.N});
    return;
  }
  const Scaled<T, P>& k = table<T>();
  struct Piece {
    int64_t slot, first, count;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> start(size_t(g.S) + 1);
  const RowLists lists = g.slots ? RowLists(g.slots, g.M, g.S) : RowLists(nullptr, 0, g.S);
  for (int64_t slot = 0; slot < g.S; ++slot) {
    const int64_t end = g.slots ? lists.start[size_t(slot) + 1] : slot == 0 ? g.M : 0;
    for (int64_t t = g.slots ? lists.start[size_t(slot)] : 0; t < end; t += kPiece)
      pieces.push_back({slot, t, std::min(kPiece, end - t)});
    start[size_t(slot) + 1] = int64_t(pieces.size());
  }
  const std::unique_ptr<A[]> sums(new A[pieces.size() * size_t(g.N)]);
  const bool alone = g.M * g.N < kInlineElements;
  split(int64_t(pieces.size()), alone, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      const Piece& p = pieces[size_t(i)];
      const int32_t* rows = g.slots ? lists.rows.data() + p.first : nullptr;
      k.back({g.dy, g.z, g.g + p.slot * g.N, rows, p.first, p.count, g.N, g.dz, sums.get() + i * g.N});
    }
  });
  for (int64_t slot = 0; slot < g.S; ++slot) {
    const int64_t first = start[size_t(slot)], count = start[size_t(slot) + 1] - first;
    k.total({sums.get() + first * g.N, count, g.N, g.dg + slot * g.N});
  }
  if (g.dz && g.slots) copy_base_rows(g.slots, g.dy, g.dz, g.M, g.N);
}

#define INSTANTIATE(T, P)                            \
  template void rescale<T, P>(const Rescale<T, P>&); \
  template void rescale_backward<T, P>(const RescaleGradients<T, P>&);
INSTANTIATE(float, float)
INSTANTIATE(bf16, bf16)
INSTANTIATE(bf16, float)
INSTANTIATE(f16, f16)
INSTANTIATE(f16, float)
INSTANTIATE(double, double)
INSTANTIATE(double, float)
#undef INSTANTIATE

}  // namespace loraxs::cpu
