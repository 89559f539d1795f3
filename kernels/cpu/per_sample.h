// The arguments of one per-sample pass, shared by the module and the row loops of each instruction set.
#pragma once

#include <cstdint>

struct PerSample {
  const float *logits;  // [rows, classes], rows `stride` floats apart
  int64_t rows, classes, stride;
  const void *labels;  // [rows], `label_stride` elements apart; -1 is ignored
  bool labels_are_64bit;
  int64_t label_stride;
  float *loss, *confidence;  // every output is [rows], contiguous
  int64_t *prediction;
  float *margin, *entropy;
};

// Rows begin..end; returns the first row whose label is outside -1..classes-1, or -1.
using PerSampleRows = int64_t(const PerSample &, int64_t begin, int64_t end);

namespace baseline { PerSampleRows per_sample; }
namespace avx2 { PerSampleRows per_sample; }
namespace avx512 { PerSampleRows per_sample; }
