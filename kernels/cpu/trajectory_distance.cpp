// Squared distances from one read of three rows, and their gradient.
//
// Squares are added in float32 in four vectors of lanes, 16 to a lane, before the lanes go on in float64: that costs
// nothing beside the reads from memory. The sum of a block depends on that block alone.
#include "trajectory_distance.h"

#include "half.h"

namespace {

typedef double f64 __attribute__((vector_size(8 * LANES)));

constexpr int64_t CHUNK = 64 * LANES;

struct Squares {
  f32 distance[4]{}, way[4]{};
};

inline void add(Squares &s, int lane, const float *student, const float *target, const float *start, int64_t count) {
  f32 x{}, y{}, z{};
  __builtin_prefetch(student + AHEAD / 4);
  __builtin_prefetch(target + AHEAD / 4);
  __builtin_prefetch(start + AHEAD / 4);
  memcpy(&x, student, 4 * count);
  memcpy(&y, target, 4 * count);
  memcpy(&z, start, 4 * count);
  f32 d = x - y, w = z - y;
  s.distance[lane] += d * d;
  s.way[lane] += w * w;
}

inline f64 widen(const f32 part[4]) {
  return __builtin_convertvector((part[0] + part[1]) + (part[2] + part[3]), f64);
}

inline double total(const f64 &x) {
  double sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

}  // namespace

void TADPERF_ISA::squared_distances(const TrajectoryDistance &a, int64_t row, int64_t begin, int64_t end,
                                    double sums[2]) {
  float buffers[3][CHUNK];
  f64 distance{}, way{};
  for (int64_t at = begin; at < end; at += CHUNK) {
    int64_t count = end - at < CHUNK ? end - at : CHUNK, i = 0;
    const float *student = read_floats(a.student.row(row), a.student.kind, at, count, buffers[0]);
    const float *target = read_floats(a.target.row(row), a.target.kind, at, count, buffers[1]);
    const float *start = read_floats(a.start.row(row), a.start.kind, at, count, buffers[2]);
    Squares s;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
      for (int j = 0, k = 0; j < 4; j++, k += LANES) add(s, j, student + i + k, target + i + k, start + i + k, LANES);
    for (int j = 0; i < count; j++, i += LANES)
      add(s, j, student + i, target + i, start + i, count - i < LANES ? count - i : LANES);
    distance += widen(s.distance);
    way += widen(s.way);
  }
  sums[0] = total(distance), sums[1] = total(way);
}

namespace {

// Writes `values`, or adds them to the row that serves all.
inline void put(const Rows &out, int64_t row, int64_t begin, int64_t count, const float *values) {
  if (out.kind != Kind::float32) return write_halves(values, count, out.row(row), out.kind, begin);
  float *to = static_cast<float *>(out.row(row)) + begin;
  if (out.stride == 0 && row > 0)
    for (int64_t i = 0; i < count; i++) to[i] += values[i];
  else memcpy(to, values, 4 * count);
}

}  // namespace

void TADPERF_ISA::trajectory_gradients(const TrajectoryGradient &a, int64_t row, int64_t begin, int64_t end,
                                       float of_distance, float of_way) {
  const auto &[student, target, start] = a.inputs;
  float buffers[3][CHUNK], of_student[CHUNK], of_start[CHUNK], of_target[CHUNK];
  bool left = a.grads.student.data || a.grads.target.data, right = a.grads.start.data || a.grads.target.data;
  for (int64_t at = begin; at < end; at += CHUNK) {
    int64_t count = end - at < CHUNK ? end - at : CHUNK;
    const float *t = read_floats(target.row(row), target.kind, at, count, buffers[1]);
    if (left) {
      const float *s = read_floats(student.row(row), student.kind, at, count, buffers[0]);
      for (int64_t i = 0; i < count; i++) of_student[i] = of_distance * (s[i] - t[i]);
    }
    if (right) {
      const float *u = read_floats(start.row(row), start.kind, at, count, buffers[2]);
      for (int64_t i = 0; i < count; i++) of_start[i] = of_way * (u[i] - t[i]);
    }
    if (a.grads.student.data) put(a.grads.student, row, at, count, of_student);
    if (a.grads.start.data) put(a.grads.start, row, at, count, of_start);
    if (a.grads.target.data) {
      for (int64_t i = 0; i < count; i++) of_target[i] = -(of_student[i] + of_start[i]);
      put(a.grads.target, row, at, count, of_target);
    }
  }
}
