// tadperf.kernels._native.norm_relu_pool_dual and its reverse: images shared out over threads with the GIL released.
// Tensors come as addresses; types and shapes are checked by the caller in Python.
#include "norm_relu_pool_dual.h"

#include <memory>

#include "common/dispatch.h"
#include "common/images.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

void run(const NormReluPoolDual &a, int isa, int threads) {
  auto *part = pick<NormReluPoolDualPart>(isa, TADPERF_BY_ISA(norm_relu_pool_dual));
  int64_t block = std::max<int64_t>(1, 8192 / (a.height * a.width * a.channels));  // some 10 us
  parallel_for(a.images, block, threads, [&](int64_t begin, int64_t end) { part(a, begin, end); });
}

NormReluPoolDual described(uintptr_t x, uintptr_t x_dot, int64_t images, int64_t channels, int64_t height,
                           int64_t width, bool pool, uintptr_t weight, uintptr_t bias, uintptr_t weight_dot,
                           uintptr_t bias_dot, uintptr_t moments) {
  if (channels < 1 || height < 1 || width < 1) throw nb::value_error("images must have pixels");
  NormReluPoolDual a{};
  a.x = at<float>(x), a.x_dot = at<float>(x_dot);
  a.images = images, a.channels = channels, a.height = height, a.width = width, a.window = pool ? 2 : 1;
  a.weight = at<float>(weight), a.bias = at<float>(bias);
  a.weight_dot = at<float>(weight_dot), a.bias_dot = at<float>(bias_dot);
  a.mean = at<float>(moments), a.rstd = a.mean + images * channels;
  a.mean_dot = a.rstd + images * channels, a.slope = a.mean_dot + images * channels;
  return a;
}

void dual(uintptr_t x, uintptr_t x_dot, int64_t images, int64_t channels, int64_t height, int64_t width, bool pool,
          uintptr_t weight, uintptr_t bias, uintptr_t weight_dot, uintptr_t bias_dot, uintptr_t moments, float eps,
          uintptr_t y, uintptr_t y_dot, int isa, int threads) {
  auto a = described(x, x_dot, images, channels, height, width, pool, weight, bias, weight_dot, bias_dot, moments);
  a.eps = eps, a.y = at<float>(y), a.y_dot = at<float>(y_dot);
  nb::gil_scoped_release release;
  run(a, isa, threads);
}

void reverse(uintptr_t x, uintptr_t x_dot, int64_t images, int64_t channels, int64_t height, int64_t width, bool pool,
             uintptr_t weight, uintptr_t bias, uintptr_t weight_dot, uintptr_t bias_dot, uintptr_t moments,
             uintptr_t grad, uintptr_t grad_dot, uintptr_t of_x, uintptr_t of_x_dot, uintptr_t of_weight_dot,
             uintptr_t of_bias_dot, int isa, int threads) {
  auto a = described(x, x_dot, images, channels, height, width, pool, weight, bias, weight_dot, bias_dot, moments);
  a.grad = at<float>(grad), a.grad_dot = at<float>(grad_dot);
  a.of_x = at<float>(of_x), a.of_x_dot = at<float>(of_x_dot);
  nb::gil_scoped_release release;
  std::unique_ptr<float[]> shares(new float[2 * images * channels]);
  a.of_weight_dot = shares.get(), a.of_bias_dot = a.of_weight_dot + images * channels;
  run(a, isa, threads);
  add_images(a.of_weight_dot, images, channels, at<float>(of_weight_dot));
  add_images(a.of_bias_dot, images, channels, at<float>(of_bias_dot));
}

}  // namespace

void bind_norm_relu_pool_dual(nb::module_ &m) {
  m.def("norm_relu_pool_dual", &dual, "x"_a, "x_dot"_a, "images"_a, "channels"_a, "height"_a, "width"_a, "pool"_a,
        "weight"_a, "bias"_a, "weight_dot"_a, "bias_dot"_a, "moments"_a, "eps"_a, "y"_a, "y_dot"_a, "isa"_a,
        "threads"_a, "Fill y, y_dot, and moments [4, images, channels].");
  m.def("norm_relu_pool_dual_gradient", &reverse, "x"_a, "x_dot"_a, "images"_a, "channels"_a, "height"_a, "width"_a,
        "pool"_a, "weight"_a, "bias"_a, "weight_dot"_a, "bias_dot"_a, "moments"_a, "grad"_a, "grad_dot"_a, "of_x"_a,
        "of_x_dot"_a, "of_weight_dot"_a, "of_bias_dot"_a, "isa"_a, "threads"_a, "Fill the last four outputs.");
}
