// The CUDA linear for few tokens as a C function on CPU memory, for python_tests/ops/test_cuda_linear_decode.py. Built
// with -DLORAXS_MAIN it is a program of its own, for AddressSanitizer: every buffer is exactly as large as it has to
// be.
#include <memory>

#include "kernels/linear_decode.cuh"
#include "kernels/linear_project.cuh"

namespace {

using namespace loraxs;

struct Call {
  void* y;
  float* p;
  const void *x, *w, *bias, *a, *bt, *pages;
  const int32_t* slots;
  int M, N, K, r, S;
  float scale;
  bool wide_pages;
};

template <class T>
void run(const Call& g, const decode::Plan& plan) {
  // Poisoned as fresh device memory may be; counters are zeroed in the stream on a device.
  const size_t floats = size_t(plan.workspace(g.M, g.r));
  const std::unique_ptr<float[]> workspace(new float[floats]);
  std::memset(workspace.get(), 0xff, floats * sizeof(float));
  const auto* x = static_cast<const T*>(g.x);
  const auto* a = static_cast<const T*>(g.a);
  decode::Args<T> args{static_cast<T*>(g.y),
                       g.p,
                       static_cast<const T*>(g.bias),
                       {x, static_cast<const T*>(g.w), a, g.M, g.N, g.K, g.r},
                       static_cast<const T*>(g.bt),
                       g.pages,
                       g.slots,
                       nullptr,
                       nullptr,
                       nullptr,
                       g.S,
                       plan.splits,
                       g.scale,
                       g.wide_pages};
  if (plan.two_kernels) {
    args.q = workspace.get();
    const project::Args<T> first{g.p, workspace.get(), x,           a, g.pages, g.slots, g.M, g.K, g.r,
                                 g.S, g.scale,         g.wide_pages};
    const unsigned groups = unsigned((g.M + project::kTokens - 1) / project::kTokens);
    simt::launch(project::linear_project_kernel<T>,
                 {{project::kBlocks, groups}, project::kThreads, project::shared_bytes(g.r), project::kBlocks}, first);
  } else if (plan.parts_in_global()) {
    args.parts = workspace.get();
    args.counters = reinterpret_cast<unsigned*>(workspace.get() + plan.parts());
    std::memset(args.counters, 0, size_t(plan.tiles) * sizeof(unsigned));
  }
  decode::choose(plan, [&]<int kTokenTiles, int kRankTiles, class Copies, bool kCluster>() {
    const simt::Index grid{unsigned(plan.splits), unsigned(plan.tiles)};
    simt::launch(decode::linear_decode_kernel<T, kTokenTiles, kRankTiles, Copies, kCluster>,
                 {grid, decode::kThreads, size_t(Copies::template Pipe<T, kTokenTiles, kRankTiles>::kBytes),
                  kCluster ? grid.x : 1},
                 args);
  });
  if (args.counters != nullptr)
    for (int tile = 0; tile < plan.tiles; ++tile)
      if (args.counters[tile] != 0) simt::fail("a counter was not left at zero");
}

}  // namespace

// What the plan says, for the tests to check which kernel they ran: fits, two_kernels, cluster, bulk, splits.
extern "C" void linear_decode_plan(int M, int N, int K, int r, int major, int* out) {
  const decode::Plan plan = decode::plan(M, N, K, r, major);
  out[0] = plan.fits, out[1] = plan.two_kernels, out[2] = plan.cluster, out[3] = plan.bulk, out[4] = plan.splits;
}

// sizes: M, N, K, r, S. `order` 0: copies land at once, threads in rising order; 1: as late as may be, falling.
extern "C" int linear_decode(int half, int major, int order, void* y, float* p, const void* x, const void* w,
                             const void* bias, const void* a, const void* bt, const void* pages, const int32_t* slots,
                             const int* sizes, float scale, int wide_pages) {
  const Call call{y,     p,        x,        w,        bias,     a,        bt,    pages,
                  slots, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale, wide_pages != 0};
  const decode::Plan plan = decode::plan(call.M, call.N, call.K, call.r, major);
  if (!plan.fits) return 1;
  simt::late_copies = simt::falling_order = order != 0;
  half ? run<Half>(call, plan) : run<Bfloat16>(call, plan);
  return 0;
}

#if defined(LORAXS_MAIN)
// Arguments, five at a time: M, N, K, r, major. Values do not matter here, addresses do.
int main(int count, char** words) {
  for (int i = 1; i + 4 < count; i += 5) {
    int v[5];
    for (int j = 0; j < 5; ++j) v[j] = std::atoi(words[i + j]);
    const size_t M = size_t(v[0]), N = size_t(v[1]), K = size_t(v[2]), r = size_t(v[3]);
    const auto numbers = [](size_t n) {
      std::unique_ptr<Bfloat16[]> values(new Bfloat16[n]);
      for (size_t j = 0; j < n; ++j) narrow(float(j % 7) - 3, values[j]);
      return values;
    };
    const auto x = numbers(M * K), w = numbers(N * K), bias = numbers(N), a = numbers(r * K), bt = numbers(r * N),
               pages = numbers(2 * r * r), y = numbers(M * N);
    const std::unique_ptr<float[]> p(new float[M * r]);
    const std::unique_ptr<int32_t[]> slots(new int32_t[M]);
    for (size_t m = 0; m < M; ++m) slots[m] = int32_t(m % 3) - 1;
    const int sizes[] = {v[0], v[1], v[2], v[3], 2};
    if (linear_decode(0, v[4], i % 2, y.get(), p.get(), x.get(), w.get(), bias.get(), a.get(), bt.get(), pages.get(),
                      slots.get(), sizes, 0.5f, 0) != 0)
      simt::fail("a shape does not fit");
  }
}
#endif
