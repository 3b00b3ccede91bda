// The fused product in bf16 on AMX: rows of W are the first factor, as they lie in memory; tokens the second.
//
// A 2 x 2 block of tiles makes 32 columns of y for 32 tokens, transposed. The low-rank part is a few more steps of the
// same sum: q in a high and a low bf16 part against b, so that 16 bits of q count and the rounding of y stays the only
// one that matters. Included by amx_bf16.cpp alone.
#pragma once
#include "cpu/tiles.h"

namespace loraxs::cpu {
namespace {

constexpr int64_t kBlock = 2 * kTile;  // columns of y, and tokens, of a 2 x 2 block of tiles
constexpr int64_t kMaxTokens = 512;    // of one call: their sums (64 KiB) share L2 with the panels
constexpr int64_t kPieceSteps = 8;     // steps of a packed piece of W: 16 KiB, a third of an L1
constexpr int64_t kPiece = kPieceSteps * 2 * kTileElements;

inline int64_t tile_steps(int64_t K) { return (K + kTileDepth - 1) / kTileDepth; }
inline int64_t tile_depth(int64_t K) { return tile_steps(K) * kTileDepth; }

// Ranks up to 16 take one step, high and low parts side by side; larger ranks all high parts, then all low parts.
inline int64_t rank_steps(int64_t r) { return r <= kTile ? 1 : 2 * tile_steps(r); }
inline int64_t rank_tile_depth(int64_t r) { return rank_steps(r) * kTileDepth; }

// [16 tokens][step] tiles of interleaved pairs.
inline void pack_tiles(const Pack<bf16, bf16>& g) {
  const Factor x{g.rows, g.ld, g.M, g.depth, nullptr, 0};
  bf16* out = g.panel;
  for (int64_t m = 0; m < g.M; m += kTile)
    for (int64_t k = 0; k < g.depth; k += kTileDepth, out += kTileElements) {
      __m512i line[16];
      for (int64_t i = 0; i < kTile; ++i) {
        line[i] = x.line(m + i, k);
        // Rows are too short for the hardware to learn where they go on.
        if (m + 2 * kTile <= g.M) __builtin_prefetch(g.rows + (m + kTile + i) * g.ld + k);
      }
      transpose_pairs(line, out);
    }
}

inline void pack_rank_tiles(const Pack<bf16, float>& g) {
  const int64_t tiles = tile_steps(g.depth), steps = rank_steps(g.depth);
  alignas(64) bf16 rows[2 * kMaxTileRank / kTileDepth * kTileElements] = {};
  for (int64_t m = 0; m < g.M; m += kTile) {
    split_rows(g.rows + m * g.ld, g.ld, least(kTile, g.M - m), g.depth, tiles, rows);
    for (int64_t s = 0; s < steps; ++s) {
      __m512i line[16];
      for (int64_t i = 0; i < kTile; ++i) line[i] = _mm512_load_si512(rows + s * kTileElements + i * kTileDepth);
      transpose_pairs(line, g.panel + (m / kTile * steps + s) * kTileElements);
    }
  }
}

// 32 rows of W over `steps` steps as tiles that follow each other; zeros in the place of rows that do not exist.
inline void copy_rows(const Factor& w, int64_t n, int64_t k, int64_t steps, bf16* out) {
  const bool whole = n + kBlock <= w.rows && k + steps * kTileDepth <= w.K;
  for (int64_t i = 0; i < kBlock; ++i) {
    bf16* to = out + i / kTile * kTileElements + i % kTile * kTileDepth;
    const bf16* from = w.p + (n + i) * w.ld + k;
    for (int64_t s = 0; s < steps; ++s, to += 2 * kTileElements)
      _mm512_store_si512(to, whole ? _mm512_loadu_si512(from + s * kTileDepth) : w.line(n + i, k + s * kTileDepth));
  }
}

// Columns n .. n + 32 of b as first factors, in the order of the steps of q.
inline void copy_columns(const Product<bf16>& g, int64_t n, bf16* out) {
  const int64_t tiles = tile_steps(g.r), steps = rank_steps(g.r);
  const Expand<bf16> b{nullptr, nullptr, nullptr, g.b, 0, 0, g.ldb, 0, g.n1, g.r, nullptr, nullptr, 0, 0, true};
  alignas(64) bf16 pairs[kMaxTileRank / kTileDepth * kTileElements] = {};
  for (int64_t c = 0; c < 2; ++c) {
    if (n + c * kTile < g.n1)
      pack_columns(b, n + c * kTile, tiles, pairs);
    else
      std::memset(pairs, 0, sizeof pairs);
    for (int64_t s = 0; s < steps; ++s) {
      __m512i line[16];
      const bf16* tile = pairs + s % tiles * kTileElements;
      for (int64_t i = 0; i < kTile; ++i) line[i] = _mm512_load_si512(tile + i * kTileDepth);
      transpose_pairs(line, out + (2 * s + c) * kTileElements);
    }
  }
}

// Sums [column][token] of a 2 x 2 block to rows m .. m + 32 of p, transposed.
inline void finish_p(const Product<bf16>& g, const Sums& sums, int64_t m, int64_t n) {
  for (int64_t c = 0; c < 2 && n + c * kTile < g.n1; ++c) {
    const __mmask16 mask = Vec<float>::first(int(least(kTile, g.n1 - n - c * kTile)));
    for (int64_t t = 0; t < 2; ++t) {
      __m512i in[16], out[16];
      for (int64_t i = 0; i < kTile; ++i) in[i] = _mm512_load_si512(sums[2 * c + t] + i * kTile);
      transpose_words(in, out);
      const int64_t rows = least(kTile, g.M - m - t * kTile);
      for (int64_t i = 0; i < rows; ++i)
        _mm512_mask_storeu_epi32(g.p + (m + t * kTile + i) * g.ldy + n + c * kTile, mask, out[i]);
    }
  }
}

// The same to y: bias added and rounded first, so that two columns share a word and half the words are transposed.
inline void finish_y(const Product<bf16>& g, const Sums& sums, int64_t m, int64_t n) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  const int64_t columns = least(kBlock, g.n1 - n);
  const __mmask32 mask = __mmask32((uint64_t(1) << columns) - 1);
  alignas(64) float bias[kBlock] = {};
  if (g.bias)
    for (int64_t c = 0; c < kBlock; c += kTile)
      if (c < columns) Vec<float>::load_n(g.bias + n + c, int(least(kTile, columns - c))).store(bias + c);
  for (int64_t t = 0; t < 2 && m + t * kTile < g.M; ++t) {
    __m512i pairs[16], out[16];
    for (int64_t j = 0; j < kTile; ++j) {
      const float* sum = sums[j / 8 * 2 + t] + j % 8 * 2 * kTile;
      __m512 even = _mm512_load_ps(sum), odd = _mm512_load_ps(sum + kTile);
      if (g.bias) {
        even = _mm512_add_ps(even, _mm512_set1_ps(bias[2 * j]));
        odd = _mm512_add_ps(odd, _mm512_set1_ps(bias[2 * j + 1]));
      }
      pairs[j] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    transpose_words(pairs, out);
    const int64_t rows = least(kTile, g.M - m - t * kTile);
    for (int64_t i = 0; i < rows; ++i) _mm512_mask_storeu_epi16(g.y + (m + t * kTile + i) * g.ldy + n, mask, out[i]);
  }
}

inline void finish_block(const Product<bf16>& g, const Sums& sums, int64_t m, int64_t n) {
  g.p ? finish_p(g, sums, m, n) : finish_y(g, sums, m, n);
}

// Rows to fetch into the caches, one line a step.
struct Ahead {
  const bf16* rows;
  int64_t ld, first, last;

  void operator()(int64_t step) const {
    for (int64_t i = first; i < last; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(rows + i * ld + step * kTileDepth), _MM_HINT_T0);
  }
};

// Up to so large a W tokens pass by W rather than the other way round (Sapphire Rapids: mostly 4 to 18 % up to 2048 x
// 2048, nothing at 3584 x 3584, a loss of 20 % at 4096 x 4096).
constexpr int64_t kPassingWeight = 3 << 22;

// Which factor of a product of tiles goes by only once, and should not push the other one out of L1.
enum class Passing { none, first, second };

// The intrinsics want the number of the tile as a literal.
#define LORAXS_LOAD_TILE(once, tile, from, bytes) \
  if constexpr (once)                             \
    _tile_stream_loadd(tile, from, bytes);        \
  else                                            \
    _tile_loadd(tile, from, bytes)

// Adds `steps` products of tiles to the sums: one or two tiles of rows as first factors (steps of `stride` elements,
// rows of `bytes`) by one or two packed tiles. The vector units do what `beside` asks for meanwhile.
template <bool kTwoFirst, bool kTwoSecond, Passing kPassing, class Beside>
void add_tiles(const bf16* a0, const bf16* a1, int64_t stride, int64_t bytes, const bf16* b0, const bf16* b1,
               int64_t steps, Beside& beside) {
  constexpr bool first = kPassing == Passing::first, second = kPassing == Passing::second;
  for (int64_t s = 0; s < steps; ++s, a0 += stride, a1 += stride, b0 += kTileElements, b1 += kTileElements) {
    LORAXS_LOAD_TILE(second, 6, b0, 64);
    LORAXS_LOAD_TILE(first, 4, a0, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoSecond) {
      LORAXS_LOAD_TILE(second, 7, b1, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoFirst) {
      LORAXS_LOAD_TILE(first, 5, a1, bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoSecond) _tile_dpbf16ps(3, 5, 7);
    }
    beside(s);
  }
}

inline void product_tiles(const Product<bf16>& g) {
  const Factor w{g.w, g.ldw, g.n1, g.K, nullptr, 0};
  const int64_t steps = tile_steps(g.K), ranks = g.q ? rank_steps(g.r) : 0;
  const int64_t tiles = (g.M + kTile - 1) / kTile, pairs = (tiles + 1) / 2;
  alignas(64) Sums sums[kMaxTokens / kBlock];
  alignas(64) bf16 piece[kPiece], b[2 * 2 * kMaxTileRank / kTileDepth * kTileElements];
  const TileSession session;
  const int64_t pieces = (steps + kPieceSteps - 1) / kPieceSteps, piece_steps = (steps + pieces - 1) / pieces;
  const bool once = (g.n1 - g.n0) * g.K <= kPassingWeight;
  for (int64_t n = g.n0; n < g.n1; n += kBlock) {
    const bool two_rows = n + kTile < g.n1;
    const auto add = once ? (two_rows ? add_tiles<true, true, Passing::second, const Ahead>
                                      : add_tiles<false, true, Passing::second, const Ahead>)
                          : (two_rows ? add_tiles<true, true, Passing::none, const Ahead>
                                      : add_tiles<false, true, Passing::none, const Ahead>);
    const auto add_last = tiles % 2 == 0 ? add
                          : two_rows     ? add_tiles<true, false, Passing::none, const Ahead>
                                         : add_tiles<false, false, Passing::none, const Ahead>;
    if (ranks) {
      copy_columns(g, n, b);
      if (n + kBlock < g.n1)
        for (int64_t j = 0; j < g.r; ++j) __builtin_prefetch(g.b + j * g.ldb + n + kBlock);
    }
    // Few tokens read a row of W once or twice; for more, or where rows end early, a copy pays: a piece of W that
    // stays in L1, where rows a power of two apart would evict each other.
    const bool in_place = pairs <= 2 && n + kBlock <= g.n1 && g.K % kTileDepth == 0;
    for (int64_t k = 0; k < steps; k += in_place ? steps : piece_steps) {
      const int64_t count = in_place ? steps : least(piece_steps, steps - k);
      const bool last = k + count == steps;
      if (!in_place) copy_rows(w, n, k * kTileDepth, count, piece);
      TileSession::fence();
      const bf16* w0 = in_place ? g.w + n * g.ldw : piece;
      const bf16* w1 = w0 + (in_place ? kTile * g.ldw : kTileElements);
      const int64_t ws = in_place ? kTileDepth : 2 * kTileElements, wl = in_place ? g.ldw * 2 : 64;
      Ahead ahead{last ? g.w + (n + kBlock) * g.ldw : g.w + n * g.ldw + (k + count) * kTileDepth, g.ldw, 0, 0};
      const int64_t ahead_rows = pairs == 1 ? 0 : last ? least(kBlock, g.n1 - n - kBlock) : least(kBlock, g.n1 - n);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const bf16* x0 = g.x + (2 * pair * steps + k) * kTileElements;
        const auto add_pair = pair + 1 < pairs ? add : add_last;
        Sums& sum = sums[pair];
        if (k == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, sum[0], 64);
          _tile_loadd(1, sum[1], 64);
          _tile_loadd(2, sum[2], 64);
          _tile_loadd(3, sum[3], 64);
        }
        // The rows that come next are fetched a share a pair, so that memory works as long as the tiles do.
        ahead.first = ahead_rows * pair / pairs, ahead.last = ahead_rows * (pair + 1) / pairs;
        add_pair(w0, w1, ws, wl, x0, x0 + steps * kTileElements, count, ahead);
        if (last && ranks) {
          const bf16* q0 = g.q + 2 * pair * ranks * kTileElements;
          const Ahead nothing{};
          add_pair(b, b + kTileElements, 2 * kTileElements, 64, q0, q0 + ranks * kTileElements, ranks, nothing);
        }
        // The block before is finished while the tiles work on this one.
        if (last && pair > 0) finish_block(g, sums[pair - 1], (pair - 1) * kBlock, n);
        _tile_stored(0, sum[0], 64);
        _tile_stored(1, sum[1], 64);
        _tile_stored(2, sum[2], 64);
        _tile_stored(3, sum[3], 64);
        TileSession::fence();
      }
      if (last) finish_block(g, sums[pairs - 1], (pairs - 1) * kBlock, n);
    }
  }
}

constexpr Fused<bf16> fused_tiles{kBlock, tile_depth, rank_tile_depth, 0, pack_tiles, pack_rank_tiles, product_tiles};

}  // namespace
}  // namespace loraxs::cpu
