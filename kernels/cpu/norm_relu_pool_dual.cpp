// Instance norm, ReLU and average pool of channels_last images with their tangents, and the reverse of both.
//
// A vector holds LANES channels of one pixel; a group of vectors goes over all pixels of its image, so that its sums stay
// in registers and an image's part (256 kB at 32 x 32 pixels) in the cache from the first pass to the second. Moments are
// taken of differences from the first pixel: one pass, without the cancellation of plain squares. The names are those of
// kernels/norm_relu_pool_dual.py. An image's result depends on that image alone.
#include "norm_relu_pool_dual.h"

#include "simd.h"

namespace {

template <bool WHOLE> inline f32 load(const float *from, int count) {
  f32 x{};
  memcpy(&x, from, WHOLE ? sizeof x : 4 * count);
  return x;
}

template <bool WHOLE> inline void store(float *to, f32 x, int count) { memcpy(to, &x, WHOLE ? sizeof x : 4 * count); }

inline f32 inverse_root(f32 v) {
  f32 root;
  for (int i = 0; i < LANES; i++) root[i] = __builtin_sqrtf(v[i]);
  return 1.0f / root;
}

// V vectors of channels, from channel `first` of image `image`; `count` lanes of the last one are in use.
template <int V, bool WHOLE> struct Group {
  const NormReluPoolDual &a;
  int64_t image, first, pixels, at;  // at: place of the group's moments
  int count;

  Group(const NormReluPoolDual &a, int64_t image, int64_t first, int count)
      : a(a), image(image), first(first), pixels(a.height * a.width), at(image * a.channels + first), count(count) {}

  f32 get(const float *from, int v) const { return load<WHOLE>(from + v * LANES, count); }
  void put(float *to, int v, f32 x) const { store<WHOLE>(to + v * LANES, x, count); }
  template <class T> T *pixel(T *map, int64_t p) const { return map + (image * pixels + p) * a.channels + first; }
  template <class T> T *pooled(T *map, int64_t i, int64_t j) const {
    int64_t height = a.height / a.window, width = a.width / a.window;
    return map + ((image * height + i) * width + j) * a.channels + first;
  }

  void moments() const {
    f32 x0[V], d1[V]{}, d2[V]{}, t1[V]{}, t2[V]{};
    for (int v = 0; v < V; v++) x0[v] = get(pixel(a.x, 0), v);
    for (int64_t p = 0; p < pixels; p++) {
      const float *x = pixel(a.x, p), *x_dot = pixel(a.x_dot, p);
      for (int v = 0; v < V; v++) {
        f32 d = get(x, v) - x0[v], t = get(x_dot, v);
        d1[v] += d, d2[v] += d * d, t1[v] += t, t2[v] += d * t;
      }
    }
    const float share = 1.0f / float(pixels);
    for (int v = 0; v < V; v++) {
      f32 d = d1[v] * share, t = t1[v] * share, variance = max(fill(0), d2[v] * share - d * d);
      f32 rstd = inverse_root(variance + a.eps);
      put(a.mean + at, v, x0[v] + d), put(a.rstd + at, v, rstd), put(a.mean_dot + at, v, t);
      put(a.slope + at, v, rstd * (t2[v] * share - d * t));
    }
  }
};

// What a pixel's channels become: n = scale * d + bias and its tangent n_dot, with d = x - mean.
struct Affine {
  f32 mean, rstd, mean_dot, slope, weight, bias, weight_dot, bias_dot;

  f32 u(f32 x) const { return (x - mean) * rstd; }
  f32 u_dot(f32 u, f32 x_dot) const { return rstd * (x_dot - mean_dot - u * slope); }
};

template <class G> inline Affine affine(const G &g, int v) {
  const NormReluPoolDual &a = g.a;
  return {g.get(a.mean + g.at, v), g.get(a.rstd + g.at, v), g.get(a.mean_dot + g.at, v), g.get(a.slope + g.at, v),
          g.get(a.weight + g.first, v), g.get(a.bias + g.first, v), g.get(a.weight_dot + g.first, v),
          g.get(a.bias_dot + g.first, v)};
}

template <int WINDOW, int V, bool WHOLE> void forward(const Group<V, WHOLE> &g) {
  const NormReluPoolDual &a = g.a;
  g.moments();
  Affine f[V];
  for (int v = 0; v < V; v++) f[v] = affine(g, v);
  const float share = 1.0f / (WINDOW * WINDOW);
  for (int64_t i = 0; i < a.height / WINDOW; i++)
    for (int64_t j = 0; j < a.width / WINDOW; j++) {
      f32 sum[V]{}, sum_dot[V]{};
      for (int k = 0; k < WINDOW * WINDOW; k++) {
        int64_t p = (i * WINDOW + k / WINDOW) * a.width + j * WINDOW + k % WINDOW;
        const float *x = g.pixel(a.x, p), *x_dot = g.pixel(a.x_dot, p);
        for (int v = 0; v < V; v++) {
          f32 u = f[v].u(g.get(x, v)), u_dot = f[v].u_dot(u, g.get(x_dot, v));
          f32 n = f[v].weight * u + f[v].bias, n_dot = f[v].weight_dot * u + f[v].weight * u_dot + f[v].bias_dot;
          sum[v] += max(fill(0), n), sum_dot[v] += n <= 0 ? f32{} : n_dot;
        }
      }
      float *y = g.pooled(a.y, i, j), *y_dot = g.pooled(a.y_dot, i, j);
      for (int v = 0; v < V; v++) g.put(y, v, sum[v] * share), g.put(y_dot, v, sum_dot[v] * share);
    }
}

// f(pixel, row, column) for all pixels, row and column of the pooled one; -1 where the pool leaves it out.
template <int WINDOW, class F> inline void each_pixel(const NormReluPoolDual &a, F f) {
  const int64_t height = a.height / WINDOW, width = a.width / WINDOW;
  for (int64_t i = 0; i < a.height; i++)
    for (int64_t j = 0; j < a.width; j++) {
      bool inside = i / WINDOW < height && j / WINDOW < width;
      f(i * a.width + j, inside ? i / WINDOW : -1, j / WINDOW);
    }
}

template <int WINDOW, int V, bool WHOLE> void reverse(const Group<V, WHOLE> &g) {
  const NormReluPoolDual &a = g.a;
  Affine f[V];
  for (int v = 0; v < V; v++) f[v] = affine(g, v);
  const float part = 1.0f / (WINDOW * WINDOW), share = 1.0f / float(g.pixels);
  f32 s0[V]{}, s1[V]{}, t0[V]{}, t1[V]{}, t2[V]{};
  each_pixel<WINDOW>(a, [&](int64_t p, int64_t i, int64_t j) {
    if (i < 0) return;
    const float *x = g.pixel(a.x, p), *x_dot = g.pixel(a.x_dot, p);
    const float *grad = g.pooled(a.grad, i, j), *grad_dot = g.pooled(a.grad_dot, i, j);
    for (int v = 0; v < V; v++) {
      f32 u = f[v].u(g.get(x, v)), u_dot = f[v].u_dot(u, g.get(x_dot, v));
      i32 off = f[v].weight * u + f[v].bias <= 0;
      f32 d = off ? f32{} : g.get(grad, v) * part, d_dot = off ? f32{} : g.get(grad_dot, v) * part;
      s0[v] += d, s1[v] += d * u, t0[v] += d_dot, t1[v] += d_dot * u, t2[v] += d * u_dot;
    }
  });
  f32 m0[V], m1[V], m0_dot[V], m1_dot[V];  // means of the gradient by u, and by u times u, and their tangents
  for (int v = 0; v < V; v++) {
    g.put(a.of_weight_dot + g.at, v, t1[v] + t2[v]), g.put(a.of_bias_dot + g.at, v, t0[v]);
    m0[v] = f[v].weight * s0[v] * share, m1[v] = f[v].weight * s1[v] * share;
    m0_dot[v] = (f[v].weight_dot * s0[v] + f[v].weight * t0[v]) * share;
    m1_dot[v] = (f[v].weight_dot * s1[v] + f[v].weight * (t1[v] + t2[v])) * share;
  }
  each_pixel<WINDOW>(a, [&](int64_t p, int64_t i, int64_t j) {
    const float *x = g.pixel(a.x, p), *x_dot = g.pixel(a.x_dot, p);
    for (int v = 0; v < V; v++) {
      f32 u = f[v].u(g.get(x, v)), u_dot = f[v].u_dot(u, g.get(x_dot, v)), d{}, d_dot{};
      if (i >= 0) {
        i32 off = f[v].weight * u + f[v].bias <= 0;
        d = off ? f32{} : g.get(g.pooled(a.grad, i, j), v) * part;
        d_dot = off ? f32{} : g.get(g.pooled(a.grad_dot, i, j), v) * part;
      }
      f32 of_x = f[v].rstd * (f[v].weight * d - m0[v] - u * m1[v]);
      f32 inner = f[v].weight_dot * d + f[v].weight * d_dot - m0_dot[v] - u_dot * m1[v] - u * m1_dot[v];
      g.put(g.pixel(a.of_x, p), v, of_x);
      g.put(g.pixel(a.of_x_dot, p), v, f[v].rstd * (inner - f[v].slope * of_x));
    }
  });
}

template <int WINDOW, int V, bool WHOLE> void group(const NormReluPoolDual &a, int64_t image, int64_t c, int count) {
  Group<V, WHOLE> g(a, image, c, count);
  a.grad ? reverse<WINDOW>(g) : forward<WINDOW>(g);
}

template <int WINDOW> void images(const NormReluPoolDual &a, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; image++) {
    int64_t c = 0;
    for (; c + 2 * LANES <= a.channels; c += 2 * LANES) group<WINDOW, 2, true>(a, image, c, LANES);
    for (; c + LANES <= a.channels; c += LANES) group<WINDOW, 1, true>(a, image, c, LANES);
    if (c < a.channels) group<WINDOW, 1, false>(a, image, c, int(a.channels - c));
  }
}

}  // namespace

void TADPERF_ISA::norm_relu_pool_dual(const NormReluPoolDual &a, int64_t begin, int64_t end) {
  a.window == 2 ? images<2>(a, begin, end) : images<1>(a, begin, end);
}
