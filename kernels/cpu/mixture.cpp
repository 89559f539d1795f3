// Passes over the losses of one group: their range, the part above a cut, one step of EM, and the posteriors.
//
// Everything is float64: if the components overlap, EM is slow and amplifies the rounding error of a step by up to 1e4.
#include "mixture.h"

#include <cmath>

#include "common/vector_math.h"

namespace {

constexpr int WIDTH = LANES / 2;  // doubles in a register
typedef double doubles __attribute__((vector_size(8 * WIDTH)));
typedef int64_t longs __attribute__((vector_size(8 * WIDTH)));
typedef uint64_t bits64 __attribute__((vector_size(8 * WIDTH)));

inline doubles fill64(double x) { return doubles{} + x; }
inline doubles absolute(doubles x) { return x < 0.0 ? -x : x; }

// exp(x) for x <= 0, to 1e-14; exactly 1 at 0. Below -300 it stays at exp(-300), too little to change a sum: denormal
// numbers doubled the time for losses of a wide range. Taylor's polynomial of degree 11.
inline doubles exp_nonpositive(doubles x) {
  x = x < -300.0 ? fill64(-300.0) : x;
  const double shift = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52 leaves n + 1023, the exponent bits of 2^n
  doubles z = x * 1.4426950408889634 + shift;
  doubles n = z - shift;
  doubles power = bit_cast<doubles>(bit_cast<bits64>(z) << 52);
  doubles r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  doubles p = r * (1 / 39916800.0) + 1 / 3628800.0;
  p = p * r + 1 / 362880.0;
  p = p * r + 1 / 40320.0;
  p = p * r + 1 / 5040.0;
  p = p * r + 1 / 720.0;
  p = p * r + 1 / 120.0;
  p = p * r + 1 / 24.0;
  p = p * r + 1 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  return (p * r + 1.0) * power;
}

// Calls f(vector, lanes in use) for the samples. Lanes beyond the last sample repeat the first sample.
template <class F>
inline void each(const double *z, int64_t count, F f) {
  int64_t i = 0;
  doubles x;
  for (; i + WIDTH <= count; i += WIDTH) {
    memcpy(&x, z + i, sizeof x);
    f(x, ~longs{});
  }
  if (i == count) return;
  x = fill64(z[0]);
  longs used{};
  for (int lane = 0; i + lane < count; lane++) {
    x[lane] = z[i + lane];
    used[lane] = -1;
  }
  f(x, used);
}

// The log-density of the mixture is density + log(excess) - log(2 pi) / 2.
struct Shares {
  doubles of_0, of_1;
  doubles density, excess;
};

// The shares of components 0 and 1 in samples whose deviations from the two means are u and w.
inline Shares shares(doubles u, doubles w, const MixtureComponent *two) {
  doubles a = two[0].height - u * u * two[0].half_precision;
  doubles b = two[1].height - w * w * two[1].half_precision;
  doubles d = a - b;
  doubles e = exp_nonpositive(-absolute(d));
  doubles excess = e + 1.0;
  doubles large = 1.0 / excess;
  doubles small = e * large;  // not 1 - large, which would lose digits
  longs a_is_larger = d >= 0.0;
  return {a_is_larger ? large : small, a_is_larger ? small : large, a_is_larger ? a : b, excess};
}

}  // namespace

MixtureRange TADPERF_ISA::mixture_extent(const double *z, int64_t count) {
  doubles low = fill64(z[0]), high = low;
  each(z, count, [&](doubles x, longs) {
    low = x < low ? x : low;
    high = x > high ? x : high;
  });
  MixtureRange range{low[0], high[0]};
  for (int i = 1; i < WIDTH; i++) {
    if (low[i] < range.lowest) range.lowest = low[i];
    if (high[i] > range.highest) range.highest = high[i];
  }
  return range;
}

MixturePart TADPERF_ISA::mixture_above(const double *z, int64_t count, double cut, double centre) {
  doubles number{}, first{}, second{};
  each(z, count, [&](doubles x, longs used) {
    longs above = (x > cut) & used;
    doubles c = above ? x - centre : fill64(0);
    number += above ? fill64(1) : fill64(0);
    first += c;
    second += c * c;
  });
  return {total(number), total(first), total(second)};
}

MixtureSums TADPERF_ISA::mixture_step(const double *z, int64_t count, const MixtureComponent *two) {
  constexpr int64_t CHUNK = 512 * WIDTH;  // a product of 512 numbers up to 2 is far from overflow: one log for all
  doubles count_0{}, count_1{}, first_0{}, first_1{}, second_0{}, second_1{}, density{};
  double logs = 0;
  for (int64_t begin = 0; begin < count; begin += CHUNK) {
    doubles product = fill64(1);
    each(z + begin, count - begin < CHUNK ? count - begin : CHUNK, [&](doubles x, longs used) {
      doubles u = x - two[0].mean, w = x - two[1].mean;
      Shares share = shares(u, w, two);
      doubles of_0 = used ? share.of_0 : fill64(0), of_1 = used ? share.of_1 : fill64(0);
      density += used ? share.density : fill64(0);
      product *= used ? share.excess : fill64(1);
      doubles moment_0 = of_0 * u, moment_1 = of_1 * w;
      count_0 += of_0;
      count_1 += of_1;
      first_0 += moment_0;
      first_1 += moment_1;
      second_0 += moment_0 * u;
      second_1 += moment_1 * w;
    });
    for (int i = 0; i < WIDTH; i++) logs += std::log(product[i]);
  }
  return {{total(count_0), total(count_1)},
          {total(first_0), total(first_1)},
          {total(second_0), total(second_1)},
          total(density) + logs};
}

void TADPERF_ISA::mixture_posterior(const double *z, int64_t count, const MixtureComponent *two, MixtureRange held,
                                    float *out) {
  int64_t i = 0;
  each(z, count, [&](doubles x, longs) {
    x = x < held.lowest ? fill64(held.lowest) : x;
    x = x > held.highest ? fill64(held.highest) : x;
    doubles of_0 = shares(x - two[0].mean, x - two[1].mean, two).of_0;
    for (int lane = 0; lane < WIDTH && i < count; lane++) out[i++] = float(of_0[lane]);
  });
}
