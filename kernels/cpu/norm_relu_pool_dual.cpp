// Instance norm, ReLU and average pool of channels_last images with their tangents, forward and backward.
//
// A vector holds LANES channels of one pixel. A group of vectors goes over all pixels of its image: its sums stay in
// registers, and its part of an image (256 kB at 32 x 32 pixels) stays in the cache from the first pass to the second.
// The names are those of kernels/ops/norm_relu_pool_dual.py. An image's result depends on that image only.
#include "norm_relu_pool_dual.h"

#include "common/load_store.h"
#include "common/vector_math.h"

namespace {

// Returns x and resets it to 0.
inline f32 take(f32 &x) {
  f32 value = x;
  x = f32{};
  return value;
}

// VECTORS vectors of channels, from channel `first` of image `image`. `count` lanes of the last vector are in use.
template <int VECTORS, bool WHOLE>
struct Group {
  const NormReluPoolDual &args;
  int64_t image, first, pixels;
  int64_t plane;  // offset of the group's moments
  int count;

  Group(const NormReluPoolDual &args, int64_t image, int64_t first, int count)
      : args(args),
        image(image),
        first(first),
        pixels(args.height * args.width),
        plane(image * args.channels + first),
        count(count) {}

  f32 get(const float *from, int v) const { return load<WHOLE>(from + v * LANES, count); }
  void put(float *to, int v, f32 x) const { store<WHOLE>(to + v * LANES, x, false, count); }
  template <class T>
  T *pixel(T *map, int64_t p) const {
    return map + (image * pixels + p) * args.channels + first;
  }
  template <class T>
  T *pooled(T *map, int64_t row, int64_t column) const {
    int64_t height = args.height / args.window, width = args.width / args.window;
    return map + ((image * height + row) * width + column) * args.channels + first;
  }

  // Calls f(pixel, v) for all pixels and vectors, and finish(v) after each row. Short sums of a row lose less.
  template <class F, class Finish>
  void each_row(F f, Finish finish) const {
    for (int64_t row = 0; row < args.height; row++) {
      for (int64_t p = row * args.width; p < (row + 1) * args.width; p++)
        for (int v = 0; v < VECTORS; v++) f(p, v);
      for (int v = 0; v < VECTORS; v++) finish(v);
    }
  }

  // Two passes, as in norm_relu_pool_channels.h: the second takes differences from the first means and corrects them.
  void moments() const {
    f32 mean[VECTORS]{}, mean_dot[VECTORS]{}, x_row[VECTORS]{}, x_dot_row[VECTORS]{};
    each_row(
        [&](int64_t p, int v) {
          x_row[v] += get(pixel(args.x, p), v);
          x_dot_row[v] += get(pixel(args.x_dot, p), v);
        },
        [&](int v) {
          mean[v] += take(x_row[v]);
          mean_dot[v] += take(x_dot_row[v]);
        });
    for (int v = 0; v < VECTORS; v++) {
      mean[v] /= float(pixels);
      mean_dot[v] /= float(pixels);
    }
    // Sums of d, d_dot, d^2 and d d_dot, where d and d_dot are the differences from the two means.
    f32 d_sum[VECTORS]{}, d_dot_sum[VECTORS]{}, square_sum[VECTORS]{}, product_sum[VECTORS]{};
    f32 d_row[VECTORS]{}, d_dot_row[VECTORS]{}, square_row[VECTORS]{}, product_row[VECTORS]{};
    each_row(
        [&](int64_t p, int v) {
          f32 d = get(pixel(args.x, p), v) - mean[v];
          f32 d_dot = get(pixel(args.x_dot, p), v) - mean_dot[v];
          d_row[v] += d;
          d_dot_row[v] += d_dot;
          square_row[v] += d * d;
          product_row[v] += d * d_dot;
        },
        [&](int v) {
          d_sum[v] += take(d_row[v]);
          d_dot_sum[v] += take(d_dot_row[v]);
          square_sum[v] += take(square_row[v]);
          product_sum[v] += take(product_row[v]);
        });
    for (int v = 0; v < VECTORS; v++) {
      f32 correction = d_sum[v] / float(pixels), correction_dot = d_dot_sum[v] / float(pixels);
      f32 variance = max(fill(0), square_sum[v] / float(pixels) - correction * correction);
      f32 rstd = inverse_root(variance + args.eps);
      put(args.mean + plane, v, mean[v] + correction);
      put(args.rstd + plane, v, rstd);
      put(args.mean_dot + plane, v, mean_dot[v] + correction_dot);
      put(args.slope + plane, v, rstd * (product_sum[v] / float(pixels) - correction * correction_dot));
    }
  }
};

// The constants of a vector of channels. A pixel becomes n = weight * u + bias, with the tangent n_dot.
struct Affine {
  f32 mean, rstd, mean_dot, slope, weight, bias, weight_dot, bias_dot;

  f32 u(f32 x) const { return (x - mean) * rstd; }
  f32 u_dot(f32 u, f32 x_dot) const { return rstd * (x_dot - mean_dot - u * slope); }
};

template <class G>
inline Affine affine(const G &group, int v) {
  const NormReluPoolDual &args = group.args;
  return {group.get(args.mean + group.plane, v),       group.get(args.rstd + group.plane, v),
          group.get(args.mean_dot + group.plane, v),   group.get(args.slope + group.plane, v),
          group.get(args.weight + group.first, v),     group.get(args.bias + group.first, v),
          group.get(args.weight_dot + group.first, v), group.get(args.bias_dot + group.first, v)};
}

// A normalised pixel and its tangent.
struct Normalised {
  f32 u, u_dot;
};

template <class G>
inline Normalised normalised(const G &group, const Affine &f, int64_t pixel, int v) {
  f32 u = f.u(group.get(group.pixel(group.args.x, pixel), v));
  return {u, f.u_dot(u, group.get(group.pixel(group.args.x_dot, pixel), v))};
}

template <int WINDOW, int VECTORS, bool WHOLE>
void forward(const Group<VECTORS, WHOLE> &group) {
  const NormReluPoolDual &args = group.args;
  group.moments();
  Affine f[VECTORS];
  for (int v = 0; v < VECTORS; v++) f[v] = affine(group, v);
  const float share = 1.0f / (WINDOW * WINDOW);
  for (int64_t i = 0; i < args.height / WINDOW; i++)
    for (int64_t j = 0; j < args.width / WINDOW; j++) {
      f32 sum[VECTORS]{}, sum_dot[VECTORS]{};
      for (int k = 0; k < WINDOW * WINDOW; k++) {
        int64_t p = (i * WINDOW + k / WINDOW) * args.width + j * WINDOW + k % WINDOW;
        for (int v = 0; v < VECTORS; v++) {
          const auto [u, u_dot] = normalised(group, f[v], p, v);
          f32 n = f[v].weight * u + f[v].bias;
          f32 n_dot = f[v].weight_dot * u + f[v].weight * u_dot + f[v].bias_dot;
          sum[v] += max(fill(0), n);
          sum_dot[v] += n <= 0 ? f32{} : n_dot;
        }
      }
      float *y = group.pooled(args.y, i, j), *y_dot = group.pooled(args.y_dot, i, j);
      for (int v = 0; v < VECTORS; v++) {
        group.put(y, v, sum[v] * share);
        group.put(y_dot, v, sum_dot[v] * share);
      }
    }
}

// Calls f(pixel, row, column) for all pixels, with the row and column of the pooled pixel; row is -1 for pixels that
// the pool drops.
template <int WINDOW, class F>
inline void each_pixel(const NormReluPoolDual &args, F f) {
  const int64_t height = args.height / WINDOW, width = args.width / WINDOW;
  for (int64_t i = 0; i < args.height; i++)
    for (int64_t j = 0; j < args.width; j++) {
      bool inside = i / WINDOW < height && j / WINDOW < width;
      f(i * args.width + j, inside ? i / WINDOW : -1, j / WINDOW);
    }
}

template <int WINDOW, int VECTORS, bool WHOLE>
void reverse(const Group<VECTORS, WHOLE> &group) {
  const NormReluPoolDual &args = group.args;
  Affine f[VECTORS];
  for (int v = 0; v < VECTORS; v++) f[v] = affine(group, v);
  const float part = 1.0f / (WINDOW * WINDOW), share = 1.0f / float(group.pixels);
  // Sums over the pixels of d, d u, d_dot, d_dot u and d u_dot.
  f32 d_sum[VECTORS]{}, du_sum[VECTORS]{}, d_dot_sum[VECTORS]{}, d_dot_u_sum[VECTORS]{}, du_dot_sum[VECTORS]{};
  each_pixel<WINDOW>(args, [&](int64_t p, int64_t i, int64_t j) {
    if (i < 0) return;
    const float *grad = group.pooled(args.grad, i, j), *grad_dot = group.pooled(args.grad_dot, i, j);
    for (int v = 0; v < VECTORS; v++) {
      const auto [u, u_dot] = normalised(group, f[v], p, v);
      i32 off = f[v].weight * u + f[v].bias <= 0;
      f32 d = off ? f32{} : group.get(grad, v) * part;
      f32 d_dot = off ? f32{} : group.get(grad_dot, v) * part;
      d_sum[v] += d;
      du_sum[v] += d * u;
      d_dot_sum[v] += d_dot;
      d_dot_u_sum[v] += d_dot * u;
      du_dot_sum[v] += d * u_dot;
    }
  });
  // Means of the gradient of u and of its product with u, and their tangents.
  f32 m0[VECTORS], m1[VECTORS], m0_dot[VECTORS], m1_dot[VECTORS];
  for (int v = 0; v < VECTORS; v++) {
    group.put(args.of_weight_dot + group.plane, v, d_dot_u_sum[v] + du_dot_sum[v]);
    group.put(args.of_bias_dot + group.plane, v, d_dot_sum[v]);
    m0[v] = f[v].weight * d_sum[v] * share;
    m1[v] = f[v].weight * du_sum[v] * share;
    m0_dot[v] = (f[v].weight_dot * d_sum[v] + f[v].weight * d_dot_sum[v]) * share;
    m1_dot[v] = (f[v].weight_dot * du_sum[v] + f[v].weight * (d_dot_u_sum[v] + du_dot_sum[v])) * share;
  }
  each_pixel<WINDOW>(args, [&](int64_t p, int64_t i, int64_t j) {
    for (int v = 0; v < VECTORS; v++) {
      const auto [u, u_dot] = normalised(group, f[v], p, v);
      f32 d{}, d_dot{};
      if (i >= 0) {
        i32 off = f[v].weight * u + f[v].bias <= 0;
        d = off ? f32{} : group.get(group.pooled(args.grad, i, j), v) * part;
        d_dot = off ? f32{} : group.get(group.pooled(args.grad_dot, i, j), v) * part;
      }
      f32 of_x = f[v].rstd * (f[v].weight * d - m0[v] - u * m1[v]);
      f32 inner = f[v].weight_dot * d + f[v].weight * d_dot - m0_dot[v] - u_dot * m1[v] - u * m1_dot[v];
      group.put(group.pixel(args.of_x, p), v, of_x);
      group.put(group.pixel(args.of_x_dot, p), v, f[v].rstd * (inner - f[v].slope * of_x));
    }
  });
}

template <int WINDOW, int VECTORS, bool WHOLE>
void channels(const NormReluPoolDual &args, int64_t image, int64_t first, int count) {
  Group<VECTORS, WHOLE> group(args, image, first, count);
  args.grad ? reverse<WINDOW>(group) : forward<WINDOW>(group);
}

template <int WINDOW>
void images(const NormReluPoolDual &args, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; image++) {
    int64_t c = 0;
    for (; c + 2 * LANES <= args.channels; c += 2 * LANES) channels<WINDOW, 2, true>(args, image, c, LANES);
    for (; c + LANES <= args.channels; c += LANES) channels<WINDOW, 1, true>(args, image, c, LANES);
    if (c < args.channels) channels<WINDOW, 1, false>(args, image, c, int(args.channels - c));
  }
}

}  // namespace

void TADPERF_ISA::norm_relu_pool_dual(const NormReluPoolDual &args, int64_t begin, int64_t end) {
  args.window == 2 ? images<2>(args, begin, end) : images<1>(args, begin, end);
}
