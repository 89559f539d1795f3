// The Python module tadperf.kernels._native: checks shapes, picks the instruction set, releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "parallel.h"
#include "per_sample.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

struct Isa {
  const char *name;
  PerSampleRows *per_sample;
};

// Those that this machine runs, the best one last.
std::vector<Isa> supported() {
  std::vector<Isa> found{{"baseline", baseline::per_sample}};
#ifdef TADPERF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx2", avx2::per_sample});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      found.push_back({"avx512", avx512::per_sample});
  }
#endif
  return found;
}

const std::vector<Isa> &isas() {
  static const std::vector<Isa> found = supported();
  return found;
}

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Labels = nb::ndarray<nb::ro, nb::ndim<1>, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int64_t per_sample(Logits logits, Labels labels, Floats loss, Floats confidence, Longs prediction, Floats margin,
                   Floats entropy, int isa, int threads) {
  int64_t rows = int64_t(logits.shape(0)), classes = int64_t(logits.shape(1));
  bool wide = labels.dtype() == nb::dtype<int64_t>();
  if (!wide && labels.dtype() != nb::dtype<int32_t>()) throw nb::value_error("labels must be int32 or int64");
  for (size_t n : {labels.shape(0), loss.shape(0), confidence.shape(0), prediction.shape(0), margin.shape(0),
                   entropy.shape(0)})
    if (int64_t(n) != rows) throw nb::value_error("labels and outputs must have one element per row");
  if (classes < 2 || classes > INT32_MAX) throw nb::value_error("logits must have at least two classes");
  if (rows > 0 && logits.stride(1) != 1) throw nb::value_error("the classes of a row must be adjacent");
  if (isa < 0 || isa >= int(isas().size())) throw nb::value_error("no such instruction set");

  PerSample a{logits.data(), rows, classes, rows ? logits.stride(0) : 0, labels.data(), wide,
              rows ? labels.stride(0) : 0, loss.data(), confidence.data(), prediction.data(), margin.data(),
              entropy.data()};
  std::atomic<int64_t> wrong{INT64_MAX};
  {
    nb::gil_scoped_release release;
    int64_t block = std::max<int64_t>(16, 16384 / classes / 16 * 16);  // about 10 us, whole vectors of rows
    parallel_for(rows, block, threads, [&](int64_t begin, int64_t end) {
      int64_t found = isas()[isa].per_sample(a, begin, end);
      for (int64_t first = wrong; found >= 0 && found < first && !wrong.compare_exchange_weak(first, found);) {
      }
    });
  }
  return wrong == INT64_MAX ? -1 : int64_t(wrong);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (auto &isa : isas()) names.emplace_back(isa.name);
    return names;
  }, "Instruction sets that this machine runs, the best one last.");
  m.def("per_sample", &per_sample, "logits"_a, "labels"_a, "loss"_a, "confidence"_a, "prediction"_a, "margin"_a,
        "entropy"_a, "isa"_a, "threads"_a,
        "Fill the five outputs; returns the first row whose label is out of range, or -1.");
}
