// The arguments of a trajectory distance and of its gradient, shared by the module and the loops.
#pragma once

#include "rows.h"

struct TrajectoryDistance {
  Rows student, target, start;
};

struct TrajectoryGradient {
  TrajectoryDistance inputs;
  TrajectoryDistance grads;  // data is null where not needed; a row that serves all gathers their sum, in float32
};

// One row's elements begin..end: squared distances of student and of start from target.
using SquaredDistances = void(const TrajectoryDistance &, int64_t row, int64_t begin, int64_t end, double sums[2]);

// One row's elements begin..end: of_distance * (student - target), of_way * (start - target), for target minus both.
using TrajectoryGradients = void(const TrajectoryGradient &, int64_t row, int64_t begin, int64_t end,
                                 float of_distance, float of_way);

namespace baseline { SquaredDistances squared_distances; TrajectoryGradients trajectory_gradients; }
namespace avx2 { SquaredDistances squared_distances; TrajectoryGradients trajectory_gradients; }
namespace avx512 { SquaredDistances squared_distances; TrajectoryGradients trajectory_gradients; }
