// Rows of a tensor as it lies in memory, in any float type that the loops read.
#pragma once

#include <cstdint>

enum class Kind : int { float32, bfloat16, float16 };

constexpr int64_t size_of(Kind kind) { return kind == Kind::float32 ? 4 : 2; }

struct Rows {
  void *data;      // adjacent elements within a row
  int64_t stride;  // elements from row to row; 0 where one row serves all
  Kind kind;

  void *row(int64_t i) const { return static_cast<char *>(data) + i * stride * size_of(kind); }
};
