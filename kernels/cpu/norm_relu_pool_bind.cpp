// tadperf.kernels._native.norm_relu_pool and its gradient: planes shared out over threads with the GIL released. Tensors
// come as addresses, as in per_sample; types and shapes are checked by the caller in Python.
#include "norm_relu_pool.h"

#include <memory>

#include "common/dispatch.h"
#include "common/images.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

// What is larger than this does not stay in a cache until the next layer reads it.
constexpr int64_t LARGE = int64_t(1) << 24;

bool stream(const NormReluPool &a, int64_t written, const void *to) {
  bool whole_lines = a.channels_last ? a.channels % 16 == 0 : true;
  return a.kind == Kind::float32 && written * 4 >= LARGE && whole_lines && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

void run(const NormReluPool &a, int isa, int threads) {
  auto *part = pick<NormReluPoolPart>(isa, TADPERF_BY_ISA(norm_relu_pool));
  const int64_t units = a.channels_last ? a.images : a.images * a.channels;
  if (units == 0) return;
  const int64_t size = a.height * a.width * (a.channels_last ? a.channels : 1);
  int64_t block = std::max<int64_t>(1, 16384 / size);  // some 10 us
  if (!a.channels_last) block = (block + 15) / 16 * 16;
  parallel_for(units, block, threads, [&](int64_t begin, int64_t end) { part(a, begin, end); });
}

NormReluPool described(uintptr_t x, int kind, int64_t images, int64_t channels, int64_t height, int64_t width,
                       bool channels_last, bool pool, uintptr_t weight, uintptr_t bias, uintptr_t moments) {
  if (channels < 1 || height < 1 || width < 1) throw nb::value_error("planes must have pixels");
  if (!channels_last && height * width > MOST_PIXELS_TRANSPOSED && width % 32)
    throw nb::value_error("so large a plane of such a width must be channels_last");
  NormReluPool a{};
  a.x = at<void>(x), a.kind = Kind(kind);
  a.images = images, a.channels = channels, a.height = height, a.width = width;
  a.channels_last = channels_last, a.window = pool ? 2 : 1;
  a.weight = at<float>(weight), a.bias = at<float>(bias), a.mean = at<float>(moments);
  a.rstd = a.mean + images * channels;
  return a;
}

void norm_relu_pool(uintptr_t x, int kind, int64_t images, int64_t channels, int64_t height, int64_t width,
                    bool channels_last, bool pool, uintptr_t weight, uintptr_t bias, uintptr_t moments, float eps,
                    uintptr_t y, int isa, int threads) {
  auto a = described(x, kind, images, channels, height, width, channels_last, pool, weight, bias, moments);
  a.eps = eps, a.y = at<void>(y);
  a.stream = stream(a, images * channels * (height / a.window) * (width / a.window), a.y);
  nb::gil_scoped_release release;
  run(a, isa, threads);
}

void norm_relu_pool_gradient(uintptr_t x, int kind, int64_t images, int64_t channels, int64_t height, int64_t width,
                             bool channels_last, bool pool, uintptr_t weight, uintptr_t bias, uintptr_t moments,
                             uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, int isa,
                             int threads) {
  auto a = described(x, kind, images, channels, height, width, channels_last, pool, weight, bias, moments);
  a.grad_y = at<void>(grad_y), a.grad_x = at<void>(grad_x);
  a.stream = stream(a, images * channels * height * width, a.grad_x);
  nb::gil_scoped_release release;
  std::unique_ptr<float[]> shares(new float[2 * images * channels]);
  a.of_weight = shares.get(), a.of_bias = a.of_weight + images * channels;
  run(a, isa, threads);
  add_images(a.of_weight, images, channels, at<float>(grad_weight));
  add_images(a.of_bias, images, channels, at<float>(grad_bias));
}

}  // namespace

void bind_norm_relu_pool(nb::module_ &m) {
  m.def("norm_relu_pool", &norm_relu_pool, "x"_a, "kind"_a, "images"_a, "channels"_a, "height"_a, "width"_a,
        "channels_last"_a, "pool"_a, "weight"_a, "bias"_a, "moments"_a, "eps"_a, "y"_a, "isa"_a, "threads"_a,
        "Fill y, and moments [2, images, channels].");
  m.def("norm_relu_pool_gradient", &norm_relu_pool_gradient, "x"_a, "kind"_a, "images"_a, "channels"_a, "height"_a,
        "width"_a, "channels_last"_a, "pool"_a, "weight"_a, "bias"_a, "moments"_a, "grad_y"_a, "grad_x"_a,
        "grad_weight"_a, "grad_bias"_a, "isa"_a, "threads"_a, "Fill the gradients of x, weight and bias.");
}
