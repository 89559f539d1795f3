// The arguments of a trajectory distance and of its gradient, shared by the binding and the loops.
#pragma once

#include "common/element_types.h"

struct TrajectoryDistance {
  Rows student, target, start;
};

struct TrajectoryGradient {
  TrajectoryDistance inputs;
  // data is null for a gradient that is not needed. A row that serves all rows gets the sum of their gradients, in
  // float32.
  TrajectoryDistance grads;
};

// Squared distances of student and of start from target, over the elements begin..end of one row.
using SquaredDistances = void(const TrajectoryDistance &, int64_t row, int64_t begin, int64_t end, double sums[2]);

// The gradients of elements begin..end of one row. Student: of_distance * (student - target). Start: of_expert * (start
// - target). Target: minus the sum of the two.
using TrajectoryGradients = void(const TrajectoryGradient &, int64_t row, int64_t begin, int64_t end, float of_distance,
                                 float of_expert);

namespace baseline {
SquaredDistances squared_distances;
TrajectoryGradients trajectory_gradients;
}  // namespace baseline
namespace avx2 {
SquaredDistances squared_distances;
TrajectoryGradients trajectory_gradients;
}  // namespace avx2
namespace avx512 {
SquaredDistances squared_distances;
TrajectoryGradients trajectory_gradients;
}  // namespace avx512
