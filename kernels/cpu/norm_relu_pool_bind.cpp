// tadperf.kernels._native.norm_relu_pool and its gradient. The planes are shared among threads without the GIL.
#include "norm_relu_pool.h"

#include <memory>

#include "common/arrays.h"
#include "common/dispatch.h"
#include "common/images.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

using Maps = Strided<4>;  // [images, channels, height, width], contiguous or channels_last
using MapsOut = nb::ndarray<nb::ndim<4>, nb::device::cpu>;
using Channels = Dense<const float, 1>;
using Moments = Dense<float, 3>;  // [2, images, channels]

// Bytes. A larger result leaves the caches before the next layer reads it.
constexpr int64_t LARGE = int64_t(1) << 24;

bool writes_past_caches(const NormReluPool &a, int64_t written, const void *to) {
  bool whole_lines = a.channels_last ? a.channels % 16 == 0 : true;
  return a.kind == ElementType::float32 && written * 4 >= LARGE && whole_lines &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

void run(const NormReluPool &a, int isa, int threads) {
  auto *part = pick<NormReluPoolPart>(isa, TADPERF_BY_ISA(norm_relu_pool));
  const int64_t units = a.channels_last ? a.images : a.images * a.channels;
  if (units == 0) return;
  const int64_t size = a.height * a.width * (a.channels_last ? a.channels : 1);
  int64_t block = std::max<int64_t>(1, 16384 / size);  // about 10 us
  if (!a.channels_last) block = (block + 15) / 16 * 16;
  parallel_for(units, block, threads, [&](int64_t begin, int64_t end) { part(a, begin, end); });
}

template <class Array>
void check_format(const char *name, const Array &x, bool channels_last) {
  if (channels_last)
    check_channels_last(name, x);
  else
    check_order(name, x, {0, 1, 2, 3});
}

NormReluPool arguments_for(const Maps &x, const Channels &weight, const Channels &bias, const Moments &moments,
                           bool channels_last, bool pool) {
  NormReluPool a{};
  a.x = x.data();
  a.kind = kind_of(x.dtype());
  a.images = size_of(x, 0);
  a.channels = size_of(x, 1);
  a.height = size_of(x, 2);
  a.width = size_of(x, 3);
  a.channels_last = channels_last;
  a.window = pool ? 2 : 1;
  if (a.channels < 1 || a.height < 1 || a.width < 1) throw nb::value_error("x: planes must have pixels");
  if (!channels_last && a.height * a.width > MOST_PIXELS_TRANSPOSED && a.width % 32)
    throw nb::value_error("x: a plane of this size and width must be channels_last");
  check_format("x", x, channels_last);
  check_shape("weight", weight, {a.channels});
  check_shape("bias", bias, {a.channels});
  check_shape("moments", moments, {2, a.images, a.channels});
  a.weight = weight.data();
  a.bias = bias.data();
  a.mean = moments.data();
  a.rstd = a.mean + a.images * a.channels;
  return a;
}

// The maps after pooling, of the type of x and in its memory format.
template <class Array>
void check_pooled(const char *name, const Array &y, const NormReluPool &a) {
  check_shape(name, y, {a.images, a.channels, a.height / a.window, a.width / a.window});
  check_format(name, y, a.channels_last);
  if (kind_of(y.dtype()) != a.kind) throw nb::value_error("y: expected the type of x");
}

void norm_relu_pool(Maps x, Channels weight, Channels bias, Moments moments, MapsOut y, float eps, bool channels_last,
                    bool pool, int isa, int threads) {
  NormReluPool a = arguments_for(x, weight, bias, moments, channels_last, pool);
  check_pooled("y", y, a);
  a.eps = eps;
  a.y = y.data();
  a.stream = writes_past_caches(a, int64_t(y.size()), a.y);
  nb::gil_scoped_release release;
  run(a, isa, threads);
}

void norm_relu_pool_gradient(Maps grad_y, Maps x, Channels weight, Channels bias, Moments moments, MapsOut grad_x,
                             Dense<float, 1> grad_weight, Dense<float, 1> grad_bias, bool channels_last, bool pool,
                             int isa, int threads) {
  NormReluPool a = arguments_for(x, weight, bias, moments, channels_last, pool);
  check_pooled("grad_y", grad_y, a);
  check_shape("grad_x", grad_x, {a.images, a.channels, a.height, a.width});
  check_format("grad_x", grad_x, channels_last);
  if (kind_of(grad_x.dtype()) != a.kind) throw nb::value_error("grad_x: expected the type of x");
  check_shape("grad_weight", grad_weight, {a.channels});
  check_shape("grad_bias", grad_bias, {a.channels});
  a.grad_y = grad_y.data();
  a.grad_x = grad_x.data();
  a.stream = writes_past_caches(a, int64_t(x.size()), a.grad_x);
  nb::gil_scoped_release release;
  std::unique_ptr<float[]> partial(new float[2 * a.images * a.channels]);
  a.of_weight = partial.get();
  a.of_bias = a.of_weight + a.images * a.channels;
  run(a, isa, threads);
  add_images(a.of_weight, a.images, a.channels, grad_weight.data());
  add_images(a.of_bias, a.images, a.channels, grad_bias.data());
}

}  // namespace

void bind_norm_relu_pool(nb::module_ &m) {
  // The contract of the contiguous loops, for the Python side: larger planes need a width that is a multiple of 32.
  m.attr("MAX_PIXELS_OF_ANY_WIDTH") = MOST_PIXELS_TRANSPOSED;
  m.attr("WIDTH_MULTIPLE") = 32;
  m.def("norm_relu_pool", &norm_relu_pool, array("x"), array("weight"), array("bias"), array("moments"), array("y"),
        "eps"_a, "channels_last"_a, "pool"_a, "isa"_a, "threads"_a, "Fills y, and moments [2, images, channels].");
  m.def("norm_relu_pool_gradient", &norm_relu_pool_gradient, array("grad_y"), array("x"), array("weight"),
        array("bias"), array("moments"), array("grad_x"), array("grad_weight"), array("grad_bias"), "channels_last"_a,
        "pool"_a, "isa"_a, "threads"_a, "Fills the gradients of x, weight and bias.");
}
