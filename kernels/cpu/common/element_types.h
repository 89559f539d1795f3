// The element types that the operators read and write, and the rows of a tensor.
#pragma once

#include <cstdint>

enum class ElementType : int { float32, bfloat16, float16 };

constexpr int64_t size_of(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

// Rows of a tensor. The elements of a row are adjacent.
struct Rows {
  void *data;
  int64_t stride;  // elements from row to row; 0 if one row serves all
  ElementType kind;

  [[gnu::always_inline]] void *row(int64_t i) const { return static_cast<char *>(data) + i * stride * size_of(kind); }
};
