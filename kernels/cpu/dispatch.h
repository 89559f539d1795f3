// What every binding needs: nanobind, the instruction sets, and a table of one operator's row loops by instruction set.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "rows.h"

namespace nb = nanobind;

// Number of instruction sets that this machine runs: baseline, AVX2 and AVX-512, in this order.
int isa_count();

// The function of instruction set `isa` among `names`' three: pick(isa, TADPERF_BY_ISA(per_sample)).
#ifdef TADPERF_X86
#define TADPERF_BY_ISA(name) {baseline::name, avx2::name, avx512::name}
#else
#define TADPERF_BY_ISA(name) {baseline::name}
#endif
template <class F> F *pick(int isa, std::initializer_list<F *> loops) {
  if (isa < 0 || isa >= isa_count()) throw nb::value_error("no such instruction set");
  return loops.begin()[isa];
}

// What a tensor's elements are; refused unless they are among the three.
inline Kind kind_of(nb::dlpack::dtype type) {
  if (type == nb::dtype<float>()) return Kind::float32;
  if (type.bits == 16 && type.lanes == 1 && type.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return Kind::bfloat16;
  if (type.bits == 16 && type.lanes == 1 && type.code == uint8_t(nb::dlpack::dtype_code::Float)) return Kind::float16;
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
