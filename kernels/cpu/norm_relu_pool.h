// The arguments of one pass of norm_relu_pool, shared by the binding and the loops of each instruction set.
#pragma once

#include "common/element_types.h"

// A contiguous plane has at most this many pixels (32 kB of AVX2 vectors), or a width that is a multiple of 32.
constexpr int64_t MOST_PIXELS_TRANSPOSED = 1024;

struct NormReluPool {
  const void *x;     // [images, channels, height, width]; with channels_last [images, height, width, channels]
  ElementType kind;  // of x, y and their gradients
  int64_t images, channels, height, width;
  bool channels_last;
  int window;                  // side of the pooled window: 2, or 1 for no pool
  const float *weight, *bias;  // [channels]
  float eps;
  float *mean, *rstd;  // [images, channels]
  void *y;             // layout of x; height and width divided by the window
  // The rest is for backward only.
  const void *grad_y;
  void *grad_x;
  float *of_weight, *of_bias;  // [images, channels]: the share of each plane in the two gradients
  bool stream;                 // whether results are written past the caches
};

// Forward, or the gradient if grad_y is set: of planes begin..end, or with channels_last of images begin..end.
using NormReluPoolPart = void(const NormReluPool &, int64_t begin, int64_t end);

namespace baseline {
NormReluPoolPart norm_relu_pool;
}
namespace avx2 {
NormReluPoolPart norm_relu_pool;
}
namespace avx512 {
NormReluPoolPart norm_relu_pool;
}
