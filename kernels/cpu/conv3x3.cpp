// 3 x 3 convolution of channels_last maps by Winograd's F(2 x 2, 3 x 3): 16 products for 36 (kernels/conv3x3.py).
//
// A tile is 2 x 2 pixels of the result and the 4 x 4 of the input that they see. A vector holds LANES channels of one
// pixel, so a transform is sums of vectors. The tiles of a few images, transformed, are 16 matrices [tiles, channels]
// that stay in the cache until they have been multiplied; a plane's stride keeps the 16 out of one cache set.
#include "conv3x3.h"

#include <algorithm>
#include <memory>

#include "simd.h"

namespace {

inline f32 load(const float *from) { f32 x; memcpy(&x, from, sizeof x); return x; }
inline void store(float *to, f32 x) { memcpy(to, &x, sizeof x); }

// 16 matrices [rows, columns], aligned to the cache's lines.
struct Planes {
  std::unique_ptr<float[]> memory;
  float *first;
  int64_t stride;

  Planes(int64_t rows, int64_t columns) : stride(rows * columns + 16) {
    memory.reset(new float[16 * stride + 16]);
    first = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / 4 % 16;
  }
  float *operator[](int p) const { return first + p * stride; }
};

// f(tile, image, row, column) for all tiles of images begin..end; row and column of the tile's first pixel.
template <class F> inline void each_tile(const Conv3x3 &a, int64_t begin, int64_t end, F f) {
  int64_t t = 0;
  for (int64_t image = begin; image < end; image++)
    for (int64_t i = 0; i < a.height; i += 2)
      for (int64_t j = 0; j < a.width; j += 2) f(t++, image, i, j);
}

// A map's pixel, or null outside.
inline const float *pixel(const Conv3x3 &a, const float *map, int64_t channels, int64_t image, int64_t i, int64_t j) {
  bool inside = i >= 0 && i < a.height && j >= 0 && j < a.width;
  return inside ? map + ((image * a.height + i) * a.width + j) * channels : nullptr;
}

// B^T d B of every 4 x 4 tile.
void transform_input(const Conv3x3 &a, int64_t begin, int64_t end, const Planes &v) {
  each_tile(a, begin, end, [&](int64_t t, int64_t image, int64_t i, int64_t j) {
    const float *from[16];
    for (int p = 0; p < 16; p++) from[p] = pixel(a, a.x, a.in, image, i - 1 + p / 4, j - 1 + p % 4);
    for (int64_t c = 0; c < a.in; c += LANES) {
      f32 d[16], s[16];
      for (int p = 0; p < 16; p++) d[p] = from[p] ? load(from[p] + c) : f32{};
      for (int p = 0; p < 4; p++) {
        s[p] = d[p] - d[8 + p], s[4 + p] = d[4 + p] + d[8 + p];
        s[8 + p] = d[8 + p] - d[4 + p], s[12 + p] = d[4 + p] - d[12 + p];
      }
      for (int p = 0; p < 16; p += 4) {
        float *to = v[p] + t * a.in + c;
        store(to, s[p] - s[p + 2]), store(to + v.stride, s[p + 1] + s[p + 2]);
        store(to + 2 * v.stride, s[p + 2] - s[p + 1]), store(to + 3 * v.stride, s[p + 1] - s[p + 3]);
      }
    }
  });
}

// y = A^T m A, 2 x 2 pixels of every tile.
void transform_output(const Conv3x3 &a, int64_t begin, int64_t end, const Planes &m) {
  each_tile(a, begin, end, [&](int64_t t, int64_t image, int64_t i, int64_t j) {
    float *to[4];
    for (int p = 0; p < 4; p++) to[p] = const_cast<float *>(pixel(a, a.y, a.out, image, i + p / 2, j + p % 2));
    for (int64_t c = 0; c < a.out; c += LANES) {
      f32 d[16], s[8];
      for (int p = 0; p < 16; p++) d[p] = load(m[p] + t * a.out + c);
      for (int p = 0; p < 4; p++) s[p] = d[p] + d[4 + p] + d[8 + p], s[4 + p] = d[4 + p] - d[8 + p] - d[12 + p];
      for (int p = 0; p < 4; p += 2) {
        const f32 *row = s + 2 * p;
        if (to[p]) store(to[p] + c, row[0] + row[1] + row[2]);
        if (to[p + 1]) store(to[p + 1] + c, row[1] - row[2] - row[3]);
      }
    }
  });
}

// A g A^T: the gradient of m, of every tile.
void transform_gradient(const Conv3x3 &a, int64_t begin, int64_t end, const Planes &m) {
  each_tile(a, begin, end, [&](int64_t t, int64_t image, int64_t i, int64_t j) {
    const float *from[4];
    for (int p = 0; p < 4; p++) from[p] = pixel(a, a.grad, a.out, image, i + p / 2, j + p % 2);
    for (int64_t c = 0; c < a.out; c += LANES) {
      f32 g[4], s[8];
      for (int p = 0; p < 4; p++) g[p] = from[p] ? load(from[p] + c) : f32{};
      for (int p = 0; p < 2; p++) s[p] = g[p], s[2 + p] = g[p] + g[2 + p], s[4 + p] = g[p] - g[2 + p], s[6 + p] = -g[2 + p];
      for (int p = 0; p < 4; p++) {
        float *to = m[4 * p] + t * a.out + c;
        f32 left = s[2 * p], right = s[2 * p + 1];
        store(to, left), store(to + m.stride, left + right);
        store(to + 2 * m.stride, left - right), store(to + 3 * m.stride, -right);
      }
    }
  });
}

// A product of matrices: c[row, column] = (add ? itself : 0) + sum over k of a[row * by_row + k * by_k] b[k, column].
struct Product {
  const float *a;
  int64_t by_row, by_k;
  const float *b;
  float *c;
  int64_t depth, columns;
  bool add;

  // R rows by V vectors, held in registers.
  template <int R, int V> void part(int64_t row, int64_t column) const {
    f32 sum[R][V];
    float *to = c + row * columns + column;
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] = add ? load(to + r * columns + v * LANES) : f32{};
    const float *left = a + row * by_row, *right = b + column;
    for (int64_t k = 0; k < depth; k++, left += by_k, right += columns) {
      f32 x[V];
      for (int v = 0; v < V; v++) x[v] = load(right + v * LANES);
      for (int r = 0; r < R; r++) {
        f32 factor = fill(left[r * by_row]);
        for (int v = 0; v < V; v++) sum[r][v] += factor * x[v];
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(to + r * columns + v * LANES, sum[r][v]);
  }

  template <int R, int V> void strip(int64_t rows, int64_t column) const {
    int64_t row = 0;
    for (; row + R <= rows; row += R) part<R, V>(row, column);
    for (; row + 4 <= rows; row += 4) part<4, V>(row, column);
    for (; row < rows; row++) part<1, V>(row, column);
  }

  // Sums in 16 of AVX-512's 32 registers, or 12 of 16: 4 x 4 takes 5 % less than 8 x 2 there, 12 x 2 and 14 x 2 no less.
  void run(int64_t rows) const {
    int64_t column = 0;
    if constexpr (LANES == 16)
      for (; column + 4 * LANES <= columns; column += 4 * LANES) strip<4, 4>(rows, column);
    for (; column + 2 * LANES <= columns; column += 2 * LANES) strip<LANES == 16 ? 8 : 6, 2>(rows, column);
    for (; column < columns; column += LANES) strip<LANES == 16 ? 8 : 6, 1>(rows, column);
  }
};

}  // namespace

void TADPERF_ISA::conv3x3(const Conv3x3 &a, int64_t begin, int64_t end) {
  int64_t tiles = (end - begin) * a.tiles();
  Planes v(tiles, a.in), m(tiles, a.out);
  transform_input(a, begin, end, v);
  for (int p = 0; p < 16; p++) {
    Product{v[p], a.in, 1, a.u + p * a.in * a.out, m[p], a.in, a.out, false}.run(tiles);
  }
  transform_output(a, begin, end, m);
}

void TADPERF_ISA::conv3x3_kernel(const Conv3x3 &a, int64_t begin, int64_t end) {
  int64_t block = 2 * a.block(), most = std::min(block, a.images) * a.tiles();
  Planes v(most, a.in), m(most, a.out);
  for (int64_t part = begin; part < end; part++) {
    int64_t first = a.images * part / a.parts, last = a.images * (part + 1) / a.parts;
    for (int64_t image = first; image < last; image += block) {
      int64_t stop = std::min(image + block, last), tiles = (stop - image) * a.tiles();
      transform_input(a, image, stop, v);
      transform_gradient(a, image, stop, m);
      for (int p = 0; p < 16; p++) {
        float *to = a.of_u + (part * 16 + p) * a.in * a.out;
        Product{v[p], 1, a.in, m[p], to, tiles, a.out, image > first}.run(a.in);
      }
    }
  }
}
