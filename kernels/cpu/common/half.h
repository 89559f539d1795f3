// The C++ types of half precision elements, and their conversion to float32.
#pragma once

#include <cstring>

#include "common/element_types.h"

// Half precision types hold bits only. The operators compute in float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Sources are compiled once per instruction set. An unnamed namespace keeps the linker from merging their functions: a
// merged function could use instructions that the machine lacks.
namespace {

// Calls f with a value of the C++ type of `type`: float, bfloat16 or float16.
template <class F>
inline auto with_element(ElementType type, F f) {
  if (type == ElementType::bfloat16) return f(bfloat16{});
  if (type == ElementType::float16) return f(float16{});
  return f(float{});
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The float32 value of IEEE binary16 bits, exactly. Int is int32_t or a vector of int32_t, Float is float or a vector
// of floats. No intermediate value is a denormal number, so the result does not depend on flush-to-zero. NaN keeps its
// payload.
template <class Float, class Int>
inline Float float16_to_float32(Int half) {
  const Int zero{};
  Int magnitude = (half & 0x7fff) << 13;
  Int rebias = zero + (112 << 23);
  Int normal = magnitude + rebias + (magnitude >= (31 << 23) ? rebias : zero);  // infinity and NaN have exponent 255
  Int subnormal = bit_cast<Int>(bit_cast<Float>(magnitude + (113 << 23)) - bit_cast<Float>(zero + (113 << 23)));
  return bit_cast<Float>((magnitude < (1 << 23) ? subnormal : normal) | (half & 0x8000) << 16);
}

// The float32 value of bfloat16 bits, exactly.
template <class Float, class Int>
inline Float bfloat16_to_float32(Int bits) {
  return bit_cast<Float>(bits << 16);
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return bfloat16_to_float32<float>(uint32_t(x.bits)); }
inline float widen(float16 x) { return float16_to_float32<float>(int32_t(x.bits)); }

}  // namespace
