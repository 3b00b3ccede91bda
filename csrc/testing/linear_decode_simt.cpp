// The CUDA linear for few tokens as a C function on CPU memory, for python_tests/ops/test_cuda_linear_decode.py. Built
// with -DLORAXS_MAIN it is a program of its own, for AddressSanitizer: every buffer is exactly as large as it has to
// be.
#include <memory>

#include "kernels/linear_decode.cuh"
#include "kernels/linear_project.cuh"

namespace {

using namespace loraxs;

// What comes on stdin first; then x, w, bias, a, bt, pages, slots.
struct Header {
  int32_t half, major;   // fp16 instead of bf16; compute capability
  int32_t late_falling;  // copies land as late as they may and threads run in falling order, or neither
  int32_t M, N, K, r, S, page_stride, wide_pages, has_bias, has_slots;
  float scale;
};

struct Call : Header {
  void* y;
  float* p;
  const void *x, *w, *bias, *a, *bt, *pages;
  const int32_t* slots;
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
                       g.page_stride,
                       g.slots,
                       nullptr,
                       nullptr,
                       nullptr,
                       g.S,
                       plan.splits,
                       g.scale,
                       g.wide_pages != 0,
                       decode::whole_pieces(g.pages, g.page_stride, g.r, g.wide_pages ? sizeof(float) : sizeof(T))};
  if (plan.two_kernels) {
    args.q = workspace.get();
    const project::Args<T> first{g.p,     workspace.get(),  x, a, g.pages, g.page_stride, g.slots, g.M, g.K, g.r, g.S,
                                 g.scale, g.wide_pages != 0};
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

// Exactly `size` bytes, from stdin or NaN in every float format; null if there are none.
std::unique_ptr<unsigned char[]> read(size_t size) {
  if (size == 0) return nullptr;
  std::unique_ptr<unsigned char[]> bytes(new unsigned char[size]);
  if (std::fread(bytes.get(), 1, size, stdin) != size) simt::fail("stdin ended early");
  return bytes;
}
std::unique_ptr<unsigned char[]> poisoned(size_t size) {
  std::unique_ptr<unsigned char[]> bytes(new unsigned char[size]);
  std::memset(bytes.get(), 0xff, size);
  return bytes;
}

}  // namespace

// Writes fits, two_kernels, cluster, bulk and splits of the plan as int32, then y and p if it fits.
int main() {
  Call g{};
  if (std::fread(static_cast<Header*>(&g), sizeof(Header), 1, stdin) != 1) simt::fail("stdin ended early");
  const decode::Plan plan = decode::plan(g.M, g.N, g.K, g.r, g.major);
  const int32_t facts[] = {plan.fits, plan.two_kernels, plan.cluster, plan.bulk, plan.splits};
  std::fwrite(facts, sizeof facts, 1, stdout);
  if (!plan.fits) return 0;

  const size_t M = size_t(g.M), N = size_t(g.N), K = size_t(g.K), r = size_t(g.r), S = size_t(g.S);
  const auto x = read(M * K * 2), w = read(N * K * 2), bias = read(g.has_bias ? N * 2 : 0), a = read(r * K * 2),
             bt = read(r * N * 2), pages = read(((S - 1) * size_t(g.page_stride) + r * r) * (g.wide_pages ? 4 : 2)),
             slots = read(g.has_slots ? M * 4 : 0), y = poisoned(M * N * 2), p = poisoned(M * r * 4);
  g.x = x.get(), g.w = w.get(), g.bias = bias.get(), g.a = a.get(), g.bt = bt.get(), g.pages = pages.get();
  g.slots = reinterpret_cast<const int32_t*>(slots.get()), g.y = y.get(), g.p = reinterpret_cast<float*>(p.get());
  simt::late_copies = simt::falling_order = g.late_falling != 0;
  g.half ? run<Half>(g, plan) : run<Bfloat16>(g, plan);
  std::fwrite(y.get(), 1, M * N * 2, stdout);
  std::fwrite(p.get(), 1, M * r * 4, stdout);
}
