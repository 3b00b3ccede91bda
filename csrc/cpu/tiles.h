// project and expand for bf16 on AMX: 16 x 32 by 32 x 16 tile products with fp32 sums. Included by amx_bf16.cpp alone.
//
// project packs the operand with fewer rows into the pair-interleaved layout that the second factor of a tile product
// needs, and loads the other one from memory as it is. expand splits fp32 q into a high and a low bf16 part, so that
// the low-rank term keeps 16 bits of q and the rounding of y stays the only one that matters.
#pragma once
#include "cpu/expand.h"
#include "cpu/transpose.h"

namespace loraxs::cpu {
namespace {

constexpr int64_t kTile = 16, kTileDepth = 32;         // rows of a tile; bf16 along its depth
constexpr int64_t kTileElements = kTile * kTileDepth;  // 1 KiB

// Tiles 0 to 3 hold a 2 x 2 block of sums, 4 and 5 the first factor, 6 and 7 the second. All are full tiles.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    fence();
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

  // GCC's tile intrinsics do not tell the compiler that they read or write memory.
  static void fence() { asm volatile("" ::: "memory"); }
};

// Pairs of consecutive k as one 32-bit word, transposed: out[k / 2][row] for 16 rows of 32 bf16.
inline void transpose_pairs(const __m512i in[16], bf16* out) {
  __m512i t[16];
  transpose_words(in, t);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * kTileDepth, t[i]);
}

// One factor of a product along K: rows in memory, with an optional dropout mask.
struct Factor {
  const bf16* p;
  int64_t ld, rows, K;
  const Dropout* dropout;
  int64_t row0;

  bool whole(int64_t row, int64_t k) const { return row + kTile <= rows && k + kTileDepth <= K && dropout == nullptr; }
  // 32 elements of a row from k (a multiple of 32), zeros outside.
  __m512i line(int64_t row, int64_t k) const {
    if (row >= rows) return _mm512_setzero_si512();
    uint32_t mask = k + kTileDepth <= K ? ~0u : (1u << (K - k)) - 1;
    if (dropout) {
      uint64_t keep;
      keep_words(*dropout, uint32_t(row0 + row), uint32_t(k / 64), &keep, 1);
      mask &= uint32_t(keep >> (k % 64));
    }
    return _mm512_maskz_loadu_epi16(mask, p + row * ld + k);
  }
};

#define LORAXS_LOAD_FACTOR(tile, f, row, k)                                                                   \
  do {                                                                                                        \
    if ((f).whole(row, k)) {                                                                                  \
      _tile_loadd(tile, (f).p + (row) * (f).ld + (k), (f).ld * 2);                                            \
    } else {                                                                                                  \
      alignas(64) bf16 stage[kTileElements];                                                                  \
      for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(stage + i * kTileDepth, (f).line((row) + i, k)); \
      TileSession::fence();                                                                                   \
      _tile_loadd(tile, stage, 64);                                                                           \
    }                                                                                                         \
  } while (0)

// out[u * su + v * sv] (+)= alpha * sums[u][v]; one of the strides is 1.
inline void add_sums(const float* sums, int64_t nu, int64_t nv, float* out, int64_t su, int64_t sv, float alpha,
                     bool fresh) {
  using V = Vec<float>;
  if (sv == 1) {
    for (int64_t u = 0; u < nu; ++u, out += su) {
      const V s = V::load(sums + u * kTile) * V::splat(alpha);
      (fresh ? s : V::load_n(out, int(nv)) + s).store_n(out, int(nv));
    }
    return;
  }
  for (int64_t v = 0; v < nv; ++v, out += sv)
    for (int64_t u = 0; u < nu; ++u) {
      const float s = alpha * sums[u * kTile + v];
      out[u] = fresh ? s : out[u] + s;
    }
}

constexpr int64_t kPackedTiles = 64;  // 64 KiB of packed factor: stays in L2, and mostly in L1 for small ranks

// sums[u, v] = alpha * U[u] . V[v] at out[u * su + v * sv]; V is packed.
inline void tile_dots(const Factor& U, const Factor& V, float* out, int64_t su, int64_t sv, float alpha) {
  alignas(64) bf16 packed[kPackedTiles * kTileElements];
  alignas(64) float sums[4][kTile * kTile];
  const TileSession session;
  for (int64_t v0 = 0; v0 < V.rows; v0 += 4 * kTile) {
    const int64_t v_tiles = least(4, (V.rows - v0 + kTile - 1) / kTile), depth = kPackedTiles / v_tiles;
    for (int64_t k0 = 0; k0 < U.K; k0 += depth * kTileDepth) {
      const int64_t k_tiles = least(depth, (U.K - k0 + kTileDepth - 1) / kTileDepth);
      for (int64_t v = 0; v < v_tiles; ++v)
        for (int64_t k = 0; k < k_tiles; ++k) {
          __m512i line[16];
          for (int64_t i = 0; i < kTile; ++i) line[i] = V.line(v0 + v * kTile + i, k0 + k * kTileDepth);
          transpose_pairs(line, packed + (v * depth + k) * kTileElements);
        }
      TileSession::fence();
      for (int64_t u = 0; u < U.rows; u += 2 * kTile) {
        const bool two_u = u + kTile < U.rows;
        for (int64_t v = 0; v < v_tiles; v += 2) {
          const bool two_v = v + 1 < v_tiles;
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          const bf16* b = packed + v * depth * kTileElements;
          for (int64_t k = 0; k < k_tiles; ++k, b += kTileElements) {
            const int64_t kk = k0 + k * kTileDepth;
            _tile_loadd(6, b, 64);
            LORAXS_LOAD_FACTOR(4, U, u, kk);
            _tile_dpbf16ps(0, 4, 6);
            if (two_v) {
              _tile_loadd(7, b + depth * kTileElements, 64);
              _tile_dpbf16ps(1, 4, 7);
            }
            if (two_u) {
              LORAXS_LOAD_FACTOR(5, U, u + kTile, kk);
              _tile_dpbf16ps(2, 5, 6);
              if (two_v) _tile_dpbf16ps(3, 5, 7);
            }
          }
          _tile_stored(0, sums[0], 64);
          _tile_stored(1, sums[1], 64);
          _tile_stored(2, sums[2], 64);
          _tile_stored(3, sums[3], 64);
          TileSession::fence();
          for (int block = 0; block < 4; ++block) {
            const int64_t uu = u + block / 2 * kTile, vv = v0 + (v + block % 2) * kTile;
            const int64_t nu = least(kTile, U.rows - uu), nv = least(kTile, V.rows - vv);
            if (nu > 0 && nv > 0) add_sums(sums[block], nu, nv, out + uu * su + vv * sv, su, sv, alpha, k0 == 0);
          }
        }
      }
    }
  }
}

inline void project_tiles(const Project<bf16>& g) {
  if (!g.wide) return project<bf16>(g);
  const Factor x{g.x, g.ldx, g.M, g.K, g.dropout, g.row0}, a{g.a, g.lda, g.r, g.K, nullptr, 0};
  if (g.M < g.r)
    tile_dots(a, x, g.p, 1, g.ldp, g.alpha);
  else
    tile_dots(x, a, g.p, g.ldp, 1, g.alpha);
}

constexpr int64_t kMaxTileRank = 256;  // 16 tiles of q per row block
constexpr int64_t kPanelTiles = 24;    // of b, half an L1

// High and low bf16 parts of 16 rows of q as first factors. Ranks up to 16 share one tile: high in its first half of
// the depth, low in the second, against b twice. Larger ranks take all high tiles, then all low tiles.
inline void split_rows(const float* q, int64_t ldq, int64_t rows, int64_t r, int64_t tiles, bf16* out) {
  const bool shared = r <= kTile;
  const int64_t low = shared ? kTile : tiles * kTileElements;
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t j = 0; j < tiles * kTileDepth; j += kTile) {
      if (shared && j >= kTile) break;
      const int64_t left = i < rows ? least(kTile, r - j) : 0;
      const Vec<float> v = left > 0 ? Vec<float>::load_n(q + i * ldq + j, int(left)) : Vec<float>::zero();
      bf16* hi = out + j / kTileDepth * kTileElements + i * kTileDepth + j % kTileDepth;
      v.store(hi);
      Vec<float>{_mm512_sub_ps(v.v, Vec<float>::load(hi).v)}.store(hi + low);
    }
}

// Rows 2 i and 2 i + 1 of b interleaved: the second factors for 16 columns from n.
inline void pack_columns(const Expand<bf16>& g, int64_t n, int64_t tiles, bf16* out) {
  const bool shared = g.r <= kTile;
  const __mmask16 columns = Vec<float>::first(int(least(kTile, g.N - n)));
  const auto line = [&](int64_t j) {
    const __mmask16 mask = j < g.r ? columns : __mmask16(0);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, g.b + (j < g.r ? j * g.ldb : 0) + n));
  };
  for (int64_t j = 0; j < tiles * kTileDepth; j += 2) {
    if (shared && j >= kTile) break;
    const __m512i pair = _mm512_or_si512(line(j), _mm512_slli_epi32(line(j + 1), 16));
    bf16* row = out + j / 2 * kTileDepth;
    _mm512_store_si512(row, pair);
    if (shared) _mm512_store_si512(row + kTile / 2 * kTileDepth, pair);
  }
}

// A 2 x 2 block of finished tiles. expand keeps two: one is added to the output while the tiles work on the next.
using Sums = float[4][kTile * kTile];

constexpr int64_t kPanelWords = kPanelTiles * kTile / 64;

// Adds a 2 x 2 block of sums to rows m .. m + rows, columns n .. n + 32: all columns exist, nothing is dropped.
inline void finish_whole(const Expand<bf16>& g, const Sums& sums, int64_t m, int64_t rows, int64_t n) {
  using V = Vec<float>;
  const int64_t ld = g.ldio;
  const int32_t* slots = g.slots ? g.slots + m : nullptr;
  const bf16* in = g.in + m * ld + n;
  bf16* out = g.out + m * ld + n;
  for (int64_t i = 0; i < rows; ++i, in += ld, out += ld) {
    if (slots && slots[i] < 0) continue;
    const float* s = sums[i / kTile * 2] + i % kTile * kTile;
    (V::load(in) + V::load(s)).store(out);
    (V::load(in + kTile) + V::load(s + kTile * kTile)).store(out + kTile);
  }
}

// The same for the last columns before n1, under dropout (`keep` holds the words of the panel from n0, or null), or
// with nothing to add to.
inline void finish_any(const Expand<bf16>& g, const Sums& sums, int64_t m, int64_t rows, int64_t n, int64_t n1,
                       const uint64_t* keep, int64_t n0) {
  for (int64_t i = 0; i < rows; ++i) {
    if (!live(g, m + i)) continue;
    for (int64_t c = 0; c < 2 && n + c * kTile < n1; ++c)
      store_sum(g, m + i, n + c * kTile, int(least(kTile, n1 - n - c * kTile)),
                Vec<float>::load(sums[i / kTile * 2 + c] + i % kTile * kTile),
                keep ? keep + i * kPanelWords - n0 / 64 : nullptr);
  }
}

inline void expand_tiles(const Expand<bf16>& g) {
  if (!g.wide || g.r > kMaxTileRank) return expand<bf16>(g);
  copy_dead_rows(g);
  alignas(64) bf16 b_tiles[kPanelTiles * kTileElements], q_tiles[2][kMaxTileRank / kTile * kTileElements];
  alignas(64) Sums sums[2];
  uint64_t keep[2 * kTile][kPanelWords];
  const int64_t tiles = (g.r + kTileDepth - 1) / kTileDepth, halves = g.r <= kTile ? 1 : 2;
  const int64_t fit = kPanelTiles / tiles / 4 * 4 * kTile, panel = fit > 0 ? fit : 2 * kTile;
  const TileSession session;
  for (int64_t n0 = 0; n0 < g.N; n0 += panel) {
    const int64_t n1 = least(n0 + panel, g.N);
    for (int64_t n = n0; n < n1; n += kTile)
      pack_columns(g, n, tiles, b_tiles + (n - n0) / kTile * tiles * kTileElements);
    for (int64_t m = 0; m < g.M; m += 2 * kTile) {
      const int64_t rows = least(2 * kTile, g.M - m);
      const bool two_m = rows > kTile;
      split_rows(g.q + m * g.ldq, g.ldq, least(kTile, rows), g.r, tiles, q_tiles[0]);
      if (two_m) split_rows(g.q + (m + kTile) * g.ldq, g.ldq, rows - kTile, g.r, tiles, q_tiles[1]);
      if (g.dropout)
        for (int64_t i = 0; i < rows; ++i)
          keep_words(*g.dropout, uint32_t(g.row0 + m + i), uint32_t((g.col0 + n0) / 64), keep[i],
                     int((n1 - n0 + 63) / 64));
      const auto finish = [&](int64_t n) {
        const Sums& s = sums[n / (2 * kTile) % 2];
        if (g.dropout || !g.in || n + 2 * kTile > n1)
          finish_any(g, s, m, rows, n, n1, g.dropout ? keep[0] : nullptr, n0);
        else
          finish_whole(g, s, m, rows, n);
      };
      TileSession::fence();
      for (int64_t n = n0; n < n1; n += 2 * kTile) {
        const bool two_n = n + kTile < n1;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const bf16* q = q_tiles[0];
        const bf16* q2 = q_tiles[1];
        for (int64_t half = 0; half < halves; ++half) {
          const bf16* b = b_tiles + (n - n0) / kTile * tiles * kTileElements;
          for (int64_t t = 0; t < tiles; ++t, q += kTileElements, q2 += kTileElements, b += kTileElements) {
            _tile_loadd(4, q, 64);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (two_n) {
              _tile_loadd(7, b + tiles * kTileElements, 64);
              _tile_dpbf16ps(1, 4, 7);
            }
            if (two_m) {
              _tile_loadd(5, q2, 64);
              _tile_dpbf16ps(2, 5, 6);
              if (two_n) _tile_dpbf16ps(3, 5, 7);
            }
          }
        }
        if (n > n0) finish(n - 2 * kTile);
        Sums& s = sums[n / (2 * kTile) % 2];
        _tile_stored(0, s[0], 64);
        _tile_stored(1, s[1], 64);
        _tile_stored(2, s[2], 64);
        _tile_stored(3, s[3], 64);
        TileSession::fence();
      }
      finish((n1 - n0 - 1) / (2 * kTile) * (2 * kTile) + n0);
    }
  }
}

}  // namespace
}  // namespace loraxs::cpu
