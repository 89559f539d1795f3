// The loops of diverse_pick, shared by the binding and each instruction set.
#pragma once

#include "common/element_types.h"

// A set holds the unit rows of the images of a class in blocks of LANES images: feature after feature, one image per
// lane. It has room for a multiple of SET_BLOCK images, which is a multiple of every instruction set's lanes.
constexpr int64_t SET_BLOCK = 16;

// Writes the row of `size` features scaled to length 1; a row of zeros stays zero. Returns false if a feature is not
// finite; then `unit` is undefined.
using UnitRow = bool(const void *features, ElementType kind, int64_t size, float *unit);

// Writes a unit row into a set, as image `place`.
using JoinSet = void(const float *unit, int64_t size, float *set, int64_t place);

// For each of `count` unit rows, the largest cosine with any of the `held` images of a set; held >= 1.
using LargestCosines = void(const float *units, int64_t count, const float *set, int64_t held, int64_t size,
                            float *largest);

namespace baseline {
UnitRow unit_row;
JoinSet join_set;
LargestCosines largest_cosines;
}  // namespace baseline
namespace avx2 {
UnitRow unit_row;
JoinSet join_set;
LargestCosines largest_cosines;
}  // namespace avx2
namespace avx512 {
UnitRow unit_row;
JoinSet join_set;
LargestCosines largest_cosines;
}  // namespace avx512
