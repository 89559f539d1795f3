// Shared by the bindings: nanobind, the choice of an instruction set, and the element type of a tensor.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "common/element_types.h"

namespace nb = nanobind;

// The number of instruction sets that this machine runs. Their order is baseline, AVX2, AVX-512.
int isa_count();

// Returns the function of instruction set `isa`: pick(isa, TADPERF_BY_ISA(per_sample)).
#ifdef TADPERF_X86
#define TADPERF_BY_ISA(name) {baseline::name, avx2::name, avx512::name}
#else
#define TADPERF_BY_ISA(name) {baseline::name}
#endif
template <class F>
F *pick(int isa, std::initializer_list<F *> functions) {
  if (isa < 0 || isa >= isa_count()) throw nb::value_error("isa: this machine does not run this instruction set");
  return functions.begin()[isa];
}

// Returns the element type. Raises ValueError unless it is float32, bfloat16 or float16.
inline ElementType kind_of(nb::dlpack::dtype type) {
  if (type == nb::dtype<float>()) return ElementType::float32;
  bool has_16_bits = type.bits == 16 && type.lanes == 1;
  if (has_16_bits && type.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return ElementType::bfloat16;
  if (has_16_bits && type.code == uint8_t(nb::dlpack::dtype_code::Float)) return ElementType::float16;
  throw nb::value_error("expected float32, bfloat16 or float16");
}

void bind_conv3x3(nb::module_ &);
void bind_diverse_pick(nb::module_ &);
void bind_mixture(nb::module_ &);
void bind_norm_relu_pool(nb::module_ &);
void bind_norm_relu_pool_dual(nb::module_ &);
void bind_per_sample(nb::module_ &);
void bind_reliability(nb::module_ &);
void bind_trajectory_distance(nb::module_ &);
