// The arguments of one per-sample pass, shared by the binding and the loops of each instruction set.
#pragma once

#include "common/element_types.h"

struct Labels {
  const void *data;  // [rows], `stride` elements apart; -1 is ignored
  bool are_64bit;
  int64_t stride;
};

// The logits may come in several calls, columns first..first + columns of all classes per call. `state` then carries
// the running values of the rows from call to call.
struct PerSample {
  const void *logits;  // [rows, columns], rows `stride` elements apart
  ElementType kind;
  int64_t rows, columns, stride;
  int64_t first, classes;
  float *state;  // [6, rows]; null if one call brings all columns
  Labels labels;
  float *loss, *confidence;  // every output is [rows], contiguous, and is written with the last columns
  int64_t *prediction;
  float *margin, *entropy;
  float *top;  // the largest logit; may be null
};

// out = (exp(logits - top) * confidence - onehot(labels)) * scale, and 0 for ignored rows. `out` may be `logits`.
struct PerSampleGradient {
  const float *logits;  // [rows, columns], rows `stride` elements apart: columns first..first + columns
  float *out;           // the same columns, rows `columns` elements apart
  int64_t rows, columns, stride, first;
  Labels labels;
  const float *top, *confidence, *scale;  // [rows]
};

// Rows begin..end. Returns the first row whose label is outside -1..classes-1, or -1.
using PerSampleRows = int64_t(const PerSample &, int64_t begin, int64_t end);
using PerSampleGradientRows = void(const PerSampleGradient &, int64_t begin, int64_t end);

namespace baseline {
PerSampleRows per_sample;
PerSampleGradientRows per_sample_gradient;
}  // namespace baseline
namespace avx2 {
PerSampleRows per_sample;
PerSampleGradientRows per_sample_gradient;
}  // namespace avx2
namespace avx512 {
PerSampleRows per_sample;
PerSampleGradientRows per_sample_gradient;
}  // namespace avx512
