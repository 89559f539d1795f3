// The arguments of one reliability pass, shared by the binding and the loops of each instruction set.
#pragma once

#include "common/element_types.h"

// The matrices that multiply samples are packed in tiles of this many rows. Tile t holds [columns, TILE_ROWS], column
// by column, so that a product reads it from end to end. 12 rows fill the registers: 12 of 16 (SSE2, AVX2) with one
// vector of samples, 24 of 32 (AVX-512, NEON) with two.
constexpr int64_t TILE_ROWS = 12;

struct Reliability {
  ElementType type;
  const void *features;  // [rows, width], strides in elements
  int64_t rows, width, row_stride, column_stride;
  const float *centre;    // [width], subtracted before whitening
  const float *factor;    // tiles of the lower triangle of the Cholesky factor L, with reciprocals on the diagonal
  int64_t classes;        // the three below are padded to whole tiles with NaN, which is never nearest
  const float *whitened;  // [classes, width]: L^-1 (anchor - centre)
  const float *whitened_tiles, *direction_tiles;              // tiles of `whitened`, and of the anchors at length 1
  const float *squares;                                       // |whitened|^2 [classes]
  int64_t *nearest, *second, *most_similar, *second_similar;  // every output is [rows], contiguous
  float *distance, *second_distance, *similarity, *second_similarity;
};

// The number of floats before tile t of a triangular matrix. Tile t has the columns 0..(t + 1) * TILE_ROWS - 1.
constexpr int64_t triangle_offset(int64_t t) { return TILE_ROWS * TILE_ROWS * (t * (t + 1) / 2); }

// The number of samples that are processed together.
using ReliabilityBlock = int64_t(int64_t width);
// L^-1 (feature - centre) of rows begin..end, into out [rows, width].
using ReliabilityWhiten = void(const Reliability &, int64_t begin, int64_t end, float *out);
// All outputs of rows begin..end.
using ReliabilityRows = void(const Reliability &, int64_t begin, int64_t end);

namespace baseline {
ReliabilityBlock reliability_block;
ReliabilityWhiten reliability_whiten;
ReliabilityRows reliability;
}  // namespace baseline
namespace avx2 {
ReliabilityBlock reliability_block;
ReliabilityWhiten reliability_whiten;
ReliabilityRows reliability;
}  // namespace avx2
namespace avx512 {
ReliabilityBlock reliability_block;
ReliabilityWhiten reliability_whiten;
ReliabilityRows reliability;
}  // namespace avx512
