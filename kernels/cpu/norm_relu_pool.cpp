// Instance norm, ReLU and average pool of whole planes, and their gradient; every plane stays in the cache between passes.
//
// With d = x - mean and scale = rstd * weight, a pixel before the pool is max(0, d * scale + bias); backward asks again
// which pixels were positive. The mean is corrected by the mean of what is left after it, so that a constant plane has
// variance 0 exactly. Channels_last planes lie one channel to a lane; so do small contiguous planes, transposed on the
// way in and out. Wide contiguous planes have adjacent pixels in the lanes. A plane's result depends on that plane alone.
#include "norm_relu_pool_channels.h"

namespace {

// ---- small contiguous planes: LANES of them transposed, then as above

template <class T> inline void store_columns(T *const *rows, int64_t c, const f32 in[4]) {
  float columns[4][LANES];
  memcpy(columns, in, sizeof columns);
#if __has_builtin(__builtin_shufflevector)
  typename Count<LANES>::type lanes;
  f32 a = interleave<1, 0>(in[0], in[1], lanes), b = interleave<1, 0>(in[2], in[3], lanes), out[4];
  out[0] = interleave<2, 0>(a, b, lanes), out[1] = interleave<2, 1>(a, b, lanes);
  a = interleave<1, 1>(in[0], in[1], lanes), b = interleave<1, 1>(in[2], in[3], lanes);
  out[2] = interleave<2, 0>(a, b, lanes), out[3] = interleave<2, 1>(a, b, lanes);
  for (int i = 0; i < 4; i++) {
    T quads[LANES];
    store(quads, out[i]);
    for (int row = i; row < LANES; row += 4) memcpy(rows[row] + c, quads + row - i, 4 * sizeof(T));
  }
#else
  for (int j = 0; j < 4; j++) {
    T column[LANES];
    store(column, in[j]);
    for (int i = 0; i < LANES; i++) rows[i][c + j] = column[i];
  }
#endif
}

// Rows of n pixels to and from a tile with one row to a lane. The last four overlap those before.
template <class T> inline void transpose_in(const T *const *rows, int64_t n, f32 *tile) {
  for (int64_t c = 0; c + 4 <= n; c += 4) load_columns(rows, c, tile + c);
  if (n % 4 && n > 4) load_columns(rows, n - 4, tile + n - 4);
  for (int64_t c = 0; n < 4 && c < n; c++) tile[c] = load_column(rows, c);
}

template <class T> inline void transpose_out(const f32 *tile, int64_t n, T *const *rows) {
  for (int64_t c = 0; c + 4 <= n; c += 4) store_columns(rows, c, tile + c);
  if (n % 4 && n > 4) store_columns(rows, n - 4, tile + n - 4);
  for (int64_t c = 0; n < 4 && c < n; c++) {
    T column[LANES];
    store(column, tile[c]);
    for (int i = 0; i < LANES; i++) rows[i][c] = column[i];
  }
}

template <class T> struct Planes {
  T *rows[LANES];  // beyond the last plane, that plane again
  Planes(T *data, int64_t plane, int count, int64_t pixels) {
    for (int i = 0; i < LANES; i++) rows[i] = data + (plane + (i < count ? i : count - 1)) * pixels;
  }
};

template <int WINDOW, class T> inline void small_planes(const NormReluPool &a, int64_t begin, int64_t end) {
  const int64_t pixels = a.height * a.width, pooled = (a.height / WINDOW) * (a.width / WINDOW);
  f32 tile[MOST_PIXELS_TRANSPOSED], small[MOST_PIXELS_TRANSPOSED / (WINDOW * WINDOW)];
  float weight[LANES], bias[LANES], mean[LANES], rstd[LANES], of_weight[LANES], of_bias[LANES];
  NormReluPool t = a;
  t.x = t.grad_x = tile, t.y = small, t.channels = LANES, t.stream = false;
  if (a.grad_y) t.grad_y = small;
  t.weight = weight, t.bias = bias, t.mean = mean, t.rstd = rstd, t.of_weight = of_weight, t.of_bias = of_bias;
  for (int64_t plane = begin; plane < end; plane += LANES) {
    const int count = int(end - plane < LANES ? end - plane : LANES);
    for (int i = 0; i < LANES; i++) {
      int64_t p = plane + (i < count ? i : count - 1), c = p % a.channels;
      weight[i] = a.weight[c], bias[i] = a.bias[c];
      if (a.grad_y) mean[i] = a.mean[p], rstd[i] = a.rstd[p];
    }
    transpose_in(Planes<const T>(static_cast<const T *>(a.x), plane, count, pixels).rows, pixels, tile);
    if (a.grad_y)
      transpose_in(Planes<const T>(static_cast<const T *>(a.grad_y), plane, count, pooled).rows, pooled, small);
    channels<WINDOW, true, 1, float>(t, 0, 0);
    if (a.grad_y) {
      transpose_out(tile, pixels, Planes<T>(static_cast<T *>(a.grad_x), plane, count, pixels).rows);
      memcpy(a.of_weight + plane, of_weight, sizeof(float) * count);
      memcpy(a.of_bias + plane, of_bias, sizeof(float) * count);
    } else {
      transpose_out(small, pooled, Planes<T>(static_cast<T *>(a.y), plane, count, pooled).rows);
      memcpy(a.mean + plane, mean, sizeof(float) * count);
      memcpy(a.rstd + plane, rstd, sizeof(float) * count);
    }
  }
}

// ---- contiguous planes whose width is a multiple of WINDOW * LANES

#if __has_builtin(__builtin_shufflevector)
template <int... I> inline f32 add_pairs(f32 a, f32 b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}
inline f32 add_pairs(f32 a, f32 b) { return add_pairs(a, b, typename Count<LANES>::type{}); }
template <int HALF, int... I> inline f32 twice(f32 g, Indices<I...>) {
  return __builtin_shufflevector(g, g, (HALF * LANES / 2 + I / 2)...);
}
template <int HALF> inline f32 twice(f32 g) { return twice<HALF>(g, typename Count<LANES>::type{}); }
#else
inline f32 add_pairs(f32 a, f32 b) {
  f32 out;
  for (int i = 0; i < LANES / 2; i++) out[i] = a[2 * i] + a[2 * i + 1], out[i + LANES / 2] = b[2 * i] + b[2 * i + 1];
  return out;
}
template <int HALF> inline f32 twice(f32 g) {
  f32 out;
  for (int i = 0; i < LANES; i++) out[i] = g[HALF * LANES / 2 + i / 2];
  return out;
}
#endif

template <class T> inline void wide_moments(const T *x, int64_t height, int64_t width, float eps, float &mean,
                                                float &rstd) {
  const int64_t pixels = height * width;
  f32 sum{}, left{}, squares{};
  for (int64_t i = 0; i < height; i++) {
    f32 row{};
    for (int64_t j = 0; j < width; j += LANES) {
      __builtin_prefetch(x + i * width + j + AHEAD / sizeof(T));
      row += load(x + i * width + j);
    }
    sum += row;
  }
  mean = total(sum) / float(pixels);
  for (int64_t i = 0; i < height; i++) {
    f32 row[2]{};
    for (int64_t j = 0; j < width; j += LANES) {
      f32 d = load(x + i * width + j) - mean;
      row[0] += d, row[1] += d * d;
    }
    left += row[0], squares += row[1];
  }
  const float rest = total(left) / float(pixels), variance = total(squares) / float(pixels) - rest * rest;
  mean += rest;
  rstd = 1.0f / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
}

template <int WINDOW, class T>
inline void wide_pool(const NormReluPool &a, const T *x, T *y, const Affine &affine) {
  auto at = [&](int64_t i, int64_t j) { return relu(load(x + i * a.width + j), affine); };
  for (int64_t i = 0; i < a.height / WINDOW; i++)
    for (int64_t j = 0; j < a.width / WINDOW; j += LANES) {
      f32 sum;
      if (WINDOW == 1) sum = at(i, j);
      else sum = add_pairs(at(2 * i, 2 * j) + at(2 * i + 1, 2 * j),
                           at(2 * i, 2 * j + LANES) + at(2 * i + 1, 2 * j + LANES));
      store(y + i * (a.width / WINDOW) + j, sum * (1.0f / (WINDOW * WINDOW)), a.stream);
    }
}

// f(place in the plane, upstream gradient) for vectors of pixels, those that the pool drops left out.
template <int WINDOW, class T, class F> inline void each_wide(const NormReluPool &a, const T *grad_y, F f) {
  for (int64_t i = 0; i < a.height / WINDOW; i++)
    for (int64_t j = 0; j < a.width / WINDOW; j += LANES) {
      f32 g = load(grad_y + i * (a.width / WINDOW) + j) * (1.0f / (WINDOW * WINDOW));
      if (WINDOW == 1) {
        f(i * a.width + j, g);
        continue;
      }
      int64_t at = 2 * (i * a.width + j);
      f32 left = twice<0>(g), right = twice<1>(g);
      f(at, left), f(at + LANES, right), f(at + a.width, left), f(at + a.width + LANES, right);
    }
}

template <int WINDOW, class T>
inline void wide_gradient(const NormReluPool &a, const T *x, const T *grad_y, T *grad_x, int64_t plane,
                          const Affine &affine) {
  f32 sums[2]{};
  each_wide<WINDOW>(a, grad_y, [&](int64_t at, f32 g) {
    __builtin_prefetch(x + at + AHEAD / sizeof(T));
    f32 d = load(x + at) - affine.mean, p = passed(g, d, affine);
    sums[0] += p, sums[1] += p * d;
  });
  const float sum = total(sums[0]), sum_d = total(sums[1]), rstd = a.rstd[plane];
  const Backward b = backward(fill(sum), fill(sum_d), fill(rstd), affine, float(a.height * a.width));
  a.of_bias[plane] = sum, a.of_weight[plane] = sum_d * rstd;
  auto write = [&](int64_t at, f32 g) {
    f32 d = load(x + at) - affine.mean;
    store(grad_x + at, of_pixel(passed(g, d, affine), d, b), a.stream);
  };
  each_wide<WINDOW>(a, grad_y, write);
  for (int64_t at = a.height / WINDOW * WINDOW * a.width; at < a.height * a.width; at += LANES) write(at, f32{});
}

template <int WINDOW, class T> inline void wide_planes(const NormReluPool &a, int64_t begin, int64_t end) {
  const int64_t pixels = a.height * a.width, pooled = (a.height / WINDOW) * (a.width / WINDOW);
  for (int64_t plane = begin; plane < end; plane++) {
    const T *x = static_cast<const T *>(a.x) + plane * pixels;
    if (!a.grad_y) wide_moments(x, a.height, a.width, a.eps, a.mean[plane], a.rstd[plane]);
    const float weight = a.weight[plane % a.channels], bias = a.bias[plane % a.channels];
    const Affine affine{fill(a.mean[plane]), fill(a.rstd[plane] * weight), fill(bias)};
    if (!a.grad_y) wide_pool<WINDOW>(a, x, static_cast<T *>(a.y) + plane * pooled, affine);
    else
      wide_gradient<WINDOW>(a, x, static_cast<const T *>(a.grad_y) + plane * pooled,
                            static_cast<T *>(a.grad_x) + plane * pixels, plane, affine);
  }
}

template <int WINDOW, class T> inline void part(const NormReluPool &a, int64_t begin, int64_t end) {
  if (a.channels_last) return images<WINDOW, T>(a, begin, end);
  if (a.width % (WINDOW * LANES) == 0) return wide_planes<WINDOW, T>(a, begin, end);
  small_planes<WINDOW, T>(a, begin, end);
}

template <int WINDOW> inline void part_of(const NormReluPool &a, int64_t begin, int64_t end) {
  if (a.kind == Kind::bfloat16) return part<WINDOW, bf16>(a, begin, end);
  if (a.kind == Kind::float16) return part<WINDOW, f16>(a, begin, end);
  part<WINDOW, float>(a, begin, end);
}

}  // namespace

void TADPERF_ISA::norm_relu_pool(const NormReluPool &a, int64_t begin, int64_t end) {
  a.window == 2 ? part_of<2>(a, begin, end) : part_of<1>(a, begin, end);
#if defined(__SSE__)
  if (a.stream) _mm_sfence();
#endif
}
