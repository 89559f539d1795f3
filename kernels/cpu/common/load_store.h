// Loads and stores of float32, bfloat16 and float16 elements; arithmetic is float32. Included, like simd.h, by sources
// that are compiled once per instruction set.
#pragma once

#include "common/simd.h"

namespace {

// Rounds to nearest, ties to even, as PyTorch does. Unsigned arithmetic: NaN and infinity may wrap around before they
// are replaced.
inline u32 to_bfloat16(f32 x) {
  u32 all = bit_cast<u32>(x);
  u32 rounded = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
  return i32(all & 0x7fffffff) > 0x7f800000 ? u32{} + 0x7fc0 : rounded;
}

inline u32 to_float16(f32 x) {
  u32 all = bit_cast<u32>(x);
  u32 magnitude = all & 0x7fffffff;
  u32 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  u32 subnormal = bit_cast<u32>(bit_cast<f32>(magnitude) + 0.5f) - 0x3f000000;  // the sum is a multiple of 2^-24
  u32 rounded = i32(magnitude) < 0x38800000 ? subnormal : normal;
  rounded = i32(magnitude) >= 0x477ff000 ? u32{} + 0x7c00 : rounded;  // 65520 and more
  rounded = i32(magnitude) > 0x7f800000 ? u32{} + 0x7e00 : rounded;
  return rounded | ((all >> 16) & 0x8000);
}

inline f32 narrow(f32 x, float) { return x; }
inline u16 narrow(f32 x, bfloat16) { return __builtin_convertvector(to_bfloat16(x), u16); }
inline u16 narrow(f32 x, float16) { return __builtin_convertvector(to_float16(x), u16); }

// Returns LANES elements as float32. If not WHOLE, only the first `count` are read and zeros follow.
template <bool WHOLE = true, class T>
inline f32 load(const T *from, int64_t count = LANES) {
  typename Stored<T>::lanes x{};
  memcpy(&x, from, WHOLE ? sizeof x : sizeof(T) * count);
  return widen(x, T{});
}

// Writes LANES elements; if not WHOLE, only the first `count`. With `stream`, float32 bypasses the caches; `to` must
// then be aligned to a vector.
template <bool WHOLE = true, class T>
inline void store(T *to, f32 values, bool stream = false, int64_t count = LANES) {
  auto x = narrow(values, T{});
#if TADPERF_LANES == 16 && defined(__AVX512F__)
  if (sizeof(T) == 4 && WHOLE && stream) return _mm512_stream_ps(reinterpret_cast<float *>(to), values);
#elif TADPERF_LANES == 8 && defined(__AVX__)
  if (sizeof(T) == 4 && WHOLE && stream) return _mm256_stream_ps(reinterpret_cast<float *>(to), values);
#elif TADPERF_LANES == 4 && defined(__SSE__)
  if (sizeof(T) == 4 && WHOLE && stream) return _mm_stream_ps(reinterpret_cast<float *>(to), values);
#endif
  memcpy(to, &x, WHOLE ? sizeof x : sizeof(T) * count);
}

// Prefetch distance in bytes. With it, reading three rows at once from memory is 1.3 times as fast.
constexpr int64_t AHEAD = 1024;

// Calls f(first, count) for pieces of up to LANES elements.
template <class F>
inline void each_vector_of(int64_t count, F f) {
  int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) f(i, int64_t(LANES));
  if (whole < count) f(whole, count - whole);
}

// Returns elements begin..begin + count of a row as float32: a pointer into a float32 row, else a copy in `buffer`.
inline const float *read_floats(const void *row, ElementType type, int64_t begin, int64_t count, float *buffer) {
  if (type == ElementType::float32) return static_cast<const float *>(row) + begin;
  const uint16_t *from = static_cast<const uint16_t *>(row) + begin;
  each_vector_of(count, [&](int64_t i, int64_t n) {
    u16 x{};
    __builtin_prefetch(from + i + AHEAD / 2);
    memcpy(&x, from + i, 2 * n);
    f32 values = type == ElementType::bfloat16 ? widen(x, bfloat16{}) : widen(x, float16{});
    memcpy(buffer + i, &values, 4 * n);
  });
  return buffer;
}

// Rounds `count` values to bfloat16 or float16 and writes them to a row from element `begin` on.
inline void write_halves(const float *values, int64_t count, void *row, ElementType type, int64_t begin) {
  uint16_t *to = static_cast<uint16_t *>(row) + begin;
  each_vector_of(count, [&](int64_t i, int64_t n) {
    f32 piece{};
    memcpy(&piece, values + i, 4 * n);
    u16 x = type == ElementType::bfloat16 ? narrow(piece, bfloat16{}) : narrow(piece, float16{});
    memcpy(to + i, &x, 2 * n);
  });
}

}  // namespace
