// tadperf.kernels._native.per_sample and the gradient of its loss. The rows are shared among threads without the GIL.
#include "per_sample.h"

#include <nanobind/stl/optional.h>

#include "common/arrays.h"
#include "common/dispatch.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

using Results = Dense<float, 1>;

// About 10 us, whole vectors of rows.
int64_t block_of_rows(int64_t columns) { return std::max<int64_t>(16, 16384 / columns / 16 * 16); }

Labels labels_of(const Strided<1> &labels, int64_t rows) {
  check_shape("labels", labels, {rows});
  return {labels.data(), is_int64("labels", labels), stride_of(labels, 0)};
}

int64_t per_sample(Strided<2> logits, Strided<1> labels, Results loss, Results confidence, Dense<int64_t, 1> prediction,
                   Results margin, Results entropy, int64_t first, int64_t classes, std::optional<Results> state,
                   std::optional<Results> top, int isa, int threads) {
  int64_t rows = size_of(logits, 0), columns = size_of(logits, 1);
  if (columns < 1 || classes > INT32_MAX) throw nb::value_error("logits: expected 1 to 2^31 - 1 classes");
  if (first < 0 || first + columns > classes) throw nb::value_error("first: the columns must be among the classes");
  if (!state && columns != classes) throw nb::value_error("state: needed where columns are only a part of the classes");
  check_adjacent("logits", logits, 1);
  for (const Results *result : {&loss, &confidence, &margin, &entropy}) check_shape("results", *result, {rows});
  check_shape("prediction", prediction, {rows});
  if (state) check_shape("state", *state, {6 * rows});
  if (top) check_shape("top", *top, {rows});
  auto *fill_rows = pick<PerSampleRows>(isa, TADPERF_BY_ISA(per_sample));
  PerSample a{logits.data(),
              kind_of(logits.dtype()),
              rows,
              columns,
              stride_of(logits, 0),
              first,
              classes,
              state ? state->data() : nullptr,
              labels_of(labels, rows),
              loss.data(),
              confidence.data(),
              prediction.data(),
              margin.data(),
              entropy.data(),
              top ? top->data() : nullptr};
  std::atomic<int64_t> wrong{INT64_MAX};
  nb::gil_scoped_release release;
  parallel_for(rows, block_of_rows(columns), threads, [&](int64_t begin, int64_t end) {
    int64_t found = fill_rows(a, begin, end);
    for (int64_t first = wrong; found >= 0 && found < first && !wrong.compare_exchange_weak(first, found);) {
    }
  });
  return wrong == INT64_MAX ? -1 : int64_t(wrong);
}

void per_sample_gradient(Typed<const float, 2> logits, Strided<1> labels, Dense<const float, 1> top,
                         Dense<const float, 1> confidence, Dense<const float, 1> scale, Dense<float, 2> out,
                         int64_t first, int isa, int threads) {
  int64_t rows = size_of(logits, 0), columns = size_of(logits, 1);
  if (columns < 1) throw nb::value_error("logits: expected 1 or more classes");
  check_adjacent("logits", logits, 1);
  check_shape("out", out, {rows, columns});
  for (const Dense<const float, 1> *values : {&top, &confidence, &scale})
    check_shape("top, confidence and scale", *values, {rows});
  auto *fill_rows = pick<PerSampleGradientRows>(isa, TADPERF_BY_ISA(per_sample_gradient));
  PerSampleGradient a{
      logits.data(), out.data(),        rows,        columns, stride_of(logits, 0), first, labels_of(labels, rows),
      top.data(),    confidence.data(), scale.data()};
  nb::gil_scoped_release release;
  parallel_for(rows, block_of_rows(columns), threads, [&](int64_t begin, int64_t end) { fill_rows(a, begin, end); });
}

}  // namespace

void bind_per_sample(nb::module_ &m) {
  m.def("per_sample", &per_sample, array("logits"), array("labels"), array("loss"), array("confidence"),
        array("prediction"), array("margin"), array("entropy"), "first"_a, "classes"_a, array("state").none(),
        array("top").none(), "isa"_a, "threads"_a,
        "Fills the five results; returns the first row whose label is out of range, or -1.");
  m.def("per_sample_gradient", &per_sample_gradient, array("logits"), array("labels"), array("top"),
        array("confidence"), array("scale"), array("out"), "first"_a, "isa"_a, "threads"_a,
        "Fills out with (softmax - one-hot) * scale.");
}
