// Which rows belong to which slot.
#pragma once
#include <cstdint>
#include <vector>

namespace loraxs::cpu {

// Rows of every slot in row order: the rows of slot i are rows[start[i] .. start[i + 1]).
struct RowLists {
  std::vector<int64_t> start;
  std::vector<int32_t> rows;

  RowLists(const int32_t* slots, int64_t M, int64_t S) : start(size_t(S) + 1), rows(size_t(M)) {
    for (int64_t m = 0; m < M; ++m)
      if (slots[m] >= 0) ++start[size_t(slots[m]) + 1];
    for (int64_t i = 0; i < S; ++i) start[i + 1] += start[i];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t m = 0; m < M; ++m)
      if (slots[m] >= 0) rows[size_t(next[slots[m]]++)] = int32_t(m);
  }
};

}  // namespace loraxs::cpu
