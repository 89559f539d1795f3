// The loops of a diverse pick, shared by the module and each instruction set.
#pragma once

#include "rows.h"

// Images of a class lie in a set: for each block of as many images as a vector has lanes, feature after feature, one
// image to a lane. A set has room for whole blocks of any instruction set.
constexpr int64_t SET_BLOCK = 16;

// Writes the row of `size` features, scaled to length 1; a row of zeros stays one. Returns false, with nothing of use
// in `unit`, where a feature is not finite.
using UnitRow = bool(const void *features, Kind kind, int64_t size, float *unit);

// Writes a unit row into a set, as image `place`.
using JoinSet = void(const float *unit, int64_t size, float *set, int64_t place);

// For each of `count` unit rows the largest cosine with any of the `held` images of a set, one or more.
using LargestCosines = void(const float *units, int64_t count, const float *set, int64_t held, int64_t size,
                            float *largest);

namespace baseline { UnitRow unit_row; JoinSet join_set; LargestCosines largest_cosines; }
namespace avx2 { UnitRow unit_row; JoinSet join_set; LargestCosines largest_cosines; }
namespace avx512 { UnitRow unit_row; JoinSet join_set; LargestCosines largest_cosines; }
