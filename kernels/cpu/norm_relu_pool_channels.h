// The part of norm_relu_pool that every path shares, and the planes that have one channel to a lane. Included, like simd.h,
// by a source that is compiled once per instruction set.
#pragma once

#include "norm_relu_pool.h"

#include "half.h"

namespace {

template <bool WHOLE = true, class T> inline f32 load(const T *from, int count = LANES) {
  typename Stored<T>::lanes x{};
  if (WHOLE) memcpy(&x, from, sizeof x);
  else memcpy(&x, from, sizeof(T) * count);
  return widen(x, T{});
}

inline f32 narrow(f32 v, float) { return v; }
inline u16 narrow(f32 v, bf16) { return __builtin_convertvector(to_bfloat16(v), u16); }
inline u16 narrow(f32 v, f16) { return __builtin_convertvector(to_float16(v), u16); }

template <bool WHOLE = true, class T> inline void store(T *to, f32 v, bool stream = false, int count = LANES) {
  auto x = narrow(v, T{});
#if TADPERF_LANES == 16 && defined(__AVX512F__)
  if (sizeof(T) == 4 && WHOLE && stream) return _mm512_stream_ps(reinterpret_cast<float *>(to), v);
#elif TADPERF_LANES == 8 && defined(__AVX__)
  if (sizeof(T) == 4 && WHOLE && stream) return _mm256_stream_ps(reinterpret_cast<float *>(to), v);
#elif TADPERF_LANES == 4 && defined(__SSE__)
  if (sizeof(T) == 4 && WHOLE && stream) return _mm_stream_ps(reinterpret_cast<float *>(to), v);
#endif
  if (WHOLE) memcpy(to, &x, sizeof x);
  else memcpy(to, &x, sizeof(T) * count);
}

inline f32 inverse_root(f32 v) {
#if TADPERF_LANES == 16 && defined(__AVX512F__)
  return 1.0f / f32(_mm512_sqrt_ps(v));
#elif TADPERF_LANES == 8 && defined(__AVX__)
  return 1.0f / f32(_mm256_sqrt_ps(v));
#elif TADPERF_LANES == 4 && defined(__SSE__)
  return 1.0f / f32(_mm_sqrt_ps(v));
#else
  f32 root;
  for (int i = 0; i < LANES; i++) root[i] = __builtin_sqrtf(v[i]);
  return 1.0f / root;
#endif
}

inline float total(f32 x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

// What is wanted of a plane, one channel to a lane or one for all lanes.
struct Affine {
  f32 mean, scale, bias;
};

inline f32 relu(f32 x, const Affine &a) { return max(fill(0), (x - a.mean) * a.scale + a.bias); }  // keeps a NaN

// The upstream gradient g of pixels whose deviation from the mean is d, where they were positive (or NaN).
inline f32 passed(f32 g, f32 d, const Affine &a) { return d * a.scale + a.bias <= 0 ? f32{} : g; }

// gradient of x = by_passed * passed - offset - d * slope, from the plane's sums of `passed` and of `passed * d`.
struct Backward {
  f32 by_passed, offset, slope;
};

inline Backward backward(f32 sum, f32 sum_d, f32 rstd, const Affine &a, float pixels) {
  return {a.scale, a.scale * sum / pixels, a.scale * (rstd * rstd) * sum_d / pixels};
}

inline f32 of_pixel(f32 passed, f32 d, const Backward &b) { return b.by_passed * passed - b.offset - d * b.slope; }

// Vectors of channels of an image; `stride` elements from pixel to pixel.
template <class T> struct Map {
  T *data;
  int64_t height, width, stride;
  T *at(int64_t row, int64_t column, int k) const { return data + (row * width + column) * stride + k * LANES; }
};

// The vectors of channels that go through side by side: FEW of them, whose sums stay in registers, or up to MANY, so that
// a large image is read in the order in which it lies (backward of 32 x 32 planes, 128 channels: 3.4 times as fast).
constexpr int FEW = LANES < 32 ? 32 / LANES : 1, MANY = 256 / LANES;

template <int K> struct Vectors {
  int used;
  template <class F> void each(F f) const {
    for (int k = 0; k < (K <= FEW ? K : used); k++) f(k);
  }
};

// Adds f(pixel, k, row of sums) of all pixels, row by row: short sums lose less, and rows run side by side.
template <int K, int OF, class F>
inline void add_rows(Vectors<K> vectors, int64_t height, int64_t width, f32 (&sums)[OF][K], F f) {
  for (int64_t i = 0; i < height; i++) {
    f32 row[OF][K]{};
    for (int64_t j = 0; j < width; j++) vectors.each([&](int k) { f(i, j, k, row); });
    vectors.each([&](int k) {
      for (int s = 0; s < OF; s++) sums[s][k] += row[s][k];
    });
  }
}

template <bool WHOLE, int K, class T>
inline void moments(Vectors<K> vectors, const Map<const T> &x, float eps, int count, f32 mean[K], f32 rstd[K]) {
  f32 first[1][K]{}, second[2][K]{};
  const float pixels = float(x.height * x.width);
  add_rows(vectors, x.height, x.width, first, [&](int64_t i, int64_t j, int k, f32(&row)[1][K]) {
    row[0][k] += load<WHOLE>(x.at(i, j, k), count);
  });
  vectors.each([&](int k) { mean[k] = first[0][k] / pixels; });
  add_rows(vectors, x.height, x.width, second, [&](int64_t i, int64_t j, int k, f32(&row)[2][K]) {
    f32 d = load<WHOLE>(x.at(i, j, k), count) - mean[k];
    row[0][k] += d, row[1][k] += d * d;
  });
  vectors.each([&](int k) {
    f32 left = second[0][k] / pixels;
    mean[k] += left;
    rstd[k] = inverse_root(max(fill(0), second[1][k] / pixels - left * left) + eps);
  });
}

template <int WINDOW, bool WHOLE, int K, class T>
inline void pool(Vectors<K> vectors, const Map<const T> &x, const Map<T> &y, const Affine a[K], bool stream,
                 int count) {
  for (int64_t i = 0; i < y.height; i++)
    for (int64_t j = 0; j < y.width; j++)
      vectors.each([&](int k) {
        f32 sum{};
        for (int w = 0; w < WINDOW * WINDOW; w++)
          sum += relu(load<WHOLE>(x.at(i * WINDOW + w / WINDOW, j * WINDOW + w % WINDOW, k), count), a[k]);
        store<WHOLE>(y.at(i, j, k), sum * (1.0f / (WINDOW * WINDOW)), stream, count);
      });
}

// sums[0] and sums[1] of `passed` and `passed * d`.
template <int WINDOW, bool WHOLE, int K, class T>
inline void gradient_sums(Vectors<K> vectors, const Map<const T> &x, const Map<const T> &grad_y, const Affine a[K],
                          int count, f32 (&sums)[2][K]) {
  add_rows(vectors, grad_y.height, grad_y.width, sums, [&](int64_t i, int64_t j, int k, f32(&row)[2][K]) {
    f32 g = load<WHOLE>(grad_y.at(i, j, k), count) * (1.0f / (WINDOW * WINDOW)), sum{}, sum_d{};
    for (int w = 0; w < WINDOW * WINDOW; w++) {
      f32 d = load<WHOLE>(x.at(i * WINDOW + w / WINDOW, j * WINDOW + w % WINDOW, k), count) - a[k].mean;
      f32 p = passed(g, d, a[k]);
      sum += p, sum_d += p * d;
    }
    row[0][k] += sum, row[1][k] += sum_d;
  });
}

// May write over x.
template <int WINDOW, bool WHOLE, int K, class T>
inline void gradient_of_x(Vectors<K> vectors, const Map<const T> &x, const Map<const T> &grad_y, const Map<T> &grad_x,
                          const Affine a[K], const Backward b[K], bool stream, int count) {
  auto pixel = [&](int64_t i, int64_t j, int k, f32 g) {
    f32 d = load<WHOLE>(x.at(i, j, k), count) - a[k].mean;
    store<WHOLE>(grad_x.at(i, j, k), of_pixel(passed(g, d, a[k]), d, b[k]), stream, count);
  };
  for (int64_t i = 0; i < grad_y.height; i++) {
    for (int64_t j = 0; j < grad_y.width; j++)
      vectors.each([&](int k) {
        f32 g = load<WHOLE>(grad_y.at(i, j, k), count) * (1.0f / (WINDOW * WINDOW));
        for (int w = 0; w < WINDOW * WINDOW; w++) pixel(i * WINDOW + w / WINDOW, j * WINDOW + w % WINDOW, k, g);
      });
    for (int64_t j = grad_y.width * WINDOW; j < x.width; j++)  // columns and rows that the pool drops
      for (int w = 0; w < WINDOW; w++) vectors.each([&](int k) { pixel(i * WINDOW + w, j, k, f32{}); });
  }
  for (int64_t i = grad_y.height * WINDOW; i < x.height; i++)
    for (int64_t j = 0; j < x.width; j++) vectors.each([&](int k) { pixel(i, j, k, f32{}); });
}

// Channels c..c + `used` * LANES of one image.
template <int WINDOW, bool WHOLE, int K, class T>
inline void channels(const NormReluPool &a, int64_t image, int64_t c, int used = 1, int count = LANES) {
  const Vectors<K> vectors{used};
  const int64_t height = a.height / WINDOW, width = a.width / WINDOW, of_channels = image * a.channels + c;
  const int64_t at_x = image * a.channels * a.height * a.width + c, at_y = image * a.channels * height * width + c;
  Map<const T> x{static_cast<const T *>(a.x) + at_x, a.height, a.width, a.channels};
  f32 mean[K], rstd[K], sums[2][K]{};
  Affine affine[K];
  if (!a.grad_y) moments<WHOLE>(vectors, x, a.eps, count, mean, rstd);
  vectors.each([&](int k) {
    const int64_t at = k * LANES;
    if (a.grad_y) mean[k] = load<WHOLE>(a.mean + of_channels + at, count);
    if (a.grad_y) rstd[k] = load<WHOLE>(a.rstd + of_channels + at, count);
    affine[k] = {mean[k], rstd[k] * load<WHOLE>(a.weight + c + at, count), load<WHOLE>(a.bias + c + at, count)};
  });
  if (!a.grad_y) {
    vectors.each([&](int k) {
      store<WHOLE>(a.mean + of_channels + k * LANES, mean[k], false, count);
      store<WHOLE>(a.rstd + of_channels + k * LANES, rstd[k], false, count);
    });
    Map<T> y{static_cast<T *>(a.y) + at_y, height, width, a.channels};
    return pool<WINDOW, WHOLE>(vectors, x, y, affine, a.stream, count);
  }
  Map<const T> grad_y{static_cast<const T *>(a.grad_y) + at_y, height, width, a.channels};
  gradient_sums<WINDOW, WHOLE>(vectors, x, grad_y, affine, count, sums);
  Backward back[K];
  vectors.each([&](int k) {
    back[k] = backward(sums[0][k], sums[1][k], rstd[k], affine[k], float(a.height * a.width));
    store<WHOLE>(a.of_bias + of_channels + k * LANES, sums[0][k], false, count);
    store<WHOLE>(a.of_weight + of_channels + k * LANES, sums[1][k] * rstd[k], false, count);
  });
  Map<T> grad_x{static_cast<T *>(a.grad_x) + at_x, a.height, a.width, a.channels};
  gradient_of_x<WINDOW, WHOLE>(vectors, x, grad_y, grad_x, affine, back, a.stream, count);
}

template <int WINDOW, class T> inline void images(const NormReluPool &a, int64_t begin, int64_t end) {
  const bool small = a.channels < 2 * FEW * LANES || a.height * a.width <= 64;
  const int vectors = int(a.channels / LANES);
  for (int64_t image = begin; image < end; image++) {
    int k = 0;
    if (vectors == 0) channels<WINDOW, false, 1, T>(a, image, 0, 1, int(a.channels));
    for (; small && k + FEW <= vectors; k += FEW) channels<WINDOW, true, FEW, T>(a, image, k * LANES);
    for (; !small && k < vectors; k += MANY)
      channels<WINDOW, true, MANY, T>(a, image, k * LANES, vectors - k < MANY ? vectors - k : MANY);
    for (; k < vectors; k++) channels<WINDOW, true, 1, T>(a, image, k * LANES);
    if (vectors && a.channels % LANES)  // some a second time
      channels<WINDOW, true, 1, T>(a, image, a.channels - LANES);
  }
}

}  // namespace
