// EM with extrapolated steps for one group. The passes over the samples come from an instruction set's loops.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "mixture.h"

struct MixtureLoops {
  MixtureExtent *extent;
  MixtureAbove *above;
  MixtureStep *step;
  MixturePosterior *posterior;
};

// The last four are constants of kernels/shared.py.
struct MixtureOptions {
  int64_t iterations;
  double tolerance, floor;
  bool monotone;
  double slack;          // a step of EM may lower the mean log-density by this
  double tiny;           // added to the weight of a component: avoids a division by 0
  int64_t max_cuts;      // cuts by two-means
  double smallest_part;  // each side of a cut keeps one sample in this many
};

// Sums over fixed blocks, added in order: the number of threads does not change the bits.
constexpr int64_t MIXTURE_BLOCK = 4096;

template <class Sums, class F>
Sums mixture_sum(int64_t count, int threads, F f) {
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
  parallel_for(count, MIXTURE_BLOCK, threads,
               [&](int64_t begin, int64_t end) { parts[begin / MIXTURE_BLOCK] = f(begin, end - begin); });
  for (const Sums &part : parts) add(sum, part);
  return sum;
}

// A mixture in unbounded coordinates: log(weight 0 / weight 1), the two means, the logarithms of the two variances. Any
// extrapolation in them is again a mixture.
using MixtureTheta = std::array<double, 5>;

struct MixtureFit {
  MixtureTheta theta;
  int64_t passes;
};

inline double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }

// The two components of theta, as the passes need them.
inline void mixture_components(const MixtureTheta &theta, MixtureComponent two[2]) {
  two[0] = {theta[1], 0.5 * std::exp(-theta[3]), log_sigmoid(theta[0]) - theta[3] / 2};
  two[1] = {theta[2], 0.5 * std::exp(-theta[4]), log_sigmoid(-theta[0]) - theta[4] / 2};
}

class MixtureGroup {
 public:
  // z: samples scaled to 0..1, not all equal.
  MixtureGroup(const MixtureLoops &loops, const MixtureOptions &options, const double *z, int64_t count, int threads)
      : loops(loops), options(options), z(z), count(count), threads(threads) {
    MixturePart all = above(-1, 0);
    mean = all.first / double(count);
    square = above(-1, mean).second;
    variance_floor = options.floor * square / double(count);
  }

  MixtureFit fit() const {
    MixtureTheta theta = start(), one, two, far;
    double limit = 1;
    int64_t passes = 0;
    for (; passes + 3 <= options.iterations; passes += 3) {
      step(theta, one);
      double before = step(one, two);
      double reach = extrapolation(theta, one, two, far, limit, options.tolerance);
      if (reach == 0) return {two, passes + 2};
      MixtureTheta after_far;
      bool better = step(far, after_far) >= before - options.slack;
      theta = better ? after_far : two;
      if (!better)
        limit = std::max(1.0, limit / 4);
      else if (reach == limit)
        limit *= 4;
    }
    return {theta, passes};
  }

 private:
  MixturePart above(double cut, double centre) const {
    return mixture_sum<MixturePart>(count, threads,
                                    [&](int64_t begin, int64_t n) { return loops.above(z + begin, n, cut, centre); });
  }

  // Returns one component for each side of a cut. The cut moves to the middle of their means as long as each side keeps
  // enough samples.
  MixtureTheta start() const {
    double n = double(count), cut = mean;
    MixturePart part = above(cut, mean);
    for (int i = 0; i < options.max_cuts; i++) {
      double next = mean + (part.first / part.count - part.first / (n - part.count)) / 2;
      if (next == cut) break;
      MixturePart next_part = above(next, mean);
      if (std::min(next_part.count, n - next_part.count) * options.smallest_part < n) break;
      cut = next;
      part = next_part;
    }
    double below = n - part.count;
    double low = -part.first / below, high = part.first / part.count;  // means, from the mean of all
    double low_variance = std::max(0.0, (square - part.second) / below - low * low);
    double high_variance = std::max(0.0, part.second / part.count - high * high);
    return {std::log(below) - std::log(part.count), mean + low, mean + high, std::log(low_variance + variance_floor),
            std::log(high_variance + variance_floor)};
  }

  // Takes one step of EM from theta to next. Returns the mean log-density at theta plus log(2 pi) / 2.
  double step(const MixtureTheta &theta, MixtureTheta &next) const {
    MixtureComponent two[2];
    mixture_components(theta, two);
    auto sums = mixture_sum<MixtureSums>(count, threads,
                                         [&](int64_t begin, int64_t n) { return loops.step(z + begin, n, two); });
    double log_share[2];
    for (int k = 0; k < 2; k++) {
      double share = sums.count[k] + options.tiny;
      double shift = sums.first[k] / share;
      log_share[k] = std::log(share);
      next[1 + k] = theta[1 + k] + shift;
      next[3 + k] = std::log(std::max(0.0, sums.second[k] / share - shift * shift) + variance_floor);
    }
    next[0] = log_share[0] - log_share[1];
    return sums.log_density / double(count);
  }

  // Writes SQUAREM's extrapolation of three points of EM to `far`. Returns the factor of the extrapolation, at most
  // `limit`, or 0 on convergence. It has converged if the remaining distance, step / (1 - rate of convergence) in
  // standard deviations, is below the tolerance.
  static double extrapolation(const MixtureTheta &theta, const MixtureTheta &one, const MixtureTheta &two,
                              MixtureTheta &far, double limit, double tolerance) {
    double unit[5] = {1, std::exp(-theta[3] / 2), std::exp(-theta[4] / 2), 1, 1};
    double step = 0, change = 0;
    for (int i = 0; i < 5; i++) {
      double r = (one[i] - theta[i]) * unit[i], v = (two[i] - 2 * one[i] + theta[i]) * unit[i];
      step += r * r;
      change += v * v;
    }
    step = std::sqrt(step);
    change = std::sqrt(change);
    double reach = change > 0 ? std::max(1.0, step / change) : 1;
    if (step * reach < tolerance) return 0;
    reach = std::min(reach, limit);
    for (int i = 0; i < 5; i++) {
      double r = one[i] - theta[i], v = two[i] - 2 * one[i] + theta[i];
      far[i] = theta[i] + 2 * reach * r + reach * reach * v;
    }
    return reach;
  }

  const MixtureLoops &loops;
  const MixtureOptions &options;
  const double *z;
  int64_t count;
  int threads;
  double mean, square, variance_floor;
};
