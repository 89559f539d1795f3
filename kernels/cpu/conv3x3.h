// The arguments of one pass of conv3x3, shared by the binding and the loops of each instruction set.
#pragma once

#include <cstdint>

struct Conv3x3 {
  const float *x;  // [images, height, width, in]
  int64_t images, height, width, in, out;
  const float *u;     // [16, in, out], the transformed kernel
  float *y;           // [images, height, width, out]
  const float *grad;  // of y
  float *of_u;        // [parts, 16, in, out]: the gradient of u, one share per part
  int64_t parts;

  // Tiles of one image.
  [[gnu::always_inline]] int64_t tiles() const { return (height + 1) / 2 * ((width + 1) / 2); }
  // The number of images whose transformed tiles stay in the cache.
  [[gnu::always_inline]] int64_t block() const { return tiles() < 64 ? 64 / tiles() : 1; }
};

// Computes y of images begin..end.
using Conv3x3Forward = void(const Conv3x3 &, int64_t begin, int64_t end);
// Computes of_u of parts begin..end. A part is a fixed share of the images, so that sums do not depend on the threads.
using Conv3x3Kernel = void(const Conv3x3 &, int64_t begin, int64_t end);

namespace baseline {
Conv3x3Forward conv3x3;
Conv3x3Kernel conv3x3_kernel;
}  // namespace baseline
namespace avx2 {
Conv3x3Forward conv3x3;
Conv3x3Kernel conv3x3_kernel;
}  // namespace avx2
namespace avx512 {
Conv3x3Forward conv3x3;
Conv3x3Kernel conv3x3_kernel;
}  // namespace avx512
