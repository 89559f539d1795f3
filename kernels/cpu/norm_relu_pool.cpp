// Instance norm, ReLU and average pool of whole planes, and their gradient. Every plane stays in the cache between
// passes.
//
// With d = x - mean and scale = rstd * weight, a pixel before the pool is max(0, d * scale + bias). Backward computes
// again which pixels were positive. Channels_last planes have one channel per lane. Small contiguous planes are
// transposed to this layout and back. Wide contiguous planes have adjacent pixels in the lanes. A plane's result
// depends on that plane only.
#include "norm_relu_pool_channels.h"

namespace {

// ---- small contiguous planes: LANES of them are transposed, then processed with one channel per lane

template <class T>
inline void store_columns(T *const *rows, int64_t first, const f32 in[4]) {
#if __has_builtin(__builtin_shufflevector)
  f32 by_row[4];
  transpose_quads(in, by_row);
  for (int i = 0; i < 4; i++) {
    T quads[LANES];
    store(quads, by_row[i]);
    for (int row = i; row < LANES; row += 4) memcpy(rows[row] + first, quads + row - i, 4 * sizeof(T));
  }
#else
  for (int j = 0; j < 4; j++) {
    T column[LANES];
    store(column, in[j]);
    for (int i = 0; i < LANES; i++) rows[i][first + j] = column[i];
  }
#endif
}

// Copies LANES rows of `size` pixels to a tile with one row per lane. The last four columns may overlap those before.
template <class T>
inline void transpose_in(const T *const *rows, int64_t size, f32 *tile) {
  for (int64_t column = 0; column + 4 <= size; column += 4) load_columns(rows, column, tile + column);
  if (size % 4 && size > 4) load_columns(rows, size - 4, tile + size - 4);
  for (int64_t column = 0; size < 4 && column < size; column++) tile[column] = load_column(rows, column);
}

// Copies a tile back to its rows.
template <class T>
inline void transpose_out(const f32 *tile, int64_t size, T *const *rows) {
  for (int64_t column = 0; column + 4 <= size; column += 4) store_columns(rows, column, tile + column);
  if (size % 4 && size > 4) store_columns(rows, size - 4, tile + size - 4);
  for (int64_t column = 0; size < 4 && column < size; column++) {
    T elements[LANES];
    store(elements, tile[column]);
    for (int i = 0; i < LANES; i++) rows[i][column] = elements[i];
  }
}

// The rows of `count` planes from `plane` on; the last plane is repeated up to LANES.
template <class T>
struct Planes {
  T *rows[LANES];
  Planes(T *data, int64_t plane, int count, int64_t pixels) {
    for (int i = 0; i < LANES; i++) rows[i] = data + (plane + (i < count ? i : count - 1)) * pixels;
  }
};

// Constants and results of LANES planes, one channel per lane.
struct PlaneRows {
  float weight[LANES], bias[LANES], mean[LANES], rstd[LANES], of_weight[LANES], of_bias[LANES];

  void read(const NormReluPool &args, int64_t plane, int count) {
    for (int i = 0; i < LANES; i++) {
      int64_t p = plane + (i < count ? i : count - 1);
      weight[i] = args.weight[p % args.channels];
      bias[i] = args.bias[p % args.channels];
      if (!args.grad_y) continue;
      mean[i] = args.mean[p];
      rstd[i] = args.rstd[p];
    }
  }

  void write(const NormReluPool &args, int64_t plane, int count) const {
    memcpy((args.grad_y ? args.of_weight : args.mean) + plane, args.grad_y ? of_weight : mean, sizeof(float) * count);
    memcpy((args.grad_y ? args.of_bias : args.rstd) + plane, args.grad_y ? of_bias : rstd, sizeof(float) * count);
  }
};

template <int WINDOW, class T>
inline void small_planes(const NormReluPool &args, int64_t begin, int64_t end) {
  const int64_t pixels = args.height * args.width, pooled = (args.height / WINDOW) * (args.width / WINDOW);
  f32 tile[MOST_PIXELS_TRANSPOSED], small[MOST_PIXELS_TRANSPOSED / (WINDOW * WINDOW)];
  PlaneRows rows;
  NormReluPool transposed = args;  // one image of LANES channels
  transposed.x = tile;
  transposed.grad_x = tile;
  transposed.y = small;
  transposed.grad_y = args.grad_y ? small : nullptr;
  transposed.channels = LANES;
  transposed.stream = false;
  transposed.weight = rows.weight;
  transposed.bias = rows.bias;
  transposed.mean = rows.mean;
  transposed.rstd = rows.rstd;
  transposed.of_weight = rows.of_weight;
  transposed.of_bias = rows.of_bias;
  for (int64_t plane = begin; plane < end; plane += LANES) {
    const int count = int(end - plane < LANES ? end - plane : LANES);
    rows.read(args, plane, count);
    transpose_in(Planes<const T>(static_cast<const T *>(args.x), plane, count, pixels).rows, pixels, tile);
    if (args.grad_y)
      transpose_in(Planes<const T>(static_cast<const T *>(args.grad_y), plane, count, pooled).rows, pooled, small);
    channels<WINDOW, true, 1, float>(transposed, 0, 0);
    if (args.grad_y)
      transpose_out(tile, pixels, Planes<T>(static_cast<T *>(args.grad_x), plane, count, pixels).rows);
    else
      transpose_out(small, pooled, Planes<T>(static_cast<T *>(args.y), plane, count, pooled).rows);
    rows.write(args, plane, count);
  }
}

// ---- contiguous planes whose width is a multiple of WINDOW * LANES

#if __has_builtin(__builtin_shufflevector)
template <int... I>
inline f32 add_pairs(f32 a, f32 b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}
// Returns the sums of adjacent lanes, those of a before those of b.
inline f32 add_pairs(f32 a, f32 b) { return add_pairs(a, b, typename Count<LANES>::type{}); }

template <int HALF, int... I>
inline f32 repeat_pairs(f32 x, Indices<I...>) {
  return __builtin_shufflevector(x, x, (HALF * LANES / 2 + I / 2)...);
}
// Repeats each lane of the lower (HALF 0) or upper (HALF 1) half of x.
template <int HALF>
inline f32 repeat_pairs(f32 x) {
  return repeat_pairs<HALF>(x, typename Count<LANES>::type{});
}
#else
inline f32 add_pairs(f32 a, f32 b) {
  f32 out;
  for (int i = 0; i < LANES / 2; i++) {
    out[i] = a[2 * i] + a[2 * i + 1];
    out[i + LANES / 2] = b[2 * i] + b[2 * i + 1];
  }
  return out;
}
template <int HALF>
inline f32 repeat_pairs(f32 x) {
  f32 out;
  for (int i = 0; i < LANES; i++) out[i] = x[HALF * LANES / 2 + i / 2];
  return out;
}
#endif

template <class T>
constexpr int64_t elements_ahead = AHEAD / int64_t{sizeof(T)};

// Like `moments`, but with adjacent pixels in the lanes.
template <class T>
inline void wide_moments(const T *x, int64_t height, int64_t width, float eps, float &mean, float &rstd) {
  const int64_t pixels = height * width;
  f32 sum{}, differences{}, squares{};
  for (int64_t i = 0; i < height; i++) {
    f32 row{};
    for (int64_t j = 0; j < width; j += LANES) {
      __builtin_prefetch(x + i * width + j + elements_ahead<T>);
      row += load(x + i * width + j);
    }
    sum += row;
  }
  mean = total(sum) / float(pixels);
  for (int64_t i = 0; i < height; i++) {
    f32 row_differences{}, row_squares{};
    for (int64_t j = 0; j < width; j += LANES) {
      f32 d = load(x + i * width + j) - mean;
      row_differences += d;
      row_squares += d * d;
    }
    differences += row_differences;
    squares += row_squares;
  }
  const float correction = total(differences) / float(pixels);
  const float variance = total(squares) / float(pixels) - correction * correction;
  mean += correction;
  rstd = 1.0f / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
}

template <int WINDOW, class T>
inline void wide_pool(const NormReluPool &args, const T *x, T *y, const Affine &affine) {
  auto pixels = [&](int64_t i, int64_t j) { return relu(load(x + i * args.width + j), affine); };
  for (int64_t i = 0; i < args.height / WINDOW; i++)
    for (int64_t j = 0; j < args.width / WINDOW; j += LANES) {
      f32 sum;
      if (WINDOW == 1)
        sum = pixels(i, j);
      else
        sum = add_pairs(pixels(2 * i, 2 * j) + pixels(2 * i + 1, 2 * j),
                        pixels(2 * i, 2 * j + LANES) + pixels(2 * i + 1, 2 * j + LANES));
      store(y + i * (args.width / WINDOW) + j, sum * (1.0f / (WINDOW * WINDOW)), args.stream);
    }
}

// Calls f(offset in the plane, upstream gradient) for vectors of pixels, without the pixels that the pool drops.
template <int WINDOW, class T, class F>
inline void each_wide(const NormReluPool &args, const T *grad_y, F f) {
  for (int64_t i = 0; i < args.height / WINDOW; i++)
    for (int64_t j = 0; j < args.width / WINDOW; j += LANES) {
      f32 g = load(grad_y + i * (args.width / WINDOW) + j) * (1.0f / (WINDOW * WINDOW));
      if (WINDOW == 1) {
        f(i * args.width + j, g);
        continue;
      }
      int64_t offset = 2 * (i * args.width + j);
      f32 left = repeat_pairs<0>(g), right = repeat_pairs<1>(g);
      f(offset, left);
      f(offset + LANES, right);
      f(offset + args.width, left);
      f(offset + args.width + LANES, right);
    }
}

template <int WINDOW, class T>
inline void wide_gradient(const NormReluPool &args, const T *x, const T *grad_y, T *grad_x, int64_t plane,
                          const Affine &affine) {
  f32 sums{}, sums_d{};
  each_wide<WINDOW>(args, grad_y, [&](int64_t offset, f32 g) {
    __builtin_prefetch(x + offset + elements_ahead<T>);
    f32 d = load(x + offset) - affine.mean;
    f32 p = passed(g, d, affine);
    sums += p;
    sums_d += p * d;
  });
  const float sum = total(sums), sum_d = total(sums_d), rstd = args.rstd[plane];
  const Backward back = backward(fill(sum), fill(sum_d), fill(rstd), affine, float(args.height * args.width));
  args.of_bias[plane] = sum;
  args.of_weight[plane] = sum_d * rstd;
  auto write = [&](int64_t offset, f32 g) {
    f32 d = load(x + offset) - affine.mean;
    store(grad_x + offset, gradient_of_pixel(passed(g, d, affine), d, back), args.stream);
  };
  each_wide<WINDOW>(args, grad_y, write);
  int64_t dropped = args.height / WINDOW * WINDOW * args.width;  // pixels from here on are not pooled
  for (int64_t offset = dropped; offset < args.height * args.width; offset += LANES) write(offset, f32{});
}

template <int WINDOW, class T>
inline void wide_planes(const NormReluPool &args, int64_t begin, int64_t end) {
  const int64_t pixels = args.height * args.width, pooled = (args.height / WINDOW) * (args.width / WINDOW);
  for (int64_t plane = begin; plane < end; plane++) {
    const T *x = static_cast<const T *>(args.x) + plane * pixels;
    if (!args.grad_y) wide_moments(x, args.height, args.width, args.eps, args.mean[plane], args.rstd[plane]);
    const float weight = args.weight[plane % args.channels], bias = args.bias[plane % args.channels];
    const Affine affine{fill(args.mean[plane]), fill(args.rstd[plane] * weight), fill(bias)};
    if (args.grad_y) {
      const T *grad_y = static_cast<const T *>(args.grad_y) + plane * pooled;
      wide_gradient<WINDOW>(args, x, grad_y, static_cast<T *>(args.grad_x) + plane * pixels, plane, affine);
    } else {
      wide_pool<WINDOW>(args, x, static_cast<T *>(args.y) + plane * pooled, affine);
    }
  }
}

template <int WINDOW>
inline void part(const NormReluPool &args, int64_t begin, int64_t end) {
  with_element(args.kind, [&](auto element) {
    using T = decltype(element);
    if (args.channels_last) return images<WINDOW, T>(args, begin, end);
    if (args.width % (WINDOW * LANES) == 0) return wide_planes<WINDOW, T>(args, begin, end);
    small_planes<WINDOW, T>(args, begin, end);
  });
}

}  // namespace

void TADPERF_ISA::norm_relu_pool(const NormReluPool &args, int64_t begin, int64_t end) {
  args.window == 2 ? part<2>(args, begin, end) : part<1>(args, begin, end);
#if defined(__SSE__)
  if (args.stream) _mm_sfence();
#endif
}
