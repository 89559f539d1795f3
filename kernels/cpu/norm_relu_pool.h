// The arguments of one pass of norm_relu_pool, shared by the module and the loops of each instruction set.
#pragma once

#include "rows.h"

// A contiguous plane has at most this many pixels (32 kB of AVX2 vectors), or a width that is a multiple of 32.
constexpr int64_t MOST_PIXELS_TRANSPOSED = 1024;

struct NormReluPool {
  const void *x;  // [images, channels, height, width] or, with channels_last, [images, height, width, channels]
  Kind kind;      // of x, y and their gradients
  int64_t images, channels, height, width;
  bool channels_last;
  int window;  // side of the pooled window: 2, or 1 for none
  const float *weight, *bias;  // [channels]
  float eps;
  float *mean, *rstd;  // [images, channels]
  void *y;             // as x, each side divided by the window
  // backward alone
  const void *grad_y;
  void *grad_x;
  float *of_weight, *of_bias;  // [images, channels]: each plane's share of the two gradients
  bool stream;                 // whether what is written goes past the caches
};

// Forward, or with grad_y the gradient, of planes begin..end, or with channels_last images begin..end.
using NormReluPoolPart = void(const NormReluPool &, int64_t begin, int64_t end);

namespace baseline { NormReluPoolPart norm_relu_pool; }
namespace avx2 { NormReluPoolPart norm_relu_pool; }
namespace avx512 { NormReluPoolPart norm_relu_pool; }
