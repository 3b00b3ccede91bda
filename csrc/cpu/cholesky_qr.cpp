// Orthonormal rows of a small block by Cholesky: three loops over the rows, where LAPACK's calls cost more than the
// arithmetic.
#include <algorithm>
#include <cmath>

#include "cpu/arena.h"
#include "cpu/driver.h"

namespace loraxs::cpu {
namespace {

// Sums along a row are kept in this many lanes, which a compiler turns into vectors without reordering anything.
constexpr int64_t kLanes = 16;

double dot(const double* x, const double* y, int64_t n) {
  double sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) sum[j] += x[i + j] * y[i + j];
  for (int64_t j = 0; i + j < n; ++j) sum[j] += x[i + j] * y[i + j];
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) sum[j] += sum[j + width];
  return sum[0];
}

}  // namespace

double cholesky_qr(const float* y, int64_t k, int64_t n, float* q) {
  Arena arena(Arena::padded<double>(k * n) + Arena::padded<double>(k * k));
  double *rows = arena.take<double>(k * n), *lower = arena.take<double>(k * k);
  std::copy(y, y + k * n, rows);
  double least = 1;
  // Row by row, left-looking: the Gram matrix first, because the factor needs the rows as they came.
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j <= i; ++j) lower[i * k + j] = dot(rows + i * n, rows + j * n, n);
  for (int64_t i = 0; i < k; ++i) {
    double* li = lower + i * k;
    const double length = li[i];
    for (int64_t j = 0; j < i; ++j) {
      for (int64_t p = 0; p < j; ++p) li[j] -= li[p] * lower[j * k + p];
      li[j] /= lower[j * k + j];
      li[i] -= li[j] * li[j];
    }
    const double pivot = li[i] / length;
    if (!(pivot > 0)) return pivot;
    least = std::min(least, pivot);
    li[i] = std::sqrt(li[i]);
    double* row = rows + i * n;
    for (int64_t j = 0; j < i; ++j)
      for (int64_t c = 0; c < n; ++c) row[c] -= li[j] * rows[j * n + c];
    const double inverse = 1 / li[i];
    for (int64_t c = 0; c < n; ++c) q[i * n + c] = float(row[c] *= inverse);
  }
  return least;
}

}  // namespace loraxs::cpu
