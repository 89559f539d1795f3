// Passes over the losses of one group: their range, the part above a cut, one step of EM, and the posteriors.
//
// All in float64: where components overlap EM creeps, and a step's rounding comes back multiplied by up to 1e4.
#include "mixture.h"

#include <cmath>

#include "simd.h"

namespace {

constexpr int WIDTH = LANES / 2;
typedef double f64 __attribute__((vector_size(4 * LANES)));
typedef int64_t long64 __attribute__((vector_size(4 * LANES)));

inline f64 fill64(double x) { return f64{} + x; }
inline f64 absolute(f64 x) { return x < 0.0 ? -x : x; }

// exp(x) for x <= 0, to 1e-14; exactly 1 at 0. Below -300 it stays at exp(-300), which no sum feels: denormal numbers
// made losses of wide range take twice as long. Taylor's polynomial of degree 11.
inline f64 exp_nonpositive(f64 x) {
  x = x < -300.0 ? fill64(-300.0) : x;
  const double shift = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52 leaves n + 1023, the exponent bits of 2^n
  f64 z = x * 1.4426950408889634 + shift;
  f64 n = z - shift;
  long64 power_bits;
  memcpy(&power_bits, &z, sizeof z);
  power_bits <<= 52;
  f64 power;
  memcpy(&power, &power_bits, sizeof power);
  f64 r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  f64 p = r * (1 / 39916800.0) + 1 / 3628800.0;
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

inline double total(f64 x) {
  double sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += x[i];
  return sum;
}

// Calls f(vector, lanes in use) for the samples; lanes beyond the last sample repeat the first.
template <class F> inline void each(const double *z, int64_t count, F f) {
  int64_t i = 0;
  f64 x;
  for (; i + WIDTH <= count; i += WIDTH) {
    memcpy(&x, z + i, sizeof x);
    f(x, ~long64{});
  }
  if (i == count) return;
  x = fill64(z[0]);
  long64 used{};
  for (int lane = 0; i < count; i++, lane++) x[lane] = z[i], used[lane] = -1;
  f(x, used);
}

struct Shares {
  f64 one, other;      // of components 0 and 1
  f64 density, excess;  // the mixture's log-density is density + log(excess)
};

inline Shares shares(f64 u, f64 w, const MixtureComponent *two) {
  f64 a = two[0].height - u * u * two[0].half_precision, b = two[1].height - w * w * two[1].half_precision;
  f64 d = a - b;
  f64 e = exp_nonpositive(-absolute(d)), excess = e + 1.0;
  f64 large = 1.0 / excess, small = e * large;  // never as 1 - large: both keep their digits
  long64 lower = d >= 0.0;
  return {lower ? large : small, lower ? small : large, lower ? a : b, excess};
}

}  // namespace

MixtureRange TADPERF_ISA::mixture_extent(const double *z, int64_t count) {
  f64 low = fill64(z[0]), high = low;
  each(z, count, [&](f64 x, long64) {
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
  f64 number{}, first{}, second{};
  each(z, count, [&](f64 x, long64 used) {
    long64 above = (x > cut) & used;
    f64 c = above ? x - centre : fill64(0);
    number += above ? fill64(1) : fill64(0);
    first += c;
    second += c * c;
  });
  return {total(number), total(first), total(second)};
}

MixtureSums TADPERF_ISA::mixture_step(const double *z, int64_t count, const MixtureComponent *two) {
  constexpr int64_t CHUNK = 512 * WIDTH;  // a product of 512 numbers up to 2 is far from overflow: one log for all
  f64 sums[6]{}, density{};
  double logs = 0;
  for (int64_t begin = 0; begin < count; begin += CHUNK) {
    f64 product = fill64(1);
    each(z + begin, count - begin < CHUNK ? count - begin : CHUNK, [&](f64 x, long64 used) {
      f64 u = x - two[0].mean, w = x - two[1].mean;
      Shares s = shares(u, w, two);
      f64 one = used ? s.one : fill64(0), other = used ? s.other : fill64(0);
      density += used ? s.density : fill64(0);
      product *= used ? s.excess : fill64(1);
      f64 first = one * u, second = other * w;
      sums[0] += one, sums[1] += other;
      sums[2] += first, sums[3] += second;
      sums[4] += first * u, sums[5] += second * w;
    });
    for (int i = 0; i < WIDTH; i++) logs += std::log(product[i]);
  }
  return {{total(sums[0]), total(sums[1])},
          {total(sums[2]), total(sums[3])},
          {total(sums[4]), total(sums[5])},
          total(density) + logs};
}

void TADPERF_ISA::mixture_posterior(const double *z, int64_t count, const MixtureComponent *two, MixtureRange held,
                                    float *out) {
  int64_t i = 0;
  each(z, count, [&](f64 x, long64) {
    x = x < held.lowest ? fill64(held.lowest) : x;
    x = x > held.highest ? fill64(held.highest) : x;
    f64 p = shares(x - two[0].mean, x - two[1].mean, two).one;
    for (int lane = 0; lane < WIDTH && i < count; lane++) out[i++] = float(p[lane]);
  });
}
