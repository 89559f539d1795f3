// tadperf.kernels._native.trajectory_distance and its gradient: cuts rows into blocks, which threads share without the
// GIL.
#include "trajectory_distance.h"

#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "common/arrays.h"
#include "common/dispatch.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

using Input = Strided<2>;
using Output = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Factors = Dense<const float, 2>;
using Results = Dense<float, 2>;
using Lengths = std::vector<int64_t>;

constexpr int64_t BLOCK = 16384;  // elements; 200 kB of three float32 rows, about 10 us

struct Block {
  int64_t begin, end, segment;
};

template <class Array>
Rows rows_of(const Array &x) {
  check_adjacent("student, target, start", x, 1);
  void *data = const_cast<void *>(static_cast<const void *>(x.data()));
  return {data, size_of(x, 0) > 1 ? stride_of(x, 0) : 0, kind_of(x.dtype())};
}

// The number of rows: an input has either this many rows, or one row for all.
int64_t common_rows(const Input &student, const Input &target, const Input &start) {
  int64_t rows = 1;
  for (const Input *x : {&student, &target, &start}) {
    if (x->shape(1) != student.shape(1)) throw nb::value_error("student, target, start: rows must have one length");
    if (x->shape(0) != 1) rows = size_of(*x, 0);
  }
  for (const Input *x : {&student, &target, &start})
    if (x->shape(0) != 1 && size_of(*x, 0) != rows)
      throw nb::value_error("student, target, start: expected one row, or as many as the others");
  return rows;
}

std::vector<Block> cut(const Lengths &lengths, int64_t size) {
  std::vector<Block> blocks;
  int64_t begin = 0;
  for (int64_t s = 0; s < int64_t(lengths.size()); s++) {
    int64_t length = lengths[s];
    if (length < 0 || length > size - begin)
      throw nb::value_error("lengths: expected lengths that sum to the length of a row");
    for (int64_t end = begin + length; begin < end; begin = std::min(begin + BLOCK, end))
      blocks.push_back({begin, std::min(begin + BLOCK, end), s});
  }
  if (begin != size) throw nb::value_error("lengths: expected lengths that sum to the length of a row");
  return blocks;
}

// Blocks that a thread takes at a time. Several blocks of small segments have the size of one usual block.
int64_t blocks_at_a_time(int64_t items, int64_t elements) {
  return std::max<int64_t>(1, std::min(items, items * BLOCK / std::max<int64_t>(elements, 1)));
}

void trajectory_distance(Input student, Input target, Input start, const Lengths &lengths, Results distance,
                         Results expert_distance, Results ratio, int isa, int threads) {
  int64_t rows = common_rows(student, target, start), segments = int64_t(lengths.size()), size = size_of(student, 1);
  for (const Results *result : {&distance, &expert_distance, &ratio}) check_shape("results", *result, {rows, segments});
  TrajectoryDistance a{rows_of(student), rows_of(target), rows_of(start)};
  auto *sum_block = pick<SquaredDistances>(isa, TADPERF_BY_ISA(squared_distances));
  std::vector<Block> blocks = cut(lengths, size);

  nb::gil_scoped_release release;
  int64_t count = int64_t(blocks.size()), items = rows * count;
  std::vector<double> sums(2 * items);
  parallel_for(items, blocks_at_a_time(items, rows * size), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Block &block = blocks[i % count];
      sum_block(a, i / count, block.begin, block.end, sums.data() + 2 * i);
    }
  });
  for (int64_t row = 0; row < rows; row++) {
    const double *sum = sums.data() + 2 * row * count;  // sums may be empty
    const Block *block = blocks.data(), *last = block + count;
    for (int64_t segment = 0; segment < segments; segment++) {
      double student_sum = 0, expert_sum = 0;
      for (; block < last && block->segment == segment; block++, sum += 2) {
        student_sum += sum[0];
        expert_sum += sum[1];
      }
      int64_t at = row * segments + segment;
      distance.data()[at] = float(student_sum);
      expert_distance.data()[at] = float(expert_sum);
      ratio.data()[at] = float(student_sum / expert_sum);
    }
  }
}

void trajectory_distance_gradient(Input student, Input target, Input start, const Lengths &lengths,
                                  Factors distance_factor, Factors expert_factor, Output grad_student,
                                  Output grad_target, Output grad_start, int isa, int threads) {
  int64_t rows = common_rows(student, target, start), segments = int64_t(lengths.size()), size = size_of(student, 1);
  for (const Factors *x : {&distance_factor, &expert_factor}) check_shape("factors", *x, {rows, segments});
  TrajectoryGradient a{{rows_of(student), rows_of(target), rows_of(start)},
                       {rows_of(grad_student), rows_of(grad_target), rows_of(grad_start)}};
  bool shared = false;  // whether a gradient is a sum over the rows
  for (auto [in, out, grad] :
       {std::tuple{&student, &grad_student, &a.grads.student}, std::tuple{&target, &grad_target, &a.grads.target},
        std::tuple{&start, &grad_start, &a.grads.start}}) {
    if (out->shape(0) == 0) {
      grad->data = nullptr;
      continue;
    }
    if (out->shape(0) != in->shape(0) || out->shape(1) != in->shape(1))
      throw nb::value_error("a gradient must have the shape of its input, or no rows if it is not needed");
    bool sums = size_of(*in, 0) < rows;
    if (sums && grad->kind != ElementType::float32)
      throw nb::value_error("a gradient that is a sum over the rows must be float32");
    shared |= sums;
  }
  auto *write_block = pick<TrajectoryGradients>(isa, TADPERF_BY_ISA(trajectory_gradients));
  std::vector<Block> blocks = cut(lengths, size);

  nb::gil_scoped_release release;
  int64_t count = int64_t(blocks.size()), together = shared ? std::max<int64_t>(rows, 1) : 1;
  int64_t items = rows / together * count;
  parallel_for(items, blocks_at_a_time(items, rows * size), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Block &block = blocks[i % count];
      for (int64_t row = i / count * together, stop = row + together; row < stop; row++) {
        int64_t at = row * segments + block.segment;
        write_block(a, row, block.begin, block.end, distance_factor.data()[at], expert_factor.data()[at]);
      }
    }
  });
}

}  // namespace

void bind_trajectory_distance(nb::module_ &m) {
  m.def("trajectory_distance", &trajectory_distance, array("student"), array("target"), array("start"), "lengths"_a,
        array("distance"), array("expert_distance"), array("ratio"), "isa"_a, "threads"_a, "Fills the three results.");
  m.def("trajectory_distance_gradient", &trajectory_distance_gradient, array("student"), array("target"),
        array("start"), "lengths"_a, array("distance_factor"), array("expert_factor"), array("grad_student"),
        array("grad_target"), array("grad_start"), "isa"_a, "threads"_a, "Fills the gradients that have rows.");
}
