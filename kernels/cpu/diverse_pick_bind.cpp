// tadperf.kernels._native.diverse_pick: takes the anomalies of each class in order. Threads share the classes without
// the GIL.
#include "diverse_pick.h"

#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "common/arrays.h"
#include "common/dispatch.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

using Classes = Dense<const int64_t, 1>;

struct DiversePick {
  Rows candidates;           // from anomaly to anomaly
  int64_t candidate_stride;  // from candidate to candidate
  const double *scores;      // [anomalies, choices]
  Rows qualified;
  int64_t choices, size, top_k;
  double weight;  // of diversity; NaN picks the least similar candidate of the pool
  int64_t *index;
  float *similarity;
  UnitRow *unit_row;
  JoinSet *join_set;
  LargestCosines *largest_cosines;
};

// The indices of the anomalies and of the qualified images of one class, in order.
struct Group {
  const int64_t *anomalies, *qualified;
  int64_t anomaly_count, qualified_count;
};

// Memory for the set of a class, followed by the unit rows of one anomaly's pool.
struct Units {
  std::unique_ptr<float[]> memory;
  float *set, *pool;

  Units(int64_t size, int64_t most_held, int64_t most_pooled) {
    int64_t images = (most_held + SET_BLOCK - 1) / SET_BLOCK * SET_BLOCK;
    memory = std::make_unique<float[]>((images + most_pooled) * size + 16);
    set = memory.get() + (64 - uintptr_t(memory.get()) % 64) / 4 % 16;  // at the start of a cache line
    pool = set + images * size;
  }
};

// Finds one anomaly's candidates with finite features and the best scores. Writes their unit rows to units.pool.
void choose_pool(const DiversePick &a, int64_t anomaly, Units &units, std::vector<int64_t> &order,
                 std::vector<int64_t> &pool) {
  const double *scores = a.scores + anomaly * a.choices;
  order.clear();
  pool.clear();
  for (int64_t k = 0; k < a.choices; k++)
    if (scores[k] > -INFINITY) order.push_back(k);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return scores[x] > scores[y]; });
  for (int64_t k : order) {
    if (int64_t(pool.size()) == a.top_k) break;
    Rows rows{a.candidates.row(anomaly), a.candidate_stride, a.candidates.kind};
    if (a.unit_row(rows.row(k), rows.kind, a.size, units.pool + int64_t(pool.size()) * a.size)) pool.push_back(k);
  }
}

void pick_class(const DiversePick &a, const Group &group) {
  int64_t most_pooled = std::min(a.choices, a.top_k), held = 0;
  Units units(a.size, group.qualified_count + group.anomaly_count, most_pooled);
  std::vector<float> unit(a.size);
  for (int64_t i = 0; i < group.qualified_count; i++)
    if (a.unit_row(a.qualified.row(group.qualified[i]), a.qualified.kind, a.size, unit.data()))
      a.join_set(unit.data(), a.size, units.set, held++);
  std::vector<int64_t> order, pool;
  std::vector<float> largest(most_pooled);
  for (int64_t i = 0; i < group.anomaly_count; i++) {
    int64_t anomaly = group.anomalies[i], best = 0;
    choose_pool(a, anomaly, units, order, pool);
    a.index[anomaly] = -1;
    a.similarity[anomaly] = NAN;
    if (pool.empty()) continue;
    if (held == 0) {
      largest[0] = -INFINITY;
    } else {
      const double *scores = a.scores + anomaly * a.choices;
      a.largest_cosines(units.pool, int64_t(pool.size()), units.set, held, a.size, largest.data());
      auto value = [&](int64_t at) {
        return std::isnan(a.weight) ? -double(largest[at]) : scores[pool[at]] + a.weight * (1 - double(largest[at]));
      };
      for (int64_t at = 1; at < int64_t(pool.size()); at++)
        if (value(at) > value(best) || (value(at) == value(best) && pool[at] < pool[best])) best = at;
    }
    a.index[anomaly] = pool[best];
    a.similarity[anomaly] = largest[best];
    a.join_set(units.pool + best * a.size, a.size, units.set, held++);
  }
}

std::vector<int64_t> by_class(const Classes &classes) {
  std::vector<int64_t> order(classes.shape(0));
  std::iota(order.begin(), order.end(), 0);
  const int64_t *of = classes.data();
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return of[x] < of[y]; });
  return order;
}

std::vector<Group> groups(const Classes &classes, const std::vector<int64_t> &anomalies,
                          const Classes &qualified_classes, const std::vector<int64_t> &qualified) {
  std::vector<Group> found;
  size_t i = 0, j = 0;
  while (i < anomalies.size()) {
    int64_t wanted = classes.data()[anomalies[i]];
    while (j < qualified.size() && qualified_classes.data()[qualified[j]] < wanted) j++;
    Group group{&anomalies[i], qualified.data() + j, 0, 0};
    for (; i < anomalies.size() && classes.data()[anomalies[i]] == wanted; i++) group.anomaly_count++;
    for (; j < qualified.size() && qualified_classes.data()[qualified[j]] == wanted; j++) group.qualified_count++;
    found.push_back(group);
  }
  return found;
}

void diverse_pick(Strided<3> candidates, Dense<const double, 2> scores, Strided<2> qualified, Classes classes,
                  Classes qualified_classes, Dense<int64_t, 1> index, Dense<float, 1> similarity, int64_t top_k,
                  double weight, int isa, int threads) {
  int64_t count = size_of(candidates, 0), choices = size_of(candidates, 1), size = size_of(candidates, 2);
  check_shape("scores", scores, {count, choices});
  check_shape("qualified", qualified, {size_of(qualified_classes, 0), size});
  check_shape("classes", classes, {count});
  check_shape("index", index, {count});
  check_shape("similarity", similarity, {count});
  if (top_k < 1) throw nb::value_error("top_k: expected 1 or more");
  check_adjacent("candidates", candidates, 2);
  check_adjacent("qualified", qualified, 1);
  auto rows = [](const auto &x) {
    void *data = const_cast<void *>(static_cast<const void *>(x.data()));
    return Rows{data, stride_of(x, 0), kind_of(x.dtype())};
  };
  DiversePick a{rows(candidates),
                stride_of(candidates, 1),
                scores.data(),
                rows(qualified),
                choices,
                size,
                top_k,
                weight,
                index.data(),
                similarity.data(),
                pick<UnitRow>(isa, TADPERF_BY_ISA(unit_row)),
                pick<JoinSet>(isa, TADPERF_BY_ISA(join_set)),
                pick<LargestCosines>(isa, TADPERF_BY_ISA(largest_cosines))};

  nb::gil_scoped_release release;
  std::vector<int64_t> anomalies = by_class(classes), held = by_class(qualified_classes);
  std::vector<Group> all = groups(classes, anomalies, qualified_classes, held);
  parallel_for(int64_t(all.size()), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) pick_class(a, all[i]);
  });
}

}  // namespace

void bind_diverse_pick(nb::module_ &m) {
  m.def("diverse_pick", &diverse_pick, array("candidates"), array("scores"), array("qualified"), array("classes"),
        array("qualified_classes"), array("index"), array("similarity"), "top_k"_a, "weight"_a, "isa"_a, "threads"_a,
        "Fills index and similarity.");
}
