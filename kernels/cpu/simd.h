// Vectors of TADPERF_LANES floats in the compilers' own vector extension (GCC, Clang): the same source gives SSE2, NEON,
// AVX2 and AVX-512 code. Included by sources that are compiled once per instruction set, so everything lives in an
// unnamed namespace: a function merged by the linker across those objects could use instructions the machine lacks.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifndef __has_builtin
#define __has_builtin(name) 0
#endif

namespace {

constexpr int LANES = TADPERF_LANES;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NaN = std::numeric_limits<float>::quiet_NaN();

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef int64_t i64 __attribute__((vector_size(8 * LANES)));

inline f32 fill(float x) { return f32{} + x; }
inline i32 bits(f32 x) { i32 out; memcpy(&out, &x, sizeof out); return out; }
inline f32 floats(i32 x) { f32 out; memcpy(&out, &x, sizeof out); return out; }

// Where b is NaN the result is NaN. Spelled out on x86, where GCC 12 makes two instructions of the comparison.
#if TADPERF_LANES == 16 && defined(__AVX512F__)
inline f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
inline f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
#elif TADPERF_LANES == 8 && defined(__AVX__)
inline f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
inline f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
#elif TADPERF_LANES == 4 && defined(__SSE__)
inline f32 max(f32 a, f32 b) { return _mm_max_ps(a, b); }
inline f32 min(f32 a, f32 b) { return _mm_min_ps(a, b); }
#else
inline f32 max(f32 a, f32 b) { return a > b ? a : b; }
inline f32 min(f32 a, f32 b) { return a < b ? a : b; }
#endif

// exp(x) for x <= 0; exactly 1 at 0, exactly 0 below -87.7, NaN for NaN; within 2 ulp. x comes back clamped to a finite
// number, so that x * exp(x) is 0 for x = -inf. Cephes' polynomial; no branch, no table.
inline f32 exp_nonpositive(f32 &x) {
  x = max(fill(-88.0f), x);
  const float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23 leaves n + 127, the exponent bits of 2^n, in the low mantissa
  f32 z = x * 1.44269504f + shift;
  f32 n = z - shift;
  f32 power = floats(bits(z) << 23);
  f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  f32 r2 = r * r;
  f32 high = (r * 1.9875691500e-4f + 1.3981999507e-3f) * r2 + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  f32 p = high * r2 + (r * 1.6666665459e-1f + 5.0000001201e-1f);
  return (p * r2 + (r + 1.0f)) * power;
}

// log(x) for 1 <= x < inf; exactly 0 at 1; within 2 ulp. Cephes' polynomial.
inline f32 log_above_one(f32 x) {
  i32 exponent = (bits(x) >> 23) - 127;
  f32 m = floats((bits(x) & 0x7fffff) | 0x3f800000);
  i32 upper = m > 1.41421356f;
  m = upper ? m * 0.5f : m;
  f32 e = __builtin_convertvector(exponent - upper, f32);  // `upper` is -1 where true
  f32 r = m - 1.0f, r2 = r * r;
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

// Half types are only read: as what they are, into float32, exactly.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

inline f32 widen(f32 x, float) { return x; }
inline f32 widen(u16 x, bf16) { return floats(__builtin_convertvector(x, i32) << 16); }
inline f32 widen(u16 x, f16) {
#if TADPERF_LANES == 16 && defined(__AVX512F__)
  return _mm512_cvtph_ps(__m256i(x));
#elif TADPERF_LANES == 8 && defined(__F16C__)
  return _mm256_cvtph_ps(__m128i(x));
#else
  i32 h = __builtin_convertvector(x, i32), magnitude = (h & 0x7fff) << 13, rebias = i32{} + (112 << 23);
  i32 small = magnitude < (1 << 23), special = magnitude >= (31 << 23);
  i32 normal = magnitude + rebias + (special & rebias);  // infinities and NaNs have exponent 255
  i32 subnormal = bits(floats(magnitude + (113 << 23)) - floats(i32{} + (113 << 23)));  // exact, and no denormal
  return floats((small ? subnormal : normal) | (h & 0x8000) << 16);
#endif
}

// As stored: LANES elements, and four.
template <class T> struct Stored { using lanes = u16; typedef uint16_t quad __attribute__((vector_size(8))); };
template <> struct Stored<float> { using lanes = f32; typedef float quad __attribute__((vector_size(16))); };

// One column of LANES rows.
template <class T> inline f32 load_column(const T *const *rows, int64_t c) {
  T column[LANES];
  for (int i = 0; i < LANES; i++) column[i] = rows[i][c];
  typename Stored<T>::lanes x;
  memcpy(&x, column, sizeof x);
  return widen(x, T{});
}

// Four columns of LANES rows, starting at column c: out[j][i] = rows[i][c + j].
#if __has_builtin(__builtin_shufflevector)  // Clang, GCC 12
template <int... I> struct Indices {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { using type = Indices<I...>; };

template <class V, int... I> inline auto concat(V a, V b, Indices<I...>) { return __builtin_shufflevector(a, b, I...); }

template <int Q, class T> inline auto quads(const T *const *rows, int64_t c) {  // rows 0, 4, 8, ...: Q of them
  if constexpr (Q == 1) {
    typename Stored<T>::quad q;
    memcpy(&q, rows[0] + c, sizeof q);
    return q;
  } else {
    return concat(quads<Q / 2>(rows, c), quads<Q / 2>(rows + 2 * Q, c), typename Count<4 * Q>::type{});
  }
}

// Within each quad of lanes: single floats (step 1) or pairs (step 2) of a and b interleaved, from the lower or upper half.
template <int STEP, int HALF, int... I> inline f32 interleave(f32 a, f32 b, Indices<I...>) {
  return __builtin_shufflevector(
      a, b, ((I / STEP % 2 ? LANES : 0) + I / 4 * 4 + (STEP == 1 ? I % 4 / 2 : I % 2) + 2 * HALF)...);
}

template <class T> inline void load_columns(const T *const *rows, int64_t c, f32 out[4]) {
  typename Count<LANES>::type lanes;
  f32 v[4];
  for (int i = 0; i < 4; i++) v[i] = widen(quads<LANES / 4>(rows + i, c), T{});
  f32 a = interleave<1, 0>(v[0], v[1], lanes), b = interleave<1, 0>(v[2], v[3], lanes);
  out[0] = interleave<2, 0>(a, b, lanes), out[1] = interleave<2, 1>(a, b, lanes);
  a = interleave<1, 1>(v[0], v[1], lanes), b = interleave<1, 1>(v[2], v[3], lanes);
  out[2] = interleave<2, 0>(a, b, lanes), out[3] = interleave<2, 1>(a, b, lanes);
}
#else
template <class T> inline void load_columns(const T *const *rows, int64_t c, f32 out[4]) {
  for (int j = 0; j < 4; j++) out[j] = load_column(rows, c + j);
}
#endif

}  // namespace
