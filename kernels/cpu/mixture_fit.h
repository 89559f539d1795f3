// EM with extrapolated steps for one group, over whichever passes an instruction set offers.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "mixture.h"
#include "parallel.h"

struct MixtureLoops {
  MixtureExtent *extent;
  MixtureAbove *above;
  MixtureStep *step;
  MixturePosterior *posterior;
};

struct MixtureOptions {
  int64_t iterations;
  double tolerance, floor;
  bool monotone;
};

// Sums over fixed blocks, added in their order: the same bits however the blocks are shared out.
constexpr int64_t MIXTURE_BLOCK = 4096;

template <class Sums, class F> Sums mixture_sum(int64_t count, int threads, F f) {
  constexpr int FIELDS = sizeof(Sums) / sizeof(double);
  auto add = [](Sums &sum, const Sums &part) {
    auto *to = reinterpret_cast<double *>(&sum);
    auto *from = reinterpret_cast<const double *>(&part);
    for (int i = 0; i < FIELDS; i++) to[i] += from[i];
  };
  Sums sum{};
  if (threads == 1 || count <= 16 * MIXTURE_BLOCK) {
    for (int64_t i = 0; i < count; i += MIXTURE_BLOCK) add(sum, f(i, std::min(MIXTURE_BLOCK, count - i)));
    return sum;
  }
  std::vector<Sums> parts((count + MIXTURE_BLOCK - 1) / MIXTURE_BLOCK);
  parallel_for(count, MIXTURE_BLOCK, threads, [&](int64_t begin, int64_t end) {
    parts[begin / MIXTURE_BLOCK] = f(begin, end - begin);
  });
  for (const Sums &part : parts) add(sum, part);
  return sum;
}

// Unbounded coordinates, so that an extrapolation stays a mixture: log(w0 / w1), the means, the variances' logarithms.
using MixtureTheta = std::array<double, 5>;

struct MixtureFit {
  MixtureTheta theta;
  int64_t passes;
};

inline double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }

inline void mixture_components(const MixtureTheta &t, MixtureComponent two[2]) {
  two[0] = {t[1], 0.5 * std::exp(-t[3]), log_sigmoid(t[0]) - t[3] / 2};
  two[1] = {t[2], 0.5 * std::exp(-t[4]), log_sigmoid(-t[0]) - t[4] / 2};
}

class MixtureGroup {
 public:
  // The samples z, already scaled to 0..1, not all equal.
  MixtureGroup(const MixtureLoops &loops, const double *z, int64_t count, double floor, int threads)
      : loops(loops), z(z), count(count), threads(threads) {
    MixturePart all = above(-1, 0);
    mean = all.first / double(count);
    square = above(-1, mean).second;
    added = floor * square / double(count);
  }

  MixtureFit fit(const MixtureOptions &options) const {
    MixtureTheta t = start(), one, two, three;
    double limit = 1;
    int64_t passes = 0;
    for (; passes + 3 <= options.iterations; passes += 3) {
      step(t, one);
      double before = step(one, two);
      double reach = extrapolation(t, one, two, three, limit, options.tolerance);
      if (reach == 0) return {two, passes + 2};
      MixtureTheta from = three;
      bool better = step(from, three) >= before - SLACK;
      t = better ? three : two;
      if (!better) limit = std::max(1.0, limit / 4);
      else if (reach == limit) limit *= 4;
    }
    return {t, passes};
  }

 private:
  // The floor on the variances lets EM itself lower the mean log-density; 2e-7 was seen.
  static constexpr double SLACK = 1e-6;

  MixturePart above(double cut, double centre) const {
    return mixture_sum<MixturePart>(count, threads, [&](int64_t begin, int64_t n) {
      return loops.above(z + begin, n, cut, centre);
    });
  }

  MixtureTheta start() const {
    double n = double(count), cut = mean;
    MixturePart part = above(cut, mean);
    for (int i = 0; i < 20; i++) {
      double next = mean + (part.first / part.count - part.first / (n - part.count)) / 2;
      if (next == cut) break;
      MixturePart found = above(next, mean);
      if (std::min(found.count, n - found.count) * 50 < n) break;
      cut = next, part = found;
    }
    double rest = n - part.count, high = part.first / part.count, low = -part.first / rest;
    double wide = std::max(0.0, (square - part.second) / rest - low * low);
    return {std::log(rest) - std::log(part.count), mean + low, mean + high, std::log(wide + added),
            std::log(std::max(0.0, part.second / part.count - high * high) + added)};
  }

  // One step of EM from t to next; returns the mean log-density at t.
  double step(const MixtureTheta &t, MixtureTheta &next) const {
    MixtureComponent two[2];
    mixture_components(t, two);
    auto s = mixture_sum<MixtureSums>(count, threads, [&](int64_t begin, int64_t n) {
      return loops.step(z + begin, n, two);
    });
    for (int k = 0; k < 2; k++) {
      double owned = s.count[k] + 10 * std::numeric_limits<double>::epsilon();  // as sklearn: never a division by 0
      double shift = s.first[k] / owned;
      s.count[k] = std::log(owned);
      next[1 + k] = t[1 + k] + shift;
      next[3 + k] = std::log(std::max(0.0, s.second[k] / owned - shift * shift) + added);
    }
    next[0] = s.count[0] - s.count[1];
    return s.log_density / double(count);
  }

  // SQUAREM from three points of EM to `far`, by at most `limit`; returns how far, or 0 where t has arrived: where the
  // distance left, step / (1 - rate of convergence), in units of each component's deviation, is below the tolerance.
  static double extrapolation(const MixtureTheta &t, const MixtureTheta &one, const MixtureTheta &two,
                              MixtureTheta &far, double limit, double tolerance) {
    double unit[5] = {1, std::exp(-t[3] / 2), std::exp(-t[4] / 2), 1, 1}, step = 0, change = 0;
    for (int i = 0; i < 5; i++) {
      double r = (one[i] - t[i]) * unit[i], v = (two[i] - 2 * one[i] + t[i]) * unit[i];
      step += r * r, change += v * v;
    }
    step = std::sqrt(step), change = std::sqrt(change);
    double reach = change > 0 ? std::max(1.0, step / change) : 1;
    if (step * reach < tolerance) return 0;
    reach = std::min(reach, limit);
    for (int i = 0; i < 5; i++) {
      double r = one[i] - t[i], v = two[i] - 2 * one[i] + t[i];
      far[i] = t[i] + 2 * reach * r + reach * reach * v;
    }
    return reach;
  }

  const MixtureLoops &loops;
  const double *z;
  int64_t count;
  int threads;
  double mean, square, added;
};
