// tadperf.kernels._native.diverse_pick: checks shapes, walks the anomalies of each class, shares the classes out over
// threads with the GIL released.
#include "diverse_pick.h"

#include "common/dispatch.h"
#include "common/parallel.h"

#include <vector>

#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

using namespace nb::literals;

namespace {

using Candidates = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
using Features = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using Scores = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Classes = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct DiversePick {
  Rows candidates;           // from anomaly to anomaly
  int64_t candidate_stride;  // from candidate to candidate
  const double *scores;      // [anomalies, choices]
  Rows qualified;
  int64_t choices, size, top_k;
  double weight;  // NaN: the least similar of the pool
  int64_t *index;
  float *similarity;
  UnitRow *unit_row;
  JoinSet *join_set;
  LargestCosines *largest_cosines;
};

// The anomalies and the qualified of one class, in order.
struct Group {
  const int64_t *anomalies, *qualified;
  int64_t anomaly_count, qualified_count;
};

// Room for the set of a class and, after it, for the unit rows of one anomaly's pool.
struct Units {
  std::unique_ptr<float[]> memory;
  float *set, *pool;

  Units(int64_t size, int64_t most_held, int64_t most_pooled) {
    int64_t images = (most_held + SET_BLOCK - 1) / SET_BLOCK * SET_BLOCK;
    memory = std::make_unique<float[]>((images + most_pooled) * size + 16);
    set = memory.get() + (64 - uintptr_t(memory.get()) % 64) / 4 % 16;  // whole cache lines
    pool = set + images * size;
  }
};

// The best by score of one anomaly's candidates whose features are finite; their unit rows go to units.pool.
void choose_pool(const DiversePick &a, int64_t anomaly, Units &units, std::vector<int64_t> &order,
                 std::vector<int64_t> &pool) {
  const double *scores = a.scores + anomaly * a.choices;
  order.clear(), pool.clear();
  for (int64_t k = 0; k < a.choices; k++)
    if (scores[k] > -INFINITY) order.push_back(k);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return scores[x] > scores[y]; });
  for (int64_t k : order) {
    if (int64_t(pool.size()) == a.top_k) break;
    Rows rows{a.candidates.row(anomaly), a.candidate_stride, a.candidates.kind};
    if (a.unit_row(rows.row(k), rows.kind, a.size, units.pool + int64_t(pool.size()) * a.size)) pool.push_back(k);
  }
}

void walk(const DiversePick &a, const Group &group) {
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
    a.index[anomaly] = -1, a.similarity[anomaly] = NAN;
    if (pool.empty()) continue;
    if (held == 0) largest[0] = -INFINITY;
    else {
      const double *scores = a.scores + anomaly * a.choices;
      a.largest_cosines(units.pool, int64_t(pool.size()), units.set, held, a.size, largest.data());
      auto value = [&](int64_t at) {
        return std::isnan(a.weight) ? -double(largest[at]) : scores[pool[at]] + a.weight * (1 - double(largest[at]));
      };
      for (int64_t at = 1; at < int64_t(pool.size()); at++)
        if (value(at) > value(best) || (value(at) == value(best) && pool[at] < pool[best])) best = at;
    }
    a.index[anomaly] = pool[best], a.similarity[anomaly] = largest[best];
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

void diverse_pick(Candidates candidates, Scores scores, Features qualified, Classes classes, Classes qualified_classes,
                  int64_t top_k, double weight, Longs index, Floats similarity, int isa, int threads) {
  int64_t count = int64_t(candidates.shape(0)), choices = int64_t(candidates.shape(1));
  int64_t size = int64_t(candidates.shape(2));
  for (size_t n : {scores.shape(0), classes.shape(0), index.shape(0), similarity.shape(0)})
    if (int64_t(n) != count) throw nb::value_error("scores, classes and outputs must have one element per anomaly");
  if (int64_t(scores.shape(1)) != choices) throw nb::value_error("scores must have one element per candidate");
  if (int64_t(qualified.shape(1)) != size || qualified.shape(0) != qualified_classes.shape(0))
    throw nb::value_error("qualified must have as many features as the candidates, and a class for each");
  if (top_k < 1) throw nb::value_error("top_k must be 1 or more");
  auto apart = [](const auto &x, size_t last) { return x.size() && x.shape(last) > 1 && x.stride(last) != 1; };
  if (apart(candidates, 2) || apart(qualified, 1))
    throw nb::value_error("the features of an image must be adjacent");
  auto rows = [](const auto &x) {
    void *data = const_cast<void *>(static_cast<const void *>(x.data()));
    return Rows{data, x.shape(0) ? x.stride(0) : 0, kind_of(x.dtype())};
  };
  DiversePick a{rows(candidates),
                count ? candidates.stride(1) : 0,
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
    for (int64_t i = begin; i < end; i++) walk(a, all[i]);
  });
}

}  // namespace

void bind_diverse_pick(nb::module_ &m) {
  m.def("diverse_pick", &diverse_pick, "candidates"_a, "scores"_a, "qualified"_a, "classes"_a, "qualified_classes"_a,
        "top_k"_a, "weight"_a, "index"_a, "similarity"_a, "isa"_a, "threads"_a, "Fill index and similarity.");
}
