// tadperf.kernels._native.trajectory_distance and its gradient: checks shapes, cuts rows into blocks, shares these out
// over threads with the GIL released.
#include "trajectory_distance.h"

#include "common/dispatch.h"
#include "common/parallel.h"

#include <tuple>

#include <vector>

#include <nanobind/stl/vector.h>

using namespace nb::literals;

namespace {

using Input = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using Output = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Lengths = std::vector<int64_t>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Results = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int64_t BLOCK = 16384;  // elements; 200 kB of three float32 rows, about 10 us

struct Block {
  int64_t begin, end, segment;
};

template <class Array> Rows rows_of(const Array &x) {
  int64_t count = int64_t(x.shape(0)), size = int64_t(x.shape(1));
  if (count > 0 && size > 1 && x.stride(1) != 1) throw nb::value_error("the parameters of a row must be adjacent");
  return {const_cast<void *>(static_cast<const void *>(x.data())), count > 1 ? x.stride(0) : 0, kind_of(x.dtype())};
}

int64_t rows_together(const Input &student, const Input &target, const Input &start) {
  int64_t rows = 1;
  for (const Input *x : {&student, &target, &start}) {
    if (x->shape(1) != student.shape(1)) throw nb::value_error("rows must be of one length");
    if (x->shape(0) != 1) rows = int64_t(x->shape(0));
  }
  for (const Input *x : {&student, &target, &start})
    if (x->shape(0) != 1 && int64_t(x->shape(0)) != rows) throw nb::value_error("inputs must have one row or all");
  return rows;
}

std::vector<Block> cut(const Lengths &lengths, int64_t size) {
  std::vector<Block> blocks;
  int64_t begin = 0;
  for (int64_t s = 0; s < int64_t(lengths.size()); s++) {
    int64_t length = lengths[s];
    if (length < 0 || length > size - begin) throw nb::value_error("segments must sum to the length of a row");
    for (int64_t end = begin + length; begin < end; begin = std::min(begin + BLOCK, end))
      blocks.push_back({begin, std::min(begin + BLOCK, end), s});
  }
  if (begin != size) throw nb::value_error("segments must sum to the length of a row");
  return blocks;
}

// Blocks claimed at a time: so many that small segments make one of usual size together.
int64_t claim(int64_t items, int64_t elements) {
  return std::max<int64_t>(1, std::min(items, items * BLOCK / std::max<int64_t>(elements, 1)));
}

void trajectory_distance(Input student, Input target, Input start, const Lengths &lengths, Results distance,
                         Results way, Results ratio, int isa, int threads) {
  int64_t rows = rows_together(student, target, start), segments = int64_t(lengths.size());
  for (const Results *out : {&distance, &way, &ratio})
    if (int64_t(out->shape(0)) != rows || int64_t(out->shape(1)) != segments)
      throw nb::value_error("outputs must have one element per row and segment");
  TrajectoryDistance a{rows_of(student), rows_of(target), rows_of(start)};
  auto *sum_block = pick<SquaredDistances>(isa, TADPERF_BY_ISA(squared_distances));
  int64_t size = int64_t(student.shape(1));
  std::vector<Block> blocks = cut(lengths, size);

  nb::gil_scoped_release release;
  int64_t count = int64_t(blocks.size()), items = rows * count;
  std::vector<double> sums(2 * items);
  parallel_for(items, claim(items, rows * size), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Block &block = blocks[i % count];
      sum_block(a, i / count, block.begin, block.end, &sums[2 * i]);
    }
  });
  for (int64_t row = 0; row < rows; row++) {
    const double *sum = sums.data() + 2 * row * count;  // sums may be empty
    const Block *block = blocks.data(), *last = block + count;
    for (int64_t segment = 0; segment < segments; segment++) {
      double d = 0, w = 0;
      for (; block < last && block->segment == segment; block++, sum += 2) d += sum[0], w += sum[1];
      int64_t at = row * segments + segment;
      distance.data()[at] = float(d), way.data()[at] = float(w), ratio.data()[at] = float(d / w);
    }
  }
}

void trajectory_distance_gradient(Input student, Input target, Input start, const Lengths &lengths, Floats of_distance,
                                  Floats of_way, Output grad_student, Output grad_target, Output grad_start, int isa,
                                  int threads) {
  int64_t rows = rows_together(student, target, start), segments = int64_t(lengths.size());
  for (const Floats *x : {&of_distance, &of_way})
    if (int64_t(x->shape(0)) != rows || int64_t(x->shape(1)) != segments)
      throw nb::value_error("factors must have one element per row and segment");
  TrajectoryGradient a{{rows_of(student), rows_of(target), rows_of(start)},
                       {rows_of(grad_student), rows_of(grad_target), rows_of(grad_start)}};
  bool shared = false;  // a gradient that sums over the rows
  for (auto [in, out, grad] : {std::tuple{&student, &grad_student, &a.grads.student},
                               std::tuple{&target, &grad_target, &a.grads.target},
                               std::tuple{&start, &grad_start, &a.grads.start}}) {
    if (out->shape(0) == 0) {
      grad->data = nullptr;
      continue;
    }
    if (out->shape(0) != in->shape(0) || out->shape(1) != in->shape(1))
      throw nb::value_error("a gradient must have its input's shape, or no rows");
    bool sums = int64_t(in->shape(0)) < rows;
    if (sums && grad->kind != Kind::float32) throw nb::value_error("a gradient that sums over rows must be float32");
    shared |= sums;
  }
  auto *write_block = pick<TrajectoryGradients>(isa, TADPERF_BY_ISA(trajectory_gradients));
  int64_t size = int64_t(student.shape(1));
  std::vector<Block> blocks = cut(lengths, size);

  nb::gil_scoped_release release;
  int64_t count = int64_t(blocks.size()), together = shared ? std::max<int64_t>(rows, 1) : 1;
  int64_t items = rows / together * count;
  parallel_for(items, claim(items, rows * size), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Block &block = blocks[i % count];
      for (int64_t row = i / count * together, stop = row + together; row < stop; row++) {
        int64_t at = row * segments + block.segment;
        write_block(a, row, block.begin, block.end, of_distance.data()[at], of_way.data()[at]);
      }
    }
  });
}

}  // namespace

void bind_trajectory_distance(nb::module_ &m) {
  m.def("trajectory_distance", &trajectory_distance, "student"_a, "target"_a, "start"_a, "lengths"_a, "distance"_a,
        "way"_a, "ratio"_a, "isa"_a, "threads"_a, "Fill the three outputs.");
  m.def("trajectory_distance_gradient", &trajectory_distance_gradient, "student"_a, "target"_a, "start"_a,
        "lengths"_a, "of_distance"_a, "of_way"_a, "grad_student"_a, "grad_target"_a, "grad_start"_a, "isa"_a,
        "threads"_a, "Fill the gradients that have rows.");
}
