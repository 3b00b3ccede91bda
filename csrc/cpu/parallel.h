// torch's own thread pool, without its headers in the kernels.
#pragma once
#include <cstdint>
#include <functional>

namespace loraxs::cpu {

int thread_count();

// fn(begin, end) over a split of [0, n) into at most one range per thread; runs inline when already inside a parallel
// region.
void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& fn);

}  // namespace loraxs::cpu
