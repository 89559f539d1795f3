// tadperf.kernels._native.conv3x3 and its kernel's gradient: images shared out over threads with the GIL released.
// Tensors come as addresses; types and shapes are checked by the caller in Python.
#include "conv3x3.h"

#include "common/dispatch.h"
#include "common/images.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

Conv3x3 described(uintptr_t x, int64_t images, int64_t height, int64_t width, int64_t in, int64_t out) {
  if (height < 1 || width < 1 || in < 1 || out < 1 || in % 16 || out % 16)
    throw nb::value_error("images must have pixels, and channels in sixteens");
  Conv3x3 a{};
  a.x = at<float>(x), a.images = images, a.height = height, a.width = width, a.in = in, a.out = out;
  return a;
}

void forward(uintptr_t x, int64_t images, int64_t height, int64_t width, int64_t in, int64_t out, uintptr_t u,
             uintptr_t y, int isa, int threads) {
  auto a = described(x, images, height, width, in, out);
  a.u = at<float>(u), a.y = at<float>(y);
  auto *part = pick<Conv3x3Forward>(isa, TADPERF_BY_ISA(conv3x3));
  nb::gil_scoped_release release;
  parallel_for(images, a.block(), threads, [&](int64_t begin, int64_t end) { part(a, begin, end); }, 1);
}

void kernel(uintptr_t x, int64_t images, int64_t height, int64_t width, int64_t in, int64_t out, uintptr_t grad,
            uintptr_t of_u, int64_t parts, int isa, int threads) {
  auto a = described(x, images, height, width, in, out);
  if (parts < 1 || parts > images) throw nb::value_error("parts must be from 1 to the number of images");
  a.grad = at<float>(grad), a.of_u = at<float>(of_u), a.parts = parts;
  auto *part = pick<Conv3x3Kernel>(isa, TADPERF_BY_ISA(conv3x3_kernel));
  nb::gil_scoped_release release;
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) { part(a, begin, end); }, 1);
}

}  // namespace

void bind_conv3x3(nb::module_ &m) {
  m.def("conv3x3", &forward, "x"_a, "images"_a, "height"_a, "width"_a, "in_"_a, "out"_a, "u"_a, "y"_a, "isa"_a,
        "threads"_a, "Fill y.");
  m.def("conv3x3_kernel", &kernel, "x"_a, "images"_a, "height"_a, "width"_a, "in_"_a, "out"_a, "grad"_a, "of_u"_a,
        "parts"_a, "isa"_a, "threads"_a, "Fill of_u [parts, 16, in, out], which sum to the gradient of u.");
}
