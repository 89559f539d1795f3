// tadperf.kernels._native.per_sample: checks shapes, shares the rows out over threads with the GIL released.
#include "per_sample.h"

#include "dispatch.h"
#include "parallel.h"

using namespace nb::literals;

namespace {

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
  auto *fill_rows = pick<PerSampleRows>(isa, TADPERF_BY_ISA(per_sample));

  PerSample a{logits.data(), rows, classes, rows ? logits.stride(0) : 0, labels.data(), wide,
              rows ? labels.stride(0) : 0, loss.data(), confidence.data(), prediction.data(), margin.data(),
              entropy.data()};
  std::atomic<int64_t> wrong{INT64_MAX};
  {
    nb::gil_scoped_release release;
    int64_t block = std::max<int64_t>(16, 16384 / classes / 16 * 16);  // about 10 us, whole vectors of rows
    parallel_for(rows, block, threads, [&](int64_t begin, int64_t end) {
      int64_t found = fill_rows(a, begin, end);
      for (int64_t first = wrong; found >= 0 && found < first && !wrong.compare_exchange_weak(first, found);) {
      }
    });
  }
  return wrong == INT64_MAX ? -1 : int64_t(wrong);
}

}  // namespace

void bind_per_sample(nb::module_ &m) {
  m.def("per_sample", &per_sample, "logits"_a, "labels"_a, "loss"_a, "confidence"_a, "prediction"_a, "margin"_a,
        "entropy"_a, "isa"_a, "threads"_a,
        "Fill the five outputs; returns the first row whose label is out of range, or -1.");
}
