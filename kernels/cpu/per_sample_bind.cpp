// tadperf.kernels._native.per_sample: shares the rows out over threads with the GIL released. Tensors come as addresses:
// crossing by DLPack took 5 us for each of the seven. Types, devices and shapes are checked by the caller in Python.
#include "per_sample.h"

#include "common/dispatch.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

template <class T> T *at(uintptr_t address) { return reinterpret_cast<T *>(address); }

// About 10 us, whole vectors of rows.
int64_t block_of_rows(int64_t columns) { return std::max<int64_t>(16, 16384 / columns / 16 * 16); }

int64_t per_sample(uintptr_t logits, int kind, int64_t rows, int64_t columns, int64_t stride, uintptr_t labels,
                   bool labels_are_64bit, int64_t label_stride, uintptr_t loss, uintptr_t confidence,
                   uintptr_t prediction, uintptr_t margin, uintptr_t entropy, int isa, int threads, int64_t first,
                   int64_t classes, uintptr_t state, uintptr_t top) {
  if (columns < 1 || classes > INT32_MAX) throw nb::value_error("logits must have 1 to 2^31 - 1 classes");
  auto *fill_rows = pick<PerSampleRows>(isa, TADPERF_BY_ISA(per_sample));
  PerSample a{at<void>(logits), Kind(kind), rows, columns, stride, first, classes ? classes : columns,
              at<float>(state), {at<void>(labels), labels_are_64bit, label_stride}, at<float>(loss),
              at<float>(confidence), at<int64_t>(prediction), at<float>(margin), at<float>(entropy), at<float>(top)};
  std::atomic<int64_t> wrong{INT64_MAX};
  nb::gil_scoped_release release;
  parallel_for(rows, block_of_rows(columns), threads, [&](int64_t begin, int64_t end) {
    int64_t found = fill_rows(a, begin, end);
    for (int64_t first = wrong; found >= 0 && found < first && !wrong.compare_exchange_weak(first, found);) {
    }
  });
  return wrong == INT64_MAX ? -1 : int64_t(wrong);
}

void per_sample_gradient(uintptr_t logits, uintptr_t out, int64_t rows, int64_t columns, int64_t stride, int64_t first,
                         uintptr_t labels, bool labels_are_64bit, int64_t label_stride, uintptr_t top,
                         uintptr_t confidence, uintptr_t scale, int isa, int threads) {
  if (columns < 1) throw nb::value_error("logits must have a class");
  auto *fill_rows = pick<PerSampleGradientRows>(isa, TADPERF_BY_ISA(per_sample_gradient));
  PerSampleGradient a{at<float>(logits), at<float>(out), rows, columns, stride, first,
                      {at<void>(labels), labels_are_64bit, label_stride}, at<float>(top), at<float>(confidence),
                      at<float>(scale)};
  nb::gil_scoped_release release;
  parallel_for(rows, block_of_rows(columns), threads, [&](int64_t begin, int64_t end) { fill_rows(a, begin, end); });
}

}  // namespace

void bind_per_sample(nb::module_ &m) {
  m.def("per_sample", &per_sample, "logits"_a, "kind"_a, "rows"_a, "columns"_a, "stride"_a, "labels"_a,
        "labels_are_64bit"_a, "label_stride"_a, "loss"_a, "confidence"_a, "prediction"_a, "margin"_a, "entropy"_a,
        "isa"_a, "threads"_a, "first"_a = 0, "classes"_a = 0, "state"_a = 0, "top"_a = 0,
        "Fill the five outputs; returns the first row whose label is out of range, or -1.");
  m.def("per_sample_gradient", &per_sample_gradient, "logits"_a, "out"_a, "rows"_a, "columns"_a, "stride"_a, "first"_a,
        "labels"_a, "labels_are_64bit"_a, "label_stride"_a, "top"_a, "confidence"_a, "scale"_a, "isa"_a, "threads"_a,
        "Fill out with softmax - onehot, scaled row by row.");
}
