// Threads and scratch of the fused product.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/arena.h"
#include "cpu/driver.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace loraxs::cpu {
namespace {

// Columns of y are dealt out in blocks, tokens in vectors or tiles; a chunk of tokens is packed so that its panels fill
// a quarter of an L2.
constexpr int64_t kColumnGrain = 32, kTokenGrain = 16, kMaxTokens = 512, kMaxRank = 256, kPanelBytes = 1 << 20;

// Up to here fp32 runs as dot products along K: lanes that hold tokens would be mostly empty. Columns are dealt out in
// lines of y, so that no thread waits long for another, and go in strips whose rows of W stay in L2 from one block of
// tokens to the next.
constexpr int64_t kDotTokens = 12, kDotGrain = 16, kStrip = 64;

// From here on torch's own product in fp32 reaches the peak of a core, and ours 93 % of it.
constexpr int64_t kPeakTokens = 2048;

// p is shared out in so many ranks at once: what one token's registers hold.
constexpr int64_t kRankShare = 8;

// Up to here every thread packs all tokens, and reads the pages of all of them, for itself: that costs less than to
// wait for each other once more.
constexpr int64_t kFewTokens = 32, kFewPageElements = 32 << 10;

// From this many tokens a thread on, each keeps to its own: it streams all of W, but waits for nobody and reads no
// panel from another core's cache.
constexpr int64_t kOwnTokens = 64;

// From this many tokens on, a part of every sum is not kept in longer panels.
constexpr int64_t kPartTokens = 256;

// In bf16 W can be turned around instead of x and y: N K numbers for M (N + K), which pays off from this many of the
// latter on, as long as W is not so large that it would come from memory once more (Sapphire Rapids).
constexpr int64_t kTurnedPerWeight = 4, kTurnedWeight = 1 << 22;

// Multiply-adds of one core in the time of a fork and join, about 10 us.
template <class T>
constexpr int64_t kInlineWork = sizeof(T) == 2 ? 200'000 : 100'000;

// p of a few tokens, which threads form together without waiting for each other.
struct SharedP {
  float* p = nullptr;
  std::atomic<int64_t> done{0};  // columns of it
};

// One layer.
template <class T, class P>
class Call {
 public:
  Call(const FusedLayer<T, P>& layer, const Fused<T>& k, SharedP* shared = nullptr)
      : g_(layer.g),
        shared_(shared),
        weight_(layer.weight),
        bias_(layer.bias),
        k_(k),
        depth_(k.depth(g_.K)),
        rank_depth_(k.rank_depth(g_.r)) {}

  // A few tokens in fp32.
  bool dots() const { return std::is_same_v<T, float> && g_.M <= kDotTokens; }

  int64_t work() const { return g_.M * g_.K * g_.N; }

  // Pieces of y that threads compute without waiting for each other, each for all tokens.
  int64_t pieces() const { return dots() ? (g_.N + kDotGrain - 1) / kDotGrain : blocks(); }

  // Whether no more has to be done in common than what every thread would rather do for itself.
  bool few_tokens() const {
    return dots() || (g_.M <= kFewTokens && (g_.slots ? g_.M : 1) * g_.r * g_.r <= kFewPageElements);
  }

  // Pieces i0 .. i1, by one thread.
  void run(int64_t i0, int64_t i1) const {
    if constexpr (std::is_same_v<T, float>)
      if (dots()) return run_dots(i0, i1);
    whole(0, g_.M, i0, i1);
  }

  // Many tokens, by all threads.
  void run_many(int threads) const {
    if (g_.M >= threads * kOwnTokens)
      parallel_for((g_.M + kTokenGrain - 1) / kTokenGrain, [&](int64_t t0, int64_t t1) {
        whole(t0 * kTokenGrain, std::min(t1 * kTokenGrain, g_.M), 0, blocks());
      });
    else
      together();
  }

 private:
  int64_t blocks() const { return (g_.N + kColumnGrain - 1) / kColumnGrain; }

  struct Packed {
    int64_t tokens;
    T *x, *q;
  };

  // Tokens of a panel such that none is left with few.
  int64_t even_panels(int64_t count) const {
    const int64_t panels = (count + k_.tokens - 1) / k_.tokens;
    return ((count + panels - 1) / panels + kTokenGrain - 1) / kTokenGrain * kTokenGrain;
  }

  // As many tokens of `count` as the panels hold, shared out evenly over the passes that it takes.
  int64_t tokens_at_once(int64_t count, int64_t depth) const {
    const int64_t fit = std::clamp(kPanelBytes / int64_t(sizeof(T)) / depth, k_.tokens, kMaxTokens);
    const int64_t passes = (count + fit - 1) / fit, share = (count + passes - 1) / passes;
    return (share + kTokenGrain - 1) / kTokenGrain * kTokenGrain;
  }

  // How much of K so many tokens should take at once: where their panels would be too large, a part of every sum is
  // cheaper than to read all of W for a part of the tokens.
  int64_t part_of_depth(int64_t count) const {
    const int64_t tokens = std::min(count, kPartTokens), fit = kPanelBytes / int64_t(sizeof(T)) / tokens;
    if (k_.piece == 0 || fit >= depth_) return g_.K;
    const int64_t most = fit / k_.piece * k_.piece, parts = (g_.K + most - 1) / most;
    return ((g_.K + parts - 1) / parts + k_.piece - 1) / k_.piece * k_.piece;
  }

  // Tokens m0 .. m1 of these blocks of columns, by one thread.
  void whole(int64_t m0, int64_t m1, int64_t b0, int64_t b1) const {
    const int64_t depth = part_of_depth(m1 - m0);
    const int64_t chunk = tokens_at_once(m1 - m0, k_.depth(depth));
    for (int64_t m = m0; m < m1; m += chunk) {
      const int64_t count = std::min(chunk, m1 - m);
      Arena arena(bytes(count, k_.depth(depth), true));
      const Packed panels = take(arena, count, k_.depth(depth), even_panels(count));
      float* p = g_.p && b0 == 0 ? g_.p + m * g_.r : arena.take<float>(count * g_.r);
      float* q = arena.take<float>(count * g_.r);
      for (int64_t k = 0; k < g_.K; k += depth) {
        const Part part{k, std::min(depth, g_.K - k)};
        prepare(m, count, panels, part, 0, q, p);
        multiply(m, count, panels, part, b0, b1);
      }
    }
  }

  // All tokens by all threads: first each packs some, then each takes some columns of all.
  void together() const {
    const int64_t chunk = tokens_at_once(g_.M, depth_);
    const Part all{0, g_.K};
    Arena arena(bytes(chunk, depth_, g_.p == nullptr));
    const Packed panels = take(arena, chunk, depth_, even_panels(chunk));
    float* q = arena.take<float>(chunk * g_.r);
    float* scratch = g_.p ? nullptr : arena.take<float>(chunk * g_.r);
    for (int64_t m = 0; m < g_.M; m += chunk) {
      const int64_t count = std::min(chunk, g_.M - m);
      parallel_for((count + panels.tokens - 1) / panels.tokens, [&](int64_t t0, int64_t t1) {
        const int64_t at = t0 * panels.tokens, tokens = std::min(t1 * panels.tokens, count) - at;
        prepare(m + at, tokens, panels, all, at, q + at * g_.r, (scratch ? scratch : g_.p + m * g_.r) + at * g_.r);
      });
      parallel_for(blocks(), [&](int64_t b0, int64_t b1) { multiply(m, count, panels, all, b0, b1); });
    }
  }

  // A few tokens in fp32: this thread's share of p, then pieces i0 .. i1 of y.
  void run_dots(int64_t i0, int64_t i1) const {
    const Dense<float>& dense = kernels();
    const auto project = [&](float* p, int64_t j0, int64_t j1) {
      dense.project({g_.x, g_.a + j0 * g_.K, p + j0, g_.K, g_.K, g_.r, g_.M, g_.K, j1 - j0, 1.f, nullptr, 0, false});
    };
    const int64_t shares = (g_.r + kRankShare - 1) / kRankShare, n = pieces();
    const int64_t j0 = std::min(shares * i0 / n * kRankShare, g_.r), j1 = std::min(shares * i1 / n * kRankShare, g_.r);
    if (j0 < j1) project(shared_->p, j0, j1);
    shared_->done.fetch_add(j1 - j0, std::memory_order_release);

    Arena arena(2 * Arena::padded<float>(g_.M * g_.r));
    float* q = arena.take<float>(g_.M * g_.r);
    const int64_t first = i0 * kDotGrain, end = std::min(i1 * kDotGrain, g_.N);
    for (int64_t at = first; at < end; at += kStrip) {
      const int64_t columns = std::min(kStrip, end - at);
      float* y = g_.out + at;
      // b is needed after the product, and would then be waited for.
      for (int64_t j = 0; j < g_.r; ++j)
        for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(g_.bt + j * g_.N + at + c);
      dense.project(
          {g_.x, weight_ + at * g_.K, y, g_.K, g_.K, g_.N, g_.M, g_.K, columns, 1.f, nullptr, 0, false, end - at});
      if (bias_)
        for (int64_t m = 0; m < g_.M; ++m)
          for (int64_t c = 0; c < columns; ++c) y[m * g_.N + c] += bias_[at + c];
      if (at == first) {
        // By now the other threads have long had their shares ready; if not, waiting would take longer than all of p.
        const float* p = shared_->p;
        if (shared_->done.load(std::memory_order_acquire) != g_.r) {
          float* all = arena.take<float>(g_.M * g_.r);
          project(all, 0, g_.r);
          p = all;
        }
        static_cast<const Paged<float, P>&>(kernels()).rotate(
            {p, g_.pages, g_.page_stride, g_.slots, q, g_.M, g_.r, float(g_.scale), false});
      }
      dense.expand({y, y, q, g_.bt + at, g_.N, g_.r, g_.N, g_.M, columns, g_.r, g_.slots, nullptr, 0, 0, false});
    }
  }

  int64_t bytes(int64_t count, int64_t depth, bool own_p) const {
    const int64_t rows = (count + k_.tokens - 1) / k_.tokens * k_.tokens;
    return Arena::padded<T>(rows * depth) + Arena::padded<T>(rows * rank_depth_) +
           (own_p ? 2 : 1) * Arena::padded<float>(count * g_.r);
  }
  Packed take(Arena& arena, int64_t count, int64_t depth, int64_t tokens) const {
    const int64_t rows = (count + k_.tokens - 1) / k_.tokens * k_.tokens;
    return {tokens, arena.take<T>(rows * depth), arena.take<T>(rows * rank_depth_)};
  }

  // Columns `from` .. from + size of x, of A and of W.
  struct Part {
    int64_t from, size;
  };

  // Tokens m .. m + count, which lie at token `at` of the panels: pack x, p = x aᵀ, and after the last part of p
  // q = s R p, packed.
  void prepare(int64_t m, int64_t count, const Packed& panels, const Part& part, int64_t at, float* q, float* p) const {
    const Paged<float, P>& paged = kernels();
    T* x = panels.x + at * k_.depth(part.size);
    k_.pack({g_.x + m * g_.K + part.from, g_.K, count, part.size, panels.tokens, x});
    k_.product({x, panels.tokens, g_.a + part.from, g_.K, count, part.size, 0, g_.r, nullptr, nullptr, nullptr, 0, 0,
                nullptr, p, g_.r, part.from > 0});
    if (part.from + part.size < g_.K) return;
    paged.rotate(
        {p, g_.pages, g_.page_stride, g_.slots ? g_.slots + m : nullptr, q, count, g_.r, float(g_.scale), false});
    k_.pack_ranks({q, g_.r, count, g_.r, panels.tokens, panels.q + at * rank_depth_});
  }

  void multiply(int64_t m, int64_t count, const Packed& panels, const Part& part, int64_t b0, int64_t b1) const {
    const bool last = part.from + part.size == g_.K;
    k_.product({panels.x, panels.tokens, weight_ + part.from, g_.K, count, part.size, b0 * kColumnGrain,
                std::min(b1 * kColumnGrain, g_.N), last ? bias_ : nullptr, last ? panels.q : nullptr, g_.bt, g_.N, g_.r,
                g_.out + m * g_.N, nullptr, g_.N, part.from > 0});
  }

  const Forward<T, P>& g_;
  SharedP* const shared_;
  const T *weight_, *bias_;
  const Fused<T>& k_;
  const int64_t depth_, rank_depth_;
};

// Many tokens of one layer, by all threads.
template <class T, class P>
void run_many(const FusedLayer<T, P>& layer, int threads) {
  const auto& g = layer.g;
  if constexpr (std::is_same_v<T, bf16>) {
    const Many<bf16>& k = kernels();
    if (k.product && g.N * g.K <= kTurnedWeight && g.M * (g.N + g.K) >= kTurnedPerWeight * g.N * g.K)
      return many_tokens(layer);
  }
  Call<T, P>(layer, kernels()).run_many(threads);
}

}  // namespace

template <class T>
bool has_fused(int64_t M, int64_t r) {
  const Fused<T>& k = kernels();
  return k.product != nullptr && r <= kMaxRank && (sizeof(T) == 2 || M < kPeakTokens);
}

template <class T, class P>
void fused(const FusedLayer<T, P>* layers, int64_t count) {
  const Fused<T>& k = kernels();
  int64_t work = 0, pieces = 0;
  bool few_tokens = true;
  for (int64_t i = 0; i < count; ++i) {
    const Call<T, P> call(layers[i], k);
    work += call.work(), pieces += call.pieces();
    few_tokens &= call.few_tokens();
  }
  const bool alone = work < kInlineWork<T>;
  if (!alone && !few_tokens) {
    for (int64_t i = 0; i < count; ++i) run_many(layers[i], thread_count());
    return;
  }
  std::vector<SharedP> shared(static_cast<size_t>(count));
  int64_t numbers = 0;
  for (int64_t i = 0; i < count; ++i) numbers += layers[i].g.p ? 0 : layers[i].g.M * layers[i].g.r;
  Scratch<float> scratch(std::is_same_v<T, float> ? numbers : 0);
  if constexpr (std::is_same_v<T, float>) {
    float* next = scratch.get();
    for (int64_t i = 0; i < count; ++i) {
      const auto& g = layers[i].g;
      shared[size_t(i)].p = g.p ? g.p : std::exchange(next, next + g.M * g.r);
    }
  }
  // Pieces b .. e of all layers, one after the other.
  const auto task = [&](int64_t b, int64_t e) {
    for (int64_t i = 0, first = 0; i < count && first < e; ++i) {
      const Call<T, P> call(layers[i], k, &shared[size_t(i)]);
      const int64_t own = call.pieces(), i0 = std::max(b - first, int64_t(0)), i1 = std::min(e - first, own);
      if (i0 < i1) call.run(i0, i1);
      first += own;
    }
  };
  alone ? task(0, pieces) : parallel_for(pieces, task);
}

template bool has_fused<float>(int64_t, int64_t);
template bool has_fused<bf16>(int64_t, int64_t);
template void fused<float, float>(const FusedLayer<float, float>*, int64_t);
template void fused<bf16, bf16>(const FusedLayer<bf16, bf16>*, int64_t);
template void fused<bf16, float>(const FusedLayer<bf16, float>*, int64_t);

}  // namespace loraxs::cpu
