// tadperf.kernels._native.norm_relu_pool_dual and its gradient. The images are shared among threads without the GIL.
#include "norm_relu_pool_dual.h"

#include <memory>

#include "common/arrays.h"
#include "common/dispatch.h"
#include "common/images.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

using Maps = Typed<const float, 4>;  // [images, channels, height, width] in channels_last
using MapsOut = Typed<float, 4>;
using Channels = Dense<const float, 1>;
using Moments = Dense<float, 3>;  // [4, images, channels]

void run(const NormReluPoolDual &a, int isa, int threads) {
  auto *part = pick<NormReluPoolDualPart>(isa, TADPERF_BY_ISA(norm_relu_pool_dual));
  int64_t block = std::max<int64_t>(1, 8192 / (a.height * a.width * a.channels));  // about 10 us
  parallel_for(a.images, block, threads, [&](int64_t begin, int64_t end) { part(a, begin, end); });
}

template <class Array>
void check_maps(const char *name, const Array &x, const NormReluPoolDual &a, int window) {
  check_shape(name, x, {a.images, a.channels, a.height / window, a.width / window});
  check_channels_last(name, x);
}

NormReluPoolDual arguments_for(const Maps &x, const Maps &x_dot, const Channels &weight, const Channels &bias,
                               const Channels &weight_dot, const Channels &bias_dot, const Moments &moments,
                               bool pool) {
  NormReluPoolDual a{};
  a.x = x.data();
  a.x_dot = x_dot.data();
  a.images = size_of(x, 0);
  a.channels = size_of(x, 1);
  a.height = size_of(x, 2);
  a.width = size_of(x, 3);
  a.window = pool ? 2 : 1;
  if (a.channels < 1 || a.height < 1 || a.width < 1) throw nb::value_error("x: images must have pixels");
  check_maps("x", x, a, 1);
  check_maps("x_dot", x_dot, a, 1);
  for (const Channels *values : {&weight, &bias, &weight_dot, &bias_dot})
    check_shape("weight, bias and their tangents", *values, {a.channels});
  check_shape("moments", moments, {4, a.images, a.channels});
  a.weight = weight.data();
  a.bias = bias.data();
  a.weight_dot = weight_dot.data();
  a.bias_dot = bias_dot.data();
  a.mean = moments.data();
  a.rstd = a.mean + a.images * a.channels;
  a.mean_dot = a.rstd + a.images * a.channels;
  a.slope = a.mean_dot + a.images * a.channels;
  return a;
}

void forward(Maps x, Maps x_dot, Channels weight, Channels bias, Channels weight_dot, Channels bias_dot,
             Moments moments, MapsOut y, MapsOut y_dot, float eps, bool pool, int isa, int threads) {
  NormReluPoolDual a = arguments_for(x, x_dot, weight, bias, weight_dot, bias_dot, moments, pool);
  check_maps("y", y, a, a.window);
  check_maps("y_dot", y_dot, a, a.window);
  a.eps = eps;
  a.y = y.data();
  a.y_dot = y_dot.data();
  nb::gil_scoped_release release;
  run(a, isa, threads);
}

void gradient(Maps grad, Maps grad_dot, Maps x, Maps x_dot, Channels weight, Channels bias, Channels weight_dot,
              Channels bias_dot, Moments moments, MapsOut grad_x, MapsOut grad_x_dot, Dense<float, 1> grad_weight_dot,
              Dense<float, 1> grad_bias_dot, bool pool, int isa, int threads) {
  NormReluPoolDual a = arguments_for(x, x_dot, weight, bias, weight_dot, bias_dot, moments, pool);
  check_maps("grad", grad, a, a.window);
  check_maps("grad_dot", grad_dot, a, a.window);
  check_maps("grad_x", grad_x, a, 1);
  check_maps("grad_x_dot", grad_x_dot, a, 1);
  check_shape("grad_weight_dot", grad_weight_dot, {a.channels});
  check_shape("grad_bias_dot", grad_bias_dot, {a.channels});
  a.grad = grad.data();
  a.grad_dot = grad_dot.data();
  a.of_x = grad_x.data();
  a.of_x_dot = grad_x_dot.data();
  nb::gil_scoped_release release;
  std::unique_ptr<float[]> partial(new float[2 * a.images * a.channels]);
  a.of_weight_dot = partial.get();
  a.of_bias_dot = a.of_weight_dot + a.images * a.channels;
  run(a, isa, threads);
  add_images(a.of_weight_dot, a.images, a.channels, grad_weight_dot.data());
  add_images(a.of_bias_dot, a.images, a.channels, grad_bias_dot.data());
}

}  // namespace

void bind_norm_relu_pool_dual(nb::module_ &m) {
  m.def("norm_relu_pool_dual", &forward, array("x"), array("x_dot"), array("weight"), array("bias"),
        array("weight_dot"), array("bias_dot"), array("moments"), array("y"), array("y_dot"), "eps"_a, "pool"_a,
        "isa"_a, "threads"_a, "Fills y, y_dot, and moments [4, images, channels].");
  m.def("norm_relu_pool_dual_gradient", &gradient, array("grad"), array("grad_dot"), array("x"), array("x_dot"),
        array("weight"), array("bias"), array("weight_dot"), array("bias_dot"), array("moments"), array("grad_x"),
        array("grad_x_dot"), array("grad_weight_dot"), array("grad_bias_dot"), "pool"_a, "isa"_a, "threads"_a,
        "Fills the four gradients.");
}
