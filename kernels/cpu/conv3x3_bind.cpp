// tadperf.kernels._native.conv3x3 and the gradient of its kernel. The images are shared among threads without the GIL.
#include "conv3x3.h"

#include "common/arrays.h"
#include "common/dispatch.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

using Maps = Typed<const float, 4>;  // [images, channels, height, width] in channels_last
using MapsOut = Typed<float, 4>;

Conv3x3 arguments_for(const Maps &x, int64_t out_channels) {
  check_channels_last("x", x);
  Conv3x3 a{};
  a.x = x.data();
  a.images = size_of(x, 0);
  a.in = size_of(x, 1);
  a.height = size_of(x, 2);
  a.width = size_of(x, 3);
  a.out = out_channels;
  if (a.height < 1 || a.width < 1 || a.in < 1 || a.out < 1 || a.in % 16 || a.out % 16)
    throw nb::value_error("images must have pixels, and numbers of channels that are multiples of 16");
  return a;
}

void forward(Maps x, Dense<const float, 2> transformed_kernel, MapsOut y, int isa, int threads) {
  Conv3x3 a = arguments_for(x, size_of(y, 1));
  check_shape("transformed_kernel", transformed_kernel, {16, a.in * a.out});
  check_shape("y", y, {a.images, a.out, a.height, a.width});
  check_channels_last("y", y);
  a.u = transformed_kernel.data();
  a.y = y.data();
  auto *part = pick<Conv3x3Forward>(isa, TADPERF_BY_ISA(conv3x3));
  nb::gil_scoped_release release;
  parallel_for(a.images, a.block(), threads, [&](int64_t begin, int64_t end) { part(a, begin, end); }, 1);
}

void kernel_gradient(Maps grad, Maps x, Dense<float, 3> partial, int isa, int threads) {
  Conv3x3 a = arguments_for(x, size_of(grad, 1));
  check_shape("grad", grad, {a.images, a.out, a.height, a.width});
  check_channels_last("grad", grad);
  a.parts = size_of(partial, 0);
  if (a.parts < 1 || a.parts > a.images) throw nb::value_error("partial: expected 1 part to one part per image");
  check_shape("partial", partial, {a.parts, 16, a.in * a.out});
  a.grad = grad.data();
  a.of_u = partial.data();
  auto *part = pick<Conv3x3Kernel>(isa, TADPERF_BY_ISA(conv3x3_kernel));
  nb::gil_scoped_release release;
  parallel_for(a.parts, 1, threads, [&](int64_t begin, int64_t end) { part(a, begin, end); }, 1);
}

}  // namespace

void bind_conv3x3(nb::module_ &m) {
  m.def("conv3x3", &forward, array("x"), array("transformed_kernel"), array("y"), "isa"_a, "threads"_a, "Fills y.");
  m.def("conv3x3_kernel", &kernel_gradient, array("grad"), array("x"), array("partial"), "isa"_a, "threads"_a,
        "Fills partial [parts, 16, in * out]; the parts sum to the gradient of the transformed kernel.");
}
