// tadperf.kernels._native.mixture: sorts the samples by group and fits the groups on several threads without the GIL.
#include <memory>

#include "common/arrays.h"
#include "common/dispatch.h"
#include "mixture_fit.h"

using namespace nb::literals;

namespace {

using Losses = Typed<const float, 1>;
using Groups = Strided<1>;
using Pairs = nb::ndarray<double, nb::shape<-1, 2>, nb::c_contig, nb::device::cpu>;

constexpr double LOG_TWO_PI = 1.8378770664093454836;
// Samples. In a smaller group a pass ends before more threads have started.
constexpr int64_t LARGE = 1 << 17;

template <class T>
struct View {
  const T *data;
  int64_t stride;
  T operator[](int64_t i) const { return data[i * stride]; }
};

struct Sorted {
  std::unique_ptr<double[]> losses;   // the finite losses, group after group
  std::unique_ptr<int64_t[]> sample;  // the index of the sample of each of them
  std::vector<int64_t> begin;         // where each group begins, and the end of the last one
  int64_t wrong = -1;                 // the first sample whose group is out of range, or -1
};

// A stable counting sort. Writes the posteriors of the samples that are not part of any fit.
template <class G>
Sorted sort(View<float> losses, View<G> groups, int64_t n, int64_t num_groups, int threads, float *posterior) {
  Sorted out;
  int64_t block = std::max<int64_t>(16384, num_groups), blocks = (n + block - 1) / block;
  std::vector<int64_t> next(blocks * num_groups), wrong(blocks, -1);
  parallel_for(
      n, block, threads,
      [&](int64_t begin, int64_t end) {
        int64_t *count = next.data() + begin / block * num_groups;
        for (int64_t i = begin; i < end; i++) {
          int64_t g = groups[i];
          if (g >= 0 && g < num_groups)
            count[g] += std::isfinite(losses[i]);
          else if (g != -1 && wrong[begin / block] < 0)
            wrong[begin / block] = i;
        }
      },
      2);
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
  parallel_for(
      n, block, threads,
      [&](int64_t begin, int64_t end) {
        int64_t *at = next.data() + begin / block * num_groups;
        for (int64_t i = begin; i < end; i++) {
          int64_t g = groups[i];
          float x = losses[i];
          if (g >= 0 && std::isfinite(x)) {
            out.losses[at[g]] = x;
            out.sample[at[g]++] = i;
          } else {
            posterior[i] = g < 0 || std::isnan(x) ? NAN : x < 0 ? 1.0f : 0.0f;
          }
        }
      },
      2);
  return out;
}

template <class G>
Sorted sort_by(const Losses &losses, const Groups &groups, int64_t num_groups, int threads, float *posterior) {
  View<float> x{losses.data(), stride_of(losses, 0)};
  View<G> g{static_cast<const G *>(groups.data()), stride_of(groups, 0)};
  return sort(x, g, size_of(losses, 0), num_groups, threads, posterior);
}

struct Results {
  float *posterior;                  // [samples]
  double *weight, *mean, *variance;  // [groups, 2]
  int64_t *iterations;
  double *log_likelihood;  // [groups]
};

void write_pair(double *pair, double first, double second) {
  pair[0] = first;
  pair[1] = second;
}

// Fits group g and fills its results. Scales its losses in place.
void fit_group(const MixtureLoops &loops, const MixtureOptions &options, const Sorted &sorted, int64_t g, int threads,
               const Results &out) {
  int64_t count = sorted.begin[g + 1] - sorted.begin[g];
  double *z = sorted.losses.get() + sorted.begin[g];
  const int64_t *sample = sorted.sample.get() + sorted.begin[g];
  MixtureRange range = count ? loops.extent(z, count) : MixtureRange{NAN, NAN};
  double span = range.highest - range.lowest;
  out.iterations[g] = 0;
  out.log_likelihood[g] = NAN;
  if (!(span > 0)) {
    double one = count ? 1 : NAN;
    write_pair(out.weight + 2 * g, one, one - 1);
    write_pair(out.mean + 2 * g, range.lowest, range.lowest);
    write_pair(out.variance + 2 * g, span, span);
    for (int64_t i = 0; i < count; i++) out.posterior[sample[i]] = 1;
    return;
  }
  for (int64_t i = 0; i < count; i++) z[i] = (z[i] - range.lowest) / span;
  MixtureFit fit = MixtureGroup(loops, options, z, count, threads).fit();
  MixtureTheta &t = fit.theta;
  if (t[1] > t[2]) t = {-t[0], t[2], t[1], t[4], t[3]};
  double variance[2] = {std::exp(t[3]), std::exp(t[4])};
  write_pair(out.weight + 2 * g, std::exp(log_sigmoid(t[0])), std::exp(log_sigmoid(-t[0])));
  write_pair(out.mean + 2 * g, range.lowest + span * t[1], range.lowest + span * t[2]);
  write_pair(out.variance + 2 * g, span * span * variance[0], span * span * variance[1]);
  out.iterations[g] = fit.passes;

  MixtureComponent two[2];
  mixture_components(t, two);
  MixtureRange held{-1, 2};
  if (options.monotone && variance[0] != variance[1]) {
    // The turning point of the odds of component 0. It does not lie between the means.
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

int64_t mixture(Losses losses, Groups groups, Dense<float, 1> posterior, Pairs weight, Pairs mean, Pairs variance,
                Dense<int64_t, 1> iterations, Dense<double, 1> log_likelihood, int64_t max_iterations, double tolerance,
                double floor, bool monotone, double slack, double tiny, int64_t max_cuts, double smallest_part, int isa,
                int threads) {
  int64_t num_groups = size_of(weight, 0), samples = size_of(losses, 0);
  check_shape("groups", groups, {samples});
  check_shape("posterior", posterior, {samples});
  check_shape("mean", mean, {num_groups, 2});
  check_shape("variance", variance, {num_groups, 2});
  check_shape("iterations", iterations, {num_groups});
  check_shape("log_likelihood", log_likelihood, {num_groups});
  bool groups_are_int64 = is_int64("groups", groups);
  MixtureLoops loops{pick<MixtureExtent>(isa, TADPERF_BY_ISA(mixture_extent)),
                     pick<MixtureAbove>(isa, TADPERF_BY_ISA(mixture_above)),
                     pick<MixtureStep>(isa, TADPERF_BY_ISA(mixture_step)),
                     pick<MixturePosterior>(isa, TADPERF_BY_ISA(mixture_posterior))};
  MixtureOptions options{max_iterations, tolerance, floor, monotone, slack, tiny, max_cuts, smallest_part};
  Results out{posterior.data(), weight.data(), mean.data(), variance.data(), iterations.data(), log_likelihood.data()};

  nb::gil_scoped_release release;
  Sorted sorted = groups_are_int64 ? sort_by<int64_t>(losses, groups, num_groups, threads, out.posterior)
                                   : sort_by<int32_t>(losses, groups, num_groups, threads, out.posterior);
  if (sorted.wrong >= 0) return sorted.wrong;
  auto large = [&](int64_t g) { return sorted.begin[g + 1] - sorted.begin[g] > LARGE; };
  for (int64_t g = 0; g < num_groups; g++)
    if (large(g)) fit_group(loops, options, sorted, g, threads, out);
  int64_t used = sorted.begin.back(), together = std::max<int64_t>(1, 1024 * num_groups / (used + 1));
  parallel_for(
      num_groups, together, threads,
      [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; g++)
          if (!large(g)) fit_group(loops, options, sorted, g, 1, out);
      },
      1);
  return -1;
}

}  // namespace

void bind_mixture(nb::module_ &m) {
  m.def("mixture", &mixture, array("losses"), array("groups"), array("posterior"), array("weight"), array("mean"),
        array("variance"), array("iterations"), array("log_likelihood"), "max_iterations"_a, "tolerance"_a, "floor"_a,
        "monotone"_a, "slack"_a, "tiny"_a, "max_cuts"_a, "smallest_part"_a, "isa"_a, "threads"_a,
        "Fills the six results; returns the first sample whose group is out of range, or -1.");
}
