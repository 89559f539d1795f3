// The part of norm_relu_pool that all layouts share, and the planes with one channel per lane. Included, like simd.h,
// by a source that is compiled once per instruction set.
#pragma once

#include "norm_relu_pool.h"

#include "common/load_store.h"
#include "common/vector_math.h"

namespace {

// Constants of a plane, one channel per lane, or one channel for all lanes. scale = rstd * weight.
struct Affine {
  f32 mean, scale, bias;
};

// NaN stays NaN.
inline f32 relu(f32 x, const Affine &affine) { return max(fill(0), (x - affine.mean) * affine.scale + affine.bias); }

// Returns the upstream gradient g for pixels that were positive or NaN, else 0. d = x - mean.
inline f32 passed(f32 g, f32 d, const Affine &affine) { return d * affine.scale + affine.bias <= 0 ? f32{} : g; }

// The gradient of x is by_passed * passed - offset - d * slope.
struct Backward {
  f32 by_passed, offset, slope;
};

// sum and sum_d: the plane's sums of `passed` and of `passed * d`.
inline Backward backward(f32 sum, f32 sum_d, f32 rstd, const Affine &affine, float pixels) {
  return {affine.scale, affine.scale * sum / pixels, affine.scale * (rstd * rstd) * sum_d / pixels};
}

inline f32 gradient_of_pixel(f32 passed, f32 d, const Backward &back) {
  return back.by_passed * passed - back.offset - d * back.slope;
}

// Vectors of channels of an image, with `stride` elements from pixel to pixel.
template <class T>
struct Map {
  T *data;
  int64_t height, width, stride;
  T *at(int64_t row, int64_t column, int k) const { return data + (row * width + column) * stride + k * LANES; }
};

// The number of vectors of channels that are processed side by side. FEW: their sums stay in registers. Up to MANY: a
// large image is read in memory order (backward of 32 x 32 planes, 128 channels: 3.4 times as fast).
constexpr int FEW = LANES < 32 ? 32 / LANES : 1, MANY = 256 / LANES;

template <int K>
struct Vectors {
  int used;
  template <class F>
  void each(F f) const {
    for (int k = 0; k < (K <= FEW ? K : used); k++) f(k);
  }
};

// Adds f(row, column, k, sums of the row) of all pixels, row by row. Short sums lose less, and rows can overlap.
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

// Takes two passes. The mean of the differences from the first mean corrects that mean, so the variance of a constant
// plane is exactly 0.
template <bool WHOLE, int K, class T>
inline void moments(Vectors<K> vectors, const Map<const T> &x, float eps, int count, f32 mean[K], f32 rstd[K]) {
  f32 first[1][K]{}, second[2][K]{};
  const float pixels = float(x.height * x.width);
  add_rows(vectors, x.height, x.width, first,
           [&](int64_t i, int64_t j, int k, f32(&row)[1][K]) { row[0][k] += load<WHOLE>(x.at(i, j, k), count); });
  vectors.each([&](int k) { mean[k] = first[0][k] / pixels; });
  add_rows(vectors, x.height, x.width, second, [&](int64_t i, int64_t j, int k, f32(&row)[2][K]) {
    f32 d = load<WHOLE>(x.at(i, j, k), count) - mean[k];
    row[0][k] += d;
    row[1][k] += d * d;
  });
  vectors.each([&](int k) {
    f32 correction = second[0][k] / pixels;
    mean[k] += correction;
    rstd[k] = inverse_root(max(fill(0), second[1][k] / pixels - correction * correction) + eps);
  });
}

template <int WINDOW, bool WHOLE, int K, class T>
inline void pool(Vectors<K> vectors, const Map<const T> &x, const Map<T> &y, const Affine affine[K], bool stream,
                 int count) {
  for (int64_t i = 0; i < y.height; i++)
    for (int64_t j = 0; j < y.width; j++)
      vectors.each([&](int k) {
        f32 sum{};
        for (int w = 0; w < WINDOW * WINDOW; w++)
          sum += relu(load<WHOLE>(x.at(i * WINDOW + w / WINDOW, j * WINDOW + w % WINDOW, k), count), affine[k]);
        store<WHOLE>(y.at(i, j, k), sum * (1.0f / (WINDOW * WINDOW)), stream, count);
      });
}

// sums[0] and sums[1] of `passed` and `passed * d`.
template <int WINDOW, bool WHOLE, int K, class T>
inline void gradient_sums(Vectors<K> vectors, const Map<const T> &x, const Map<const T> &grad_y, const Affine affine[K],
                          int count, f32 (&sums)[2][K]) {
  add_rows(vectors, grad_y.height, grad_y.width, sums, [&](int64_t i, int64_t j, int k, f32(&row)[2][K]) {
    f32 g = load<WHOLE>(grad_y.at(i, j, k), count) * (1.0f / (WINDOW * WINDOW));
    f32 sum{}, sum_d{};
    for (int w = 0; w < WINDOW * WINDOW; w++) {
      f32 d = load<WHOLE>(x.at(i * WINDOW + w / WINDOW, j * WINDOW + w % WINDOW, k), count) - affine[k].mean;
      f32 p = passed(g, d, affine[k]);
      sum += p;
      sum_d += p * d;
    }
    row[0][k] += sum;
    row[1][k] += sum_d;
  });
}

// grad_x may be x.
template <int WINDOW, bool WHOLE, int K, class T>
inline void gradient_of_x(Vectors<K> vectors, const Map<const T> &x, const Map<const T> &grad_y, const Map<T> &grad_x,
                          const Affine affine[K], const Backward back[K], bool stream, int count) {
  auto pixel = [&](int64_t i, int64_t j, int k, f32 g) {
    f32 d = load<WHOLE>(x.at(i, j, k), count) - affine[k].mean;
    store<WHOLE>(grad_x.at(i, j, k), gradient_of_pixel(passed(g, d, affine[k]), d, back[k]), stream, count);
  };
  for (int64_t i = 0; i < grad_y.height; i++) {
    for (int64_t j = 0; j < grad_y.width; j++)
      vectors.each([&](int k) {
        f32 g = load<WHOLE>(grad_y.at(i, j, k), count) * (1.0f / (WINDOW * WINDOW));
        for (int w = 0; w < WINDOW * WINDOW; w++) pixel(i * WINDOW + w / WINDOW, j * WINDOW + w % WINDOW, k, g);
      });
    for (int64_t j = grad_y.width * WINDOW; j < x.width; j++)  // the pool drops these columns, and the rows below
      for (int w = 0; w < WINDOW; w++) vectors.each([&](int k) { pixel(i * WINDOW + w, j, k, f32{}); });
  }
  for (int64_t i = grad_y.height * WINDOW; i < x.height; i++)
    for (int64_t j = 0; j < x.width; j++) vectors.each([&](int k) { pixel(i, j, k, f32{}); });
}

// Channels first..first + used * LANES of one image; if not WHOLE, the `count` channels from `first` on.
template <int WINDOW, bool WHOLE, int K, class T>
inline void channels(const NormReluPool &args, int64_t image, int64_t first, int used = 1, int count = LANES) {
  const Vectors<K> vectors{used};
  const int64_t height = args.height / WINDOW, width = args.width / WINDOW;
  const int64_t plane = image * args.channels + first;
  const int64_t x_offset = image * args.channels * args.height * args.width + first;
  const int64_t y_offset = image * args.channels * height * width + first;
  Map<const T> x{static_cast<const T *>(args.x) + x_offset, args.height, args.width, args.channels};
  f32 mean[K], rstd[K], sums[2][K]{};
  Affine affine[K];
  if (!args.grad_y) moments<WHOLE>(vectors, x, args.eps, count, mean, rstd);
  vectors.each([&](int k) {
    const int64_t lanes = k * LANES;
    if (args.grad_y) mean[k] = load<WHOLE>(args.mean + plane + lanes, count);
    if (args.grad_y) rstd[k] = load<WHOLE>(args.rstd + plane + lanes, count);
    f32 weight = load<WHOLE>(args.weight + first + lanes, count);
    affine[k] = {mean[k], rstd[k] * weight, load<WHOLE>(args.bias + first + lanes, count)};
  });
  if (!args.grad_y) {
    vectors.each([&](int k) {
      store<WHOLE>(args.mean + plane + k * LANES, mean[k], false, count);
      store<WHOLE>(args.rstd + plane + k * LANES, rstd[k], false, count);
    });
    Map<T> y{static_cast<T *>(args.y) + y_offset, height, width, args.channels};
    return pool<WINDOW, WHOLE>(vectors, x, y, affine, args.stream, count);
  }
  Map<const T> grad_y{static_cast<const T *>(args.grad_y) + y_offset, height, width, args.channels};
  gradient_sums<WINDOW, WHOLE>(vectors, x, grad_y, affine, count, sums);
  Backward back[K];
  vectors.each([&](int k) {
    back[k] = backward(sums[0][k], sums[1][k], rstd[k], affine[k], float(args.height * args.width));
    store<WHOLE>(args.of_bias + plane + k * LANES, sums[0][k], false, count);
    store<WHOLE>(args.of_weight + plane + k * LANES, sums[1][k] * rstd[k], false, count);
  });
  Map<T> grad_x{static_cast<T *>(args.grad_x) + x_offset, args.height, args.width, args.channels};
  gradient_of_x<WINDOW, WHOLE>(vectors, x, grad_y, grad_x, affine, back, args.stream, count);
}

template <int WINDOW, class T>
inline void images(const NormReluPool &args, int64_t begin, int64_t end) {
  const bool small = args.channels < 2 * FEW * LANES || args.height * args.width <= 64;
  const int vectors = int(args.channels / LANES);
  for (int64_t image = begin; image < end; image++) {
    int k = 0;
    if (vectors == 0) channels<WINDOW, false, 1, T>(args, image, 0, 1, int(args.channels));
    for (; small && k + FEW <= vectors; k += FEW) channels<WINDOW, true, FEW, T>(args, image, k * LANES);
    for (; !small && k < vectors; k += MANY)
      channels<WINDOW, true, MANY, T>(args, image, k * LANES, vectors - k < MANY ? vectors - k : MANY);
    for (; k < vectors; k++) channels<WINDOW, true, 1, T>(args, image, k * LANES);
    if (vectors && args.channels % LANES)  // computes some channels a second time
      channels<WINDOW, true, 1, T>(args, image, args.channels - LANES);
  }
}

}  // namespace
