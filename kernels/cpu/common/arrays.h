// The tensors that Python passes to a binding: DLPack arrays in CPU memory. Every binding takes them with noconvert(),
// so that nanobind refuses a tensor of another type instead of working on a copy of it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <string>

// Any element type and any strides; read only.
template <int DIMS>
using Strided = nanobind::ndarray<nanobind::ro, nanobind::ndim<DIMS>, nanobind::device::cpu>;

// Elements of type T with any strides; `const T` for inputs.
template <class T, int DIMS>
using Typed = nanobind::ndarray<T, nanobind::ndim<DIMS>, nanobind::device::cpu>;

// Elements of type T in row-major order without gaps; `const T` for inputs.
template <class T, int DIMS>
using Dense = nanobind::ndarray<T, nanobind::ndim<DIMS>, nanobind::c_contig, nanobind::device::cpu>;

inline auto array(const char *name) { return nanobind::arg(name).noconvert(); }

template <class Array>
int64_t size_of(const Array &x, int axis) {
  return int64_t(x.shape(axis));
}

// The stride of an axis, in elements; 0 for an empty array, for which nanobind gives no strides.
template <class Array>
int64_t stride_of(const Array &x, int axis) {
  return x.size() ? x.stride(axis) : 0;
}

// Raises ValueError unless x has this shape.
template <class Array>
void check_shape(const char *name, const Array &x, std::initializer_list<int64_t> shape) {
  int axis = 0;
  for (int64_t size : shape)
    if (size_of(x, axis++) != size) throw nanobind::value_error((std::string(name) + ": wrong shape").c_str());
}

// Raises ValueError unless the elements have no gaps and the axes this order, from the outermost to the innermost.
template <class Array>
void check_order(const char *name, const Array &x, std::initializer_list<int> axes) {
  int64_t step = 1;
  for (auto axis = axes.end(); axis-- != axes.begin();) {
    if (x.size() && x.shape(*axis) != 1 && x.stride(*axis) != step)
      throw nanobind::value_error((std::string(name) + ": wrong memory format").c_str());
    step *= size_of(x, *axis);
  }
}

template <class Array>
void check_channels_last(const char *name, const Array &x) {
  check_order(name, x, {0, 2, 3, 1});
}

// Raises ValueError unless the elements of the last axis are adjacent.
template <class Array>
void check_adjacent(const char *name, const Array &x, int last) {
  if (x.size() && x.shape(last) > 1 && x.stride(last) != 1)
    throw nanobind::value_error((std::string(name) + ": the last axis must be contiguous").c_str());
}

// Returns whether the integers are int64, not int32. Raises ValueError for other types.
template <class Array>
bool is_int64(const char *name, const Array &x) {
  if (x.dtype() == nanobind::dtype<int64_t>()) return true;
  if (x.dtype() == nanobind::dtype<int32_t>()) return false;
  throw nanobind::value_error((std::string(name) + ": expected int32 or int64").c_str());
}
