// The arguments of one per-sample pass, shared by the module and the row loops of each instruction set.
#pragma once

#include "rows.h"

struct Labels {
  const void *data;  // [rows], `stride` elements apart; -1 is ignored
  bool are_64bit;
  int64_t stride;
};

// Logits may come some columns at a time, first..first + columns of all classes; `state` then carries the rows over.
struct PerSample {
  const void *logits;  // [rows, columns], rows `stride` elements apart
  Kind kind;
  int64_t rows, columns, stride;
  int64_t first, classes;
  float *state;  // [6, rows] or, where all columns come at once, null
  Labels labels;
  float *loss, *confidence;  // every output is [rows], contiguous; filled when the last columns have come
  int64_t *prediction;
  float *margin, *entropy;
  float *top;  // the largest logit; may be null
};

// out = (exp(logits - top) * confidence - onehot(labels)) * scale, and 0 for ignored rows; `out` may be `logits`.
struct PerSampleGradient {
  const float *logits;  // [rows, columns], rows `stride` elements apart: columns first..first + columns
  float *out;           // the same, rows `columns` apart
  int64_t rows, columns, stride, first;
  Labels labels;
  const float *top, *confidence, *scale;  // [rows]
};

// Rows begin..end; returns the first row whose label is outside -1..classes-1, or -1.
using PerSampleRows = int64_t(const PerSample &, int64_t begin, int64_t end);
using PerSampleGradientRows = void(const PerSampleGradient &, int64_t begin, int64_t end);

namespace baseline { PerSampleRows per_sample; PerSampleGradientRows per_sample_gradient; }
namespace avx2 { PerSampleRows per_sample; PerSampleGradientRows per_sample_gradient; }
namespace avx512 { PerSampleRows per_sample; PerSampleGradientRows per_sample_gradient; }
