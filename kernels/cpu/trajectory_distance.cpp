// Squared distances from one read of three rows, and their gradient.
//
// Squares are added in float32 in four vectors, 16 squares per lane, before the lanes continue in float64. The
// time of the conversion is then hidden by the reads from memory. The sum of a block depends on that block only.
#include "trajectory_distance.h"

#include "common/load_store.h"
#include "common/vector_math.h"

namespace {

constexpr int64_t CHUNK = 64 * LANES;

struct Squares {
  f32 distance[4]{}, expert[4]{};
};

inline void add(Squares &squares, int part, const float *student, const float *target, const float *start,
                int64_t count) {
  f32 x{}, y{}, z{};
  __builtin_prefetch(student + AHEAD / 4);
  __builtin_prefetch(target + AHEAD / 4);
  __builtin_prefetch(start + AHEAD / 4);
  memcpy(&x, student, 4 * count);
  memcpy(&y, target, 4 * count);
  memcpy(&z, start, 4 * count);
  f32 to_student = x - y, to_start = z - y;
  squares.distance[part] += to_student * to_student;
  squares.expert[part] += to_start * to_start;
}

inline f64 sum_parts(const f32 part[4]) {
  return __builtin_convertvector((part[0] + part[1]) + (part[2] + part[3]), f64);
}

// Writes `values`. If one row serves all rows, row 0 is written and the other rows are added to it.
inline void put(const Rows &out, int64_t row, int64_t begin, int64_t count, const float *values) {
  if (out.kind != ElementType::float32) return write_halves(values, count, out.row(row), out.kind, begin);
  float *to = static_cast<float *>(out.row(row)) + begin;
  if (out.stride == 0 && row > 0)
    for (int64_t i = 0; i < count; i++) to[i] += values[i];
  else
    memcpy(to, values, 4 * count);
}

}  // namespace

void TADPERF_ISA::squared_distances(const TrajectoryDistance &args, int64_t row, int64_t begin, int64_t end,
                                    double sums[2]) {
  const auto &[student_rows, target_rows, start_rows] = args;
  float buffers[3][CHUNK];
  f64 distance{}, expert{};
  for (int64_t first = begin; first < end; first += CHUNK) {
    int64_t count = end - first < CHUNK ? end - first : CHUNK, i = 0;
    const float *student = read_floats(student_rows.row(row), student_rows.kind, first, count, buffers[0]);
    const float *target = read_floats(target_rows.row(row), target_rows.kind, first, count, buffers[1]);
    const float *start = read_floats(start_rows.row(row), start_rows.kind, first, count, buffers[2]);
    Squares squares;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
      for (int part = 0; part < 4; part++) {
        int64_t offset = i + part * LANES;
        add(squares, part, student + offset, target + offset, start + offset, LANES);
      }
    for (int part = 0; i < count; part++) {
      add(squares, part, student + i, target + i, start + i, count - i < LANES ? count - i : LANES);
      i += LANES;
    }
    distance += sum_parts(squares.distance);
    expert += sum_parts(squares.expert);
  }
  sums[0] = total(distance);
  sums[1] = total(expert);
}

void TADPERF_ISA::trajectory_gradients(const TrajectoryGradient &args, int64_t row, int64_t begin, int64_t end,
                                       float of_distance, float of_expert) {
  const auto &[student_rows, target_rows, start_rows] = args.inputs;
  float buffers[3][CHUNK], of_student[CHUNK], of_start[CHUNK], of_target[CHUNK];
  bool needs_student = args.grads.student.data || args.grads.target.data;
  bool needs_start = args.grads.start.data || args.grads.target.data;
  for (int64_t first = begin; first < end; first += CHUNK) {
    int64_t count = end - first < CHUNK ? end - first : CHUNK;
    const float *target = read_floats(target_rows.row(row), target_rows.kind, first, count, buffers[1]);
    if (needs_student) {
      const float *student = read_floats(student_rows.row(row), student_rows.kind, first, count, buffers[0]);
      for (int64_t i = 0; i < count; i++) of_student[i] = of_distance * (student[i] - target[i]);
    }
    if (needs_start) {
      const float *start = read_floats(start_rows.row(row), start_rows.kind, first, count, buffers[2]);
      for (int64_t i = 0; i < count; i++) of_start[i] = of_expert * (start[i] - target[i]);
    }
    if (args.grads.student.data) put(args.grads.student, row, first, count, of_student);
    if (args.grads.start.data) put(args.grads.start, row, first, count, of_start);
    if (args.grads.target.data) {
      for (int64_t i = 0; i < count; i++) of_target[i] = -(of_student[i] + of_start[i]);
      put(args.grads.target, row, first, count, of_target);
    }
  }
}
