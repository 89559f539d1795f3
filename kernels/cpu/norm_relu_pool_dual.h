// The arguments of one pass of norm_relu_pool_dual, shared by the binding and the loops of each instruction set.
#pragma once

#include <cstdint>

struct NormReluPoolDual {
  const float *x, *x_dot;  // [images, height, width, channels]
  int64_t images, channels, height, width;
  int window;                                          // side of the pooled window: 2, or 1 for no pool
  const float *weight, *bias, *weight_dot, *bias_dot;  // [channels]
  float eps;
  float *mean, *rstd, *mean_dot, *slope;  // [images, channels]; slope: the mean of normalised x times x_dot
  float *y, *y_dot;                       // layout of x; height and width divided by the window
  // The rest is for backward only.
  const float *grad, *grad_dot;        // the gradient of y, and its tangent
  float *of_x, *of_x_dot;              // the gradient of x, and its tangent
  float *of_weight_dot, *of_bias_dot;  // [images, channels]: each image's share of the two tangents
};

// Forward, or the gradient if `grad` is set, of images begin..end.
using NormReluPoolDualPart = void(const NormReluPoolDual &, int64_t begin, int64_t end);

namespace baseline {
NormReluPoolDualPart norm_relu_pool_dual;
}
namespace avx2 {
NormReluPoolDualPart norm_relu_pool_dual;
}
namespace avx512 {
NormReluPoolDualPart norm_relu_pool_dual;
}
