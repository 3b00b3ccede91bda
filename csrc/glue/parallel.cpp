#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace loraxs::cpu {

int thread_count() { return int(torch::stable::get_num_threads()); }

void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& fn) {
  torch::stable::parallel_for(0, n, 1, fn);
}

}  // namespace loraxs::cpu
