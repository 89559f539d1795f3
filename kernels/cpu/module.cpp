// The Python module tadperf.kernels._native: the instruction sets of this machine, and the bindings of each operator.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace {

// The instruction sets that this machine runs, the best one last.
std::vector<std::string> supported() {
  std::vector<std::string> found{"baseline"};
#ifdef TADPERF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
      found.push_back("avx512");
  }
#endif
  return found;
}

const std::vector<std::string> &isas() {
  static const std::vector<std::string> found = supported();
  return found;
}

}  // namespace

int isa_count() { return int(isas().size()); }

NB_MODULE(_native, m) {
  m.def("isas", &isas, "Instruction sets that this machine runs, the best one last.");
  m.def("set_openmp", &set_openmp, nb::arg("address"),
        "Use the threads of the OpenMP library with GOMP_parallel at this address; 0: a pool.");
  m.def("thread_pool", &thread_pool, "The threads of the loops: openmp or pool.");
  bind_conv3x3(m);
  bind_diverse_pick(m);
  bind_mixture(m);
  bind_norm_relu_pool(m);
  bind_norm_relu_pool_dual(m);
  bind_per_sample(m);
  bind_reliability(m);
  bind_trajectory_distance(m);
}
