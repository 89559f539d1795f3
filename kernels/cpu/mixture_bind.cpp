// tadperf.kernels._native.mixture: checks shapes, sorts the samples by group, fits the groups on threads, GIL released.
#include <cstring>
#include <memory>

#include "common/dispatch.h"
#include "mixture_fit.h"

using namespace nb::literals;

namespace {

using Vector = nb::ndarray<nb::ro, nb::ndim<1>, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pairs = nb::ndarray<double, nb::shape<-1, 2>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr double LOG_TWO_PI = 1.8378770664093454836;
constexpr int64_t LARGE = 1 << 17;  // samples; below, a pass is over before more threads have started

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat x) { return from_bits(uint32_t(x.bits) << 16); }
inline float widen(Half x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  if (magnitude >= 0x7c00u << 13) return from_bits(sign | magnitude | 0x7f800000);
  float y = from_bits(magnitude) * 0x1p112f;
  return sign ? -y : y;
}

template <class T> struct Strided {
  const T *data;
  int64_t stride;
  T operator[](int64_t i) const { return data[i * stride]; }
};

struct Sorted {
  std::unique_ptr<double[]> losses;   // those that take part, group after group
  std::unique_ptr<int64_t[]> sample;  // where each came from
  std::vector<int64_t> begin;         // of each group, and the end
  int64_t wrong = -1;                 // the first sample whose group is out of range
};

// A stable counting sort; writes the posteriors of samples that take no part.
template <class T, class G>
Sorted sort(Strided<T> losses, Strided<G> groups, int64_t n, int64_t num_groups, int threads, float *posterior) {
  Sorted out;
  int64_t block = std::max<int64_t>(16384, num_groups), blocks = (n + block - 1) / block;
  std::vector<int64_t> next(blocks * num_groups), wrong(blocks, -1);
  parallel_for(n, block, threads, [&](int64_t begin, int64_t end) {
    int64_t *count = next.data() + begin / block * num_groups;
    for (int64_t i = begin; i < end; i++) {
      int64_t g = groups[i];
      if (g >= 0 && g < num_groups) count[g] += std::isfinite(widen(losses[i]));
      else if (g != -1 && wrong[begin / block] < 0) wrong[begin / block] = i;
    }
  }, 2);
  for (int64_t found : wrong)
    if (found >= 0 && out.wrong < 0) out.wrong = found;
  if (out.wrong >= 0) return out;
  int64_t used = 0;
  for (int64_t g = 0; g < num_groups; g++) {
    out.begin.push_back(used);
    for (int64_t b = 0; b < blocks; b++) {
      int64_t count = next[b * num_groups + g];
      next[b * num_groups + g] = used;
      used += count;
    }
  }
  out.begin.push_back(used);
  out.losses.reset(new double[used]);
  out.sample.reset(new int64_t[used]);
  parallel_for(n, block, threads, [&](int64_t begin, int64_t end) {
    int64_t *at = next.data() + begin / block * num_groups;
    for (int64_t i = begin; i < end; i++) {
      int64_t g = groups[i];
      float x = widen(losses[i]);
      if (g >= 0 && std::isfinite(x)) {
        out.losses[at[g]] = x;
        out.sample[at[g]++] = i;
      } else {
        posterior[i] = g < 0 || std::isnan(x) ? NAN : x < 0 ? 1.0f : 0.0f;
      }
    }
  }, 2);
  return out;
}

template <class T, class G>
Sorted sort_as(const Vector &x, const Vector &g, int64_t groups, int threads, float *posterior) {
  int64_t n = int64_t(x.shape(0));
  return sort(Strided<T>{static_cast<const T *>(x.data()), n ? x.stride(0) : 0},
              Strided<G>{static_cast<const G *>(g.data()), n ? g.stride(0) : 0}, n, groups, threads, posterior);
}

template <class T> Sorted sort_by(const Vector &x, const Vector &g, int64_t groups, int threads, float *posterior) {
  if (g.dtype() == nb::dtype<int64_t>()) return sort_as<T, int64_t>(x, g, groups, threads, posterior);
  return sort_as<T, int32_t>(x, g, groups, threads, posterior);
}

struct Results {
  float *posterior;  // [samples]
  double *weight, *mean, *variance;  // [groups, 2]
  int64_t *iterations;
  double *log_likelihood;  // [groups]
};

void put(double *pair, double a, double b) { pair[0] = a, pair[1] = b; }

// Fits group g and fills its results; its losses are scaled in place.
void fit_group(const MixtureLoops &loops, const MixtureOptions &options, const Sorted &sorted, int64_t g, int threads,
               const Results &out) {
  int64_t count = sorted.begin[g + 1] - sorted.begin[g];
  double *z = sorted.losses.get() + sorted.begin[g];
  const int64_t *sample = sorted.sample.get() + sorted.begin[g];
  MixtureRange range = count ? loops.extent(z, count) : MixtureRange{NAN, NAN};
  double span = range.highest - range.lowest;
  out.iterations[g] = 0, out.log_likelihood[g] = NAN;
  if (!(span > 0)) {
    double one = count ? 1 : NAN;
    put(out.weight + 2 * g, one, one - 1);
    put(out.mean + 2 * g, range.lowest, range.lowest);
    put(out.variance + 2 * g, span, span);
    for (int64_t i = 0; i < count; i++) out.posterior[sample[i]] = 1;
    return;
  }
  for (int64_t i = 0; i < count; i++) z[i] = (z[i] - range.lowest) / span;
  MixtureFit fit = MixtureGroup(loops, z, count, options.floor, threads).fit(options);
  MixtureTheta &t = fit.theta;
  if (t[1] > t[2]) t = {-t[0], t[2], t[1], t[4], t[3]};
  double variance[2] = {std::exp(t[3]), std::exp(t[4])};
  put(out.weight + 2 * g, std::exp(log_sigmoid(t[0])), std::exp(log_sigmoid(-t[0])));
  put(out.mean + 2 * g, range.lowest + span * t[1], range.lowest + span * t[2]);
  put(out.variance + 2 * g, span * span * variance[0], span * span * variance[1]);
  out.iterations[g] = fit.passes;

  MixtureComponent two[2];
  mixture_components(t, two);
  MixtureRange held{-1, 2};
  if (options.monotone && variance[0] != variance[1]) {  // the odds of component 0 turn here, outside of the means
    double turn = (t[1] * variance[1] - t[2] * variance[0]) / (variance[1] - variance[0]);
    (variance[0] < variance[1] ? held.lowest : held.highest) = turn;
  }
  auto last = mixture_sum<MixtureSums>(count, threads, [&](int64_t begin, int64_t n) {
    float posterior[MIXTURE_BLOCK];
    loops.posterior(z + begin, n, two, held, posterior);
    for (int64_t i = 0; i < n; i++) out.posterior[sample[begin + i]] = posterior[i];
    return loops.step(z + begin, n, two);
  });
  out.log_likelihood[g] = last.log_density - double(count) * (LOG_TWO_PI / 2 + std::log(span));
}

int64_t mixture(Vector losses, Vector groups, Floats posterior, Pairs weight, Pairs mean, Pairs variance,
                Longs iterations, Doubles log_likelihood, int64_t max_iterations, double tolerance, double floor,
                bool monotone, int isa, int threads) {
  int64_t num_groups = int64_t(weight.shape(0));
  if (groups.shape(0) != losses.shape(0) || posterior.shape(0) != losses.shape(0))
    throw nb::value_error("groups and posterior must have one element per loss");
  for (size_t n : {mean.shape(0), variance.shape(0), iterations.shape(0), log_likelihood.shape(0)})
    if (int64_t(n) != num_groups) throw nb::value_error("outputs must have one element or pair per group");
  if (groups.dtype() != nb::dtype<int64_t>() && groups.dtype() != nb::dtype<int32_t>())
    throw nb::value_error("groups must be int32 or int64");
  nb::dlpack::dtype type = losses.dtype();
  bool bfloat = type.code == uint8_t(nb::dlpack::dtype_code::Bfloat), real = type == nb::dtype<float>();
  if (!real && !bfloat && !(type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16))
    throw nb::value_error("losses must be float32, bfloat16 or float16");
  MixtureLoops loops{pick<MixtureExtent>(isa, TADPERF_BY_ISA(mixture_extent)),
                     pick<MixtureAbove>(isa, TADPERF_BY_ISA(mixture_above)),
                     pick<MixtureStep>(isa, TADPERF_BY_ISA(mixture_step)),
                     pick<MixturePosterior>(isa, TADPERF_BY_ISA(mixture_posterior))};
  MixtureOptions options{max_iterations, tolerance, floor, monotone};
  Results out{posterior.data(), weight.data(), mean.data(), variance.data(), iterations.data(), log_likelihood.data()};

  nb::gil_scoped_release release;
  Sorted sorted = real     ? sort_by<float>(losses, groups, num_groups, threads, out.posterior)
                  : bfloat ? sort_by<BFloat>(losses, groups, num_groups, threads, out.posterior)
                           : sort_by<Half>(losses, groups, num_groups, threads, out.posterior);
  if (sorted.wrong >= 0) return sorted.wrong;
  auto large = [&](int64_t g) { return sorted.begin[g + 1] - sorted.begin[g] > LARGE; };
  for (int64_t g = 0; g < num_groups; g++)
    if (large(g)) fit_group(loops, options, sorted, g, threads, out);
  int64_t used = sorted.begin.back(), together = std::max<int64_t>(1, 1024 * num_groups / (used + 1));
  parallel_for(num_groups, together, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++)
      if (!large(g)) fit_group(loops, options, sorted, g, 1, out);
  }, 1);
  return -1;
}

}  // namespace

void bind_mixture(nb::module_ &m) {
  m.def("mixture", &mixture, "losses"_a, "groups"_a, "posterior"_a, "weight"_a, "mean"_a, "variance"_a, "iterations"_a,
        "log_likelihood"_a, "max_iterations"_a, "tolerance"_a, "floor"_a, "monotone"_a, "isa"_a, "threads"_a,
        "Fill the six outputs; returns the first sample whose group is out of range, or -1.");
}
