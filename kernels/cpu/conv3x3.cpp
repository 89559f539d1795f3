// 3 x 3 convolution of channels_last maps by Winograd's F(2 x 2, 3 x 3): 16 products instead of 36.
// kernels/ops/conv3x3.py has the formulas.
//
// A tile is 2 x 2 pixels of the result and the 4 x 4 pixels of the input that they depend on. A vector holds LANES
// channels of one pixel, so a transform is a sum of vectors. The transformed tiles of a few images are 16 matrices
// [tiles, channels], called planes. They stay in the cache until they have been multiplied. The stride between planes
// keeps them from sharing one cache set.
#include "conv3x3.h"

#include <algorithm>
#include <memory>

#include "common/load_store.h"

namespace {

// 16 matrices [rows, columns], aligned to cache lines.
struct Planes {
  std::unique_ptr<float[]> memory;
  float *first;
  int64_t stride;

  Planes(int64_t rows, int64_t columns) : stride(rows * columns + 16) {
    memory.reset(new float[16 * stride + 16]);
    first = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / 4 % 16;
  }
  float *operator[](int plane) const { return first + plane * stride; }
};

// Calls f(tile, image, row, column) for all tiles of images begin..end, with the row and column of the tile's first
// pixel.
template <class F>
inline void each_tile(const Conv3x3 &args, int64_t begin, int64_t end, F f) {
  int64_t tile = 0;
  for (int64_t image = begin; image < end; image++)
    for (int64_t row = 0; row < args.height; row += 2)
      for (int64_t column = 0; column < args.width; column += 2) f(tile++, image, row, column);
}

// Returns the pixel's channels, or null outside of the map.
inline const float *pixel(const Conv3x3 &args, const float *map, int64_t channels, int64_t image, int64_t row,
                          int64_t column) {
  bool inside = row >= 0 && row < args.height && column >= 0 && column < args.width;
  return inside ? map + ((image * args.height + row) * args.width + column) * channels : nullptr;
}

// v = B^T d B for the 4 x 4 input pixels d of every tile.
void transform_input(const Conv3x3 &args, int64_t begin, int64_t end, const Planes &v) {
  each_tile(args, begin, end, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    const float *from[16];
    for (int p = 0; p < 16; p++) from[p] = pixel(args, args.x, args.in, image, row - 1 + p / 4, column - 1 + p % 4);
    for (int64_t c = 0; c < args.in; c += LANES) {
      f32 d[16], s[16];  // s = B^T d
      for (int p = 0; p < 16; p++) d[p] = from[p] ? load(from[p] + c) : f32{};
      for (int p = 0; p < 4; p++) {
        s[p] = d[p] - d[8 + p];
        s[4 + p] = d[4 + p] + d[8 + p];
        s[8 + p] = d[8 + p] - d[4 + p];
        s[12 + p] = d[4 + p] - d[12 + p];
      }
      for (int p = 0; p < 16; p += 4) {
        float *to = v[p] + tile * args.in + c;
        store(to, s[p] - s[p + 2]);
        store(to + v.stride, s[p + 1] + s[p + 2]);
        store(to + 2 * v.stride, s[p + 2] - s[p + 1]);
        store(to + 3 * v.stride, s[p + 1] - s[p + 3]);
      }
    }
  });
}

// y = A^T m A, 2 x 2 pixels of every tile.
void transform_output(const Conv3x3 &args, int64_t begin, int64_t end, const Planes &m) {
  each_tile(args, begin, end, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    float *to[4];
    for (int p = 0; p < 4; p++)
      to[p] = const_cast<float *>(pixel(args, args.y, args.out, image, row + p / 2, column + p % 2));
    for (int64_t c = 0; c < args.out; c += LANES) {
      f32 d[16], s[8];  // s = A^T m
      for (int p = 0; p < 16; p++) d[p] = load(m[p] + tile * args.out + c);
      for (int p = 0; p < 4; p++) {
        s[p] = d[p] + d[4 + p] + d[8 + p];
        s[4 + p] = d[4 + p] - d[8 + p] - d[12 + p];
      }
      for (int p = 0; p < 4; p += 2) {
        const f32 *row_of_s = s + 2 * p;
        if (to[p]) store(to[p] + c, row_of_s[0] + row_of_s[1] + row_of_s[2]);
        if (to[p + 1]) store(to[p + 1] + c, row_of_s[1] - row_of_s[2] - row_of_s[3]);
      }
    }
  });
}

// A g A^T: the gradient of m, for every tile.
void transform_gradient(const Conv3x3 &args, int64_t begin, int64_t end, const Planes &m) {
  each_tile(args, begin, end, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    const float *from[4];
    for (int p = 0; p < 4; p++) from[p] = pixel(args, args.grad, args.out, image, row + p / 2, column + p % 2);
    for (int64_t c = 0; c < args.out; c += LANES) {
      f32 g[4], s[8];  // s = A g
      for (int p = 0; p < 4; p++) g[p] = from[p] ? load(from[p] + c) : f32{};
      for (int p = 0; p < 2; p++) {
        s[p] = g[p];
        s[2 + p] = g[p] + g[2 + p];
        s[4 + p] = g[p] - g[2 + p];
        s[6 + p] = -g[2 + p];
      }
      for (int p = 0; p < 4; p++) {
        float *to = m[4 * p] + tile * args.out + c;
        f32 left = s[2 * p], right = s[2 * p + 1];
        store(to, left);
        store(to + m.stride, left + right);
        store(to + 2 * m.stride, left - right);
        store(to + 3 * m.stride, -right);
      }
    }
  });
}

// A product of matrices: c[row, column] = (add ? c[row, column] : 0) + sum over k of a[row * by_row + k * by_k] b[k,
// column].
struct Product {
  const float *a;
  int64_t by_row, by_k;
  const float *b;
  float *c;
  int64_t depth, columns;
  bool add;

  // Computes ROWS rows by VECTORS vectors of columns. The sums stay in registers.
  template <int ROWS, int VECTORS>
  void part(int64_t row, int64_t column) const {
    f32 sum[ROWS][VECTORS];
    float *to = c + row * columns + column;
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) sum[r][v] = add ? load(to + r * columns + v * LANES) : f32{};
    const float *left = a + row * by_row, *right = b + column;
    for (int64_t k = 0; k < depth; k++) {
      f32 x[VECTORS];
      for (int v = 0; v < VECTORS; v++) x[v] = load(right + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        f32 factor = fill(left[r * by_row]);
        for (int v = 0; v < VECTORS; v++) sum[r][v] += factor * x[v];
      }
      left += by_k;
      right += columns;
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) store(to + r * columns + v * LANES, sum[r][v]);
  }

  template <int ROWS, int VECTORS>
  void strip(int64_t rows, int64_t column) const {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) part<ROWS, VECTORS>(row, column);
    for (; row + 4 <= rows; row += 4) part<4, VECTORS>(row, column);
    for (; row < rows; row++) part<1, VECTORS>(row, column);
  }

  // The sums fill 16 of 32 registers (AVX-512) or 12 of 16 (others). On AVX-512, 4 x 4 takes 5 % less time than 8 x 2;
  // 12 x 2 and 14 x 2 are not faster.
  void run(int64_t rows) const {
    int64_t column = 0;
    if constexpr (LANES == 16)
      for (; column + 4 * LANES <= columns; column += 4 * LANES) strip<4, 4>(rows, column);
    for (; column + 2 * LANES <= columns; column += 2 * LANES) strip<LANES == 16 ? 8 : 6, 2>(rows, column);
    for (; column < columns; column += LANES) strip<LANES == 16 ? 8 : 6, 1>(rows, column);
  }
};

}  // namespace

void TADPERF_ISA::conv3x3(const Conv3x3 &args, int64_t begin, int64_t end) {
  int64_t tiles = (end - begin) * args.tiles();
  Planes v(tiles, args.in), m(tiles, args.out);
  transform_input(args, begin, end, v);
  for (int p = 0; p < 16; p++) {
    const float *u = args.u + p * args.in * args.out;
    Product{v[p], args.in, 1, u, m[p], args.in, args.out, false}.run(tiles);
  }
  transform_output(args, begin, end, m);
}

void TADPERF_ISA::conv3x3_kernel(const Conv3x3 &args, int64_t begin, int64_t end) {
  int64_t block = 2 * args.block(), most_tiles = std::min(block, args.images) * args.tiles();
  Planes v(most_tiles, args.in), m(most_tiles, args.out);
  for (int64_t part = begin; part < end; part++) {
    int64_t first = args.images * part / args.parts, last = args.images * (part + 1) / args.parts;
    for (int64_t image = first; image < last; image += block) {
      int64_t stop = std::min(image + block, last), tiles = (stop - image) * args.tiles();
      transform_input(args, image, stop, v);
      transform_gradient(args, image, stop, m);
      for (int p = 0; p < 16; p++) {
        float *to = args.of_u + (part * 16 + p) * args.in * args.out;
        Product{v[p], 1, args.in, m[p], to, tiles, args.out, image > first}.run(args.in);
      }
    }
  }
}
