// (x wᵀ) w for few rows x: both products of a strip of w while it lies in L2, where BLAS would read w twice.
#include <algorithm>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/driver.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace loraxs::cpu {
namespace {

// Rows of w are dealt out in this many parts, whose sums are added in order: the number of threads changes nothing.
constexpr int64_t kParts = 8;

// Rows of a strip: as many as a quarter of an L2 holds, and few enough that x wᵀ stays in registers' reach.
constexpr int64_t kStripBytes = 1 << 19, kMostRows = 64;

int64_t strip_rows(int64_t n) { return std::clamp<int64_t>(kStripBytes / int64_t(sizeof(float)) / n, 8, kMostRows); }

// sum += (x w_stripᵀ) w_strip for the rows j0 .. j1 of w; t holds x w_stripᵀ.
void add_part(const GramProduct& g, int64_t j0, int64_t j1, float* sum, float* t) {
  const Dense<float>& k = kernels();
  const int64_t most = strip_rows(g.n);
  for (int64_t j = j0; j < j1; j += most) {
    const int64_t rows = std::min(most, j1 - j);
    const float* w = g.w + j * g.n;
    k.project({g.x, w, t, g.n, g.n, rows, g.l, g.n, rows, 1.f, nullptr, 0, false});
    k.expand({sum, sum, t, w, g.n, rows, g.n, g.l, g.n, rows, nullptr, nullptr, 0, 0, false});
  }
}

}  // namespace

void gram_product(const GramProduct& g) {
  const int64_t size = g.l * g.n, share = (g.m + kParts - 1) / kParts;
  const int64_t parts = (g.m + share - 1) / share;
  Arena arena((parts - 1) * Arena::padded<float>(size) + parts * Arena::padded<float>(g.l * kMostRows));
  float *sums[kParts] = {g.out}, *scratch[kParts];
  for (int64_t i = 0; i < parts; ++i) {
    if (i > 0) sums[i] = arena.take<float>(size);
    scratch[i] = arena.take<float>(g.l * kMostRows);
  }
  parallel_for(parts, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      std::memset(sums[i], 0, size_t(size) * sizeof(float));
      add_part(g, i * share, std::min((i + 1) * share, g.m), sums[i], scratch[i]);
    }
  });
  for (int64_t i = 1; i < parts; ++i)
    for (int64_t j = 0; j < size; ++j) g.out[j] += sums[i][j];
}

}  // namespace loraxs::cpu
