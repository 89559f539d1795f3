// Passes over the losses of one group, shared by the fit and the loops of each instruction set.
#pragma once

#include <cstdint>

// One Gaussian of a mixture: its log-density at z, but for -log(2 pi) / 2, is height - half_precision (z - mean)^2.
struct MixtureComponent {
  double mean, half_precision, height;
};

// Sums over samples: what a component owns of them, of its deviations z - mean, and of their squares.
struct MixtureSums {
  double count[2], first[2], second[2];
  double log_density;  // of the mixture, but for log(2 pi) / 2 each
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
// Probability of component 0 at z held between lowest and highest.
using MixturePosterior = void(const double *z, int64_t count, const MixtureComponent *two, MixtureRange held,
                              float *out);

namespace baseline {
MixtureExtent mixture_extent;
MixtureAbove mixture_above;
MixtureStep mixture_step;
MixturePosterior mixture_posterior;
}
namespace avx2 {
MixtureExtent mixture_extent;
MixtureAbove mixture_above;
MixtureStep mixture_step;
MixturePosterior mixture_posterior;
}
namespace avx512 {
MixtureExtent mixture_extent;
MixtureAbove mixture_above;
MixtureStep mixture_step;
MixturePosterior mixture_posterior;
}
