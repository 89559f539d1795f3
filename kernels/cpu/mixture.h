// The passes over the losses of one group, shared by the fit and the loops of each instruction set.
#pragma once

#include <cstdint>

// One Gaussian of a mixture. Its log-density at z is height - half_precision (z - mean)^2 - log(2 pi) / 2, with
// half_precision = 1 / (2 variance).
struct MixtureComponent {
  double mean, half_precision, height;
};

// Sums over the samples for each component k. With its share r of a sample: r, r (z - mean_k), r (z - mean_k)^2.
struct MixtureSums {
  double count[2], first[2], second[2];
  double log_density;  // of the mixture, without the term -log(2 pi) / 2 of each sample
};

struct MixtureRange {
  double lowest, highest;
};

// Count, sum and sum of squares of z - centre over the samples above a cut.
struct MixturePart {
  double count, first, second;
};

using MixtureExtent = MixtureRange(const double *z, int64_t count);
using MixtureAbove = MixturePart(const double *z, int64_t count, double cut, double centre);
using MixtureStep = MixtureSums(const double *z, int64_t count, const MixtureComponent *two);
// The probability of component 0 at z, with z clamped to `held`.
using MixturePosterior = void(const double *z, int64_t count, const MixtureComponent *two, MixtureRange held,
                              float *out);

namespace baseline {
MixtureExtent mixture_extent;
MixtureAbove mixture_above;
MixtureStep mixture_step;
MixturePosterior mixture_posterior;
}  // namespace baseline
namespace avx2 {
MixtureExtent mixture_extent;
MixtureAbove mixture_above;
MixtureStep mixture_step;
MixturePosterior mixture_posterior;
}  // namespace avx2
namespace avx512 {
MixtureExtent mixture_extent;
MixtureAbove mixture_above;
MixtureStep mixture_step;
MixturePosterior mixture_posterior;
}  // namespace avx512
