// The fused product for many tokens: all of W is brought into panels first, then every thread keeps to its own tokens.
#include <algorithm>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/driver.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace loraxs::cpu {
namespace {

// Tokens come in whole tiles, best in pairs of them. So many at once share L2 with the panels that go by.
constexpr int64_t kTokenGrain = 16, kTokenPair = 2 * kTokenGrain, kChunkBytes = 1 << 19, kMostTokens = 256;

// With fewer than this many tokens a thread, columns are dealt out instead, and every thread does for itself what all
// of them need.
constexpr int64_t kFewTokens = 16;

constexpr int64_t whole(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }

template <class P>
class Call {
 public:
  explicit Call(const FusedLayer<bf16, P>& layer)
      : g_(layer.g), weight_(layer.weight), bias_(layer.bias), transposed_(layer.transposed) {}

  void run() const {
    const int threads = thread_count();
    if (g_.M < threads * kFewTokens) {
      parallel_for(blocks(), [&](int64_t b0, int64_t b1) {
        Arena arena(bytes(g_.M) + Arena::padded<bf16>((b1 - b0) * panel()));
        bf16* panels = arena.take<bf16>((b1 - b0) * panel());
        pack(b0, b1, panels);
        tokens(0, g_.M, b0, b1, panels, arena);
      });
    } else {
      Arena shared(Arena::padded<bf16>(blocks() * panel()), Arena::kShared);
      bf16* panels = shared.take<bf16>(blocks() * panel());
      parallel_for(blocks(), [&](int64_t b0, int64_t b1) { pack(b0, b1, panels + b0 * panel()); });
      parallel_for((g_.M + kTokenGrain - 1) / kTokenGrain, [&](int64_t t0, int64_t t1) {
        const int64_t m0 = t0 * kTokenGrain, m1 = std::min(t1 * kTokenGrain, g_.M);
        Arena arena(bytes(m1 - m0));
        tokens(m0, m1, 0, blocks(), panels, arena);
      });
    }
  }

 private:
  int64_t blocks() const { return (g_.N + kPanelColumns - 1) / kPanelColumns; }
  int64_t panel() const { return k_.panel_size(g_.K, g_.r); }
  int64_t basis_size() const { return whole(g_.r, kPanelColumns) / kPanelColumns * k_.panel_size(g_.K, 0); }
  int64_t depth() const { return k_.depth(g_.K); }

  // Tokens of `count` at once, shared out evenly.
  int64_t chunk(int64_t count) const {
    const int64_t fit =
        std::clamp(kChunkBytes / int64_t(sizeof(bf16)) / depth() / kTokenPair * kTokenPair, kTokenPair, kMostTokens);
    const int64_t passes = (count + fit - 1) / fit;
    return whole((count + passes - 1) / passes, kTokenPair);
  }

  int64_t bytes(int64_t count) const {
    const int64_t rows = chunk(count);
    return Arena::padded<bf16>(basis_size()) + Arena::padded<bf16>(rows * depth()) +
           Arena::padded<bf16>(rows * k_.rank_depth(g_.r)) + 2 * Arena::padded<float>(rows * g_.r);
  }

  // Blocks b0 .. b1 of W and b.
  void pack(int64_t b0, int64_t b1, bf16* panels) const {
    k_.pack({weight_, transposed_ ? g_.N : g_.K, g_.K, transposed_, g_.bt, g_.N, g_.r, b0 * kPanelColumns,
             std::min(b1 * kPanelColumns, g_.N), panels});
  }

  // Tokens m0 .. m1 of these blocks of columns, by one thread.
  void tokens(int64_t m0, int64_t m1, int64_t b0, int64_t b1, const bf16* panels, Arena& arena) const {
    const Paged<float, P>& paged = kernels();
    const int64_t rows = chunk(m1 - m0);
    bf16* basis = arena.take<bf16>(basis_size());
    bf16* copy = arena.take<bf16>(rows * depth());
    bf16* packed = arena.take<bf16>(rows * k_.rank_depth(g_.r));
    float* own = arena.take<float>(rows * g_.r);
    float* q = arena.take<float>(rows * g_.r);
    // The gradient of R wants dq with its scale, and p without.
    const float scale = float(g_.scale), before = transposed_ ? scale : 1, after = transposed_ ? 1 : scale;
    k_.pack({g_.a, g_.K, g_.K, false, nullptr, 0, 0, 0, g_.r, basis});
    for (int64_t m = m0; m < m1; m += rows) {
      const int64_t count = std::min(rows, m1 - m);
      const bool in_place = m + whole(count, kTokenGrain) <= g_.M && g_.K == depth();
      const bf16* x = in_place ? g_.x + m * g_.K : padded(m, count, copy);
      const int64_t ld = in_place ? g_.K : depth();
      float* p = g_.p && b0 == 0 ? g_.p + m * g_.r : own;
      k_.product({x, ld, count, g_.K, basis, 0, g_.r, nullptr, nullptr, 0, nullptr, p, g_.r, before});
      paged.rotate(
          {p, g_.pages, g_.page_stride, g_.slots ? g_.slots + m : nullptr, q, count, g_.r, after, transposed_});
      k_.pack_ranks({q, g_.r, count, g_.r, count, packed});
      k_.product({x, ld, count, g_.K, panels, b0 * kPanelColumns, std::min(b1 * kPanelColumns, g_.N), bias_, packed,
                  g_.r, g_.out + m * g_.N, nullptr, g_.N, 1});
    }
  }

  // Rows of x with zeros up to a whole depth. Tokens that do not exist may be anything.
  const bf16* padded(int64_t m, int64_t count, bf16* copy) const {
    for (int64_t i = 0; i < count; ++i) {
      bf16* to = copy + i * depth();
      std::memcpy(to, g_.x + (m + i) * g_.K, size_t(g_.K) * sizeof(bf16));
      std::fill(to + g_.K, to + depth(), bf16{0});
    }
    return copy;
  }

  const Forward<bf16, P>& g_;
  const bf16 *weight_, *bias_;
  const bool transposed_;
  const Many<bf16>& k_ = kernels();
};

}  // namespace

template <class P>
void many_tokens(const FusedLayer<bf16, P>& layer) {
  Call<P>(layer).run();
}

template void many_tokens<bf16>(const FusedLayer<bf16, bf16>&);
template void many_tokens<float>(const FusedLayer<bf16, float>&);

}  // namespace loraxs::cpu
