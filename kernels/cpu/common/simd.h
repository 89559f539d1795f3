// Vectors of TADPERF_LANES floats, written with the vector extension of GCC and Clang. The same source gives SSE2,
// NEON, AVX2 and AVX-512 code. Sources that include this file are compiled once per instruction set (see half.h on the
// unnamed namespace).
#pragma once

#include <limits>

#include "common/half.h"

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
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef int64_t i64 __attribute__((vector_size(8 * LANES)));
typedef double f64 __attribute__((vector_size(8 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

inline f32 fill(float x) { return f32{} + x; }

// The result is NaN if b is NaN. Uses x86 intrinsics, because GCC 12 compiles the comparison to two instructions.
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

// LANES stored elements, converted to float32.
inline f32 widen(f32 x, float) { return x; }
inline f32 widen(u16 x, bfloat16) { return bfloat16_to_float32<f32>(__builtin_convertvector(x, i32)); }
inline f32 widen(u16 x, float16) {
#if TADPERF_LANES == 16 && defined(__AVX512F__)
  return _mm512_cvtph_ps(__m256i(x));
#elif TADPERF_LANES == 8 && defined(__F16C__)
  return _mm256_cvtph_ps(__m128i(x));
#else
  return float16_to_float32<f32>(__builtin_convertvector(x, i32));
#endif
}

// The vectors of LANES and of 4 stored elements of type T.
template <class T>
struct Stored {
  using lanes = u16;
  typedef uint16_t quad __attribute__((vector_size(8)));
};
template <>
struct Stored<float> {
  using lanes = f32;
  typedef float quad __attribute__((vector_size(16)));
};

// Element `column` of LANES rows.
template <class T>
inline f32 load_column(const T *const *rows, int64_t column) {
  T elements[LANES];
  for (int i = 0; i < LANES; i++) elements[i] = rows[i][column];
  typename Stored<T>::lanes x;
  memcpy(&x, elements, sizeof x);
  return widen(x, T{});
}

// Four columns of LANES rows, from column `first` on: out[j][i] = rows[i][first + j].
#if __has_builtin(__builtin_shufflevector)  // Clang, GCC 12
template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};

template <class V, int... I>
inline auto concat(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, I...);
}

// Loads four elements of each of QUADS rows: rows 0, 4, 8, ...
template <int QUADS, class T>
inline auto quads(const T *const *rows, int64_t first) {
  if constexpr (QUADS == 1) {
    typename Stored<T>::quad quad;
    memcpy(&quad, rows[0] + first, sizeof quad);
    return quad;
  } else {
    auto low = quads<QUADS / 2>(rows, first);
    auto high = quads<QUADS / 2>(rows + 2 * QUADS, first);
    return concat(low, high, typename Count<4 * QUADS>::type{});
  }
}

// Interleaves the lower (HALF 0) or upper (HALF 1) half of each quad of lanes of a and b: floats (STEP 1) or pairs
// (STEP 2).
template <int STEP, int HALF, int... I>
inline f32 interleave(f32 a, f32 b, Indices<I...>) {
  return __builtin_shufflevector(
      a, b, ((I / STEP % 2 ? LANES : 0) + I / 4 * 4 + (STEP == 1 ? I % 4 / 2 : I % 2) + 2 * HALF)...);
}

// Transposes the 4 x 4 blocks of four vectors: out[j][4 i + k] = in[k][4 i + j].
inline void transpose_quads(const f32 in[4], f32 out[4]) {
  typename Count<LANES>::type lanes;
  f32 low_01 = interleave<1, 0>(in[0], in[1], lanes);
  f32 low_23 = interleave<1, 0>(in[2], in[3], lanes);
  f32 high_01 = interleave<1, 1>(in[0], in[1], lanes);
  f32 high_23 = interleave<1, 1>(in[2], in[3], lanes);
  out[0] = interleave<2, 0>(low_01, low_23, lanes);
  out[1] = interleave<2, 1>(low_01, low_23, lanes);
  out[2] = interleave<2, 0>(high_01, high_23, lanes);
  out[3] = interleave<2, 1>(high_01, high_23, lanes);
}

template <class T>
inline void load_columns(const T *const *rows, int64_t first, f32 out[4]) {
  f32 by_row[4];
  for (int i = 0; i < 4; i++) by_row[i] = widen(quads<LANES / 4>(rows + i, first), T{});
  transpose_quads(by_row, out);
}
#else
template <class T>
inline void load_columns(const T *const *rows, int64_t first, f32 out[4]) {
  for (int j = 0; j < 4; j++) out[j] = load_column(rows, first + j);
}
#endif

}  // namespace
