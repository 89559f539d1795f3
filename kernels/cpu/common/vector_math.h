// Mathematical functions of vectors. Included, like simd.h, by sources that are compiled once per instruction set.
#pragma once

#include <type_traits>

#include "common/simd.h"

namespace {

// The sum of all lanes, added from the first to the last.
template <class Vector>
inline auto total(const Vector &x) {
  std::decay_t<decltype(x[0])> sum = 0;
  for (size_t i = 0; i < sizeof(Vector) / sizeof(x[0]); i++) sum += x[i];
  return sum;
}

inline f32 square_root(f32 x) {
#if TADPERF_LANES == 16 && defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif TADPERF_LANES == 8 && defined(__AVX__)
  return _mm256_sqrt_ps(x);
#elif TADPERF_LANES == 4 && defined(__SSE__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

inline f32 inverse_root(f32 x) { return 1.0f / square_root(x); }

// exp(x) for x <= 0: exactly 1 at 0, exactly 0 below -87.7, NaN for NaN; within 2 ulp. Clamps x to a finite number, so
// that x * exp(x) is 0 for x = -inf. Cephes' polynomial; no branch, no table.
inline f32 exp_nonpositive(f32 &x) {
  x = max(fill(-88.0f), x);
  const float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23 leaves n + 127, the exponent bits of 2^n, in the low mantissa
  f32 z = x * 1.44269504f + shift;
  f32 n = z - shift;
  f32 power = bit_cast<f32>(bit_cast<u32>(z) << 23);
  f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  f32 r2 = r * r;
  f32 high = (r * 1.9875691500e-4f + 1.3981999507e-3f) * r2 + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  f32 p = high * r2 + (r * 1.6666665459e-1f + 5.0000001201e-1f);
  return (p * r2 + (r + 1.0f)) * power;
}

// log(x) for 1 <= x < inf: exactly 0 at 1; within 2 ulp. Cephes' polynomial.
inline f32 log_above_one(f32 x) {
  i32 bits = bit_cast<i32>(x);
  i32 exponent = (bits >> 23) - 127;
  f32 m = bit_cast<f32>((bits & 0x7fffff) | 0x3f800000);
  i32 upper = m > 1.41421356f;
  m = upper ? m * 0.5f : m;
  f32 e = __builtin_convertvector(exponent - upper, f32);  // `upper` is -1 for true
  f32 r = m - 1.0f;
  f32 r2 = r * r;
  f32 p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  p = p * r * r2 - e * 2.12194440e-4f - r2 * 0.5f;
  return r + p + e * 0.693359375f;
}

}  // namespace
