// tadperf.kernels._native.reliability: checks shapes, packs the matrices, shares the rows out over threads with the GIL
// released.
#include "reliability.h"

#include <limits>

#include "common/dispatch.h"
#include "common/parallel.h"

#include <vector>

using namespace nb::literals;

namespace {

using Features = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

Reliability::Type type_of(const Features &features) {
  auto type = features.dtype();
  if (type == nb::dtype<float>()) return Reliability::FLOAT;
  if (type.bits == 16 && type.code == uint8_t(nb::dlpack::dtype_code::Float)) return Reliability::HALF;
  if (type.bits == 16 && type.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return Reliability::BFLOAT;
  throw nb::value_error("features must be float32, bfloat16 or float16");
}

// Tiles of whole rows; those beyond the last are NaN.
std::vector<float> pack(const float *matrix, int64_t rows, int64_t width) {
  std::vector<float> out(tiles_of(rows) * TILE_ROWS * width, std::numeric_limits<float>::quiet_NaN());
  for (int64_t row = 0; row < rows; row++) {
    float *tile = out.data() + row / TILE_ROWS * TILE_ROWS * width + row % TILE_ROWS;
    for (int64_t j = 0; j < width; j++) tile[j * TILE_ROWS] = matrix[row * width + j];
  }
  return out;
}

// Tiles of the lower triangle, reciprocals on its diagonal.
std::vector<float> pack_triangle(const float *matrix, int64_t width) {
  std::vector<float> out(triangle_offset(tiles_of(width)));
  for (int64_t row = 0; row < width; row++) {
    float *tile = out.data() + triangle_offset(row / TILE_ROWS) + row % TILE_ROWS;
    for (int64_t j = 0; j < row; j++) tile[j * TILE_ROWS] = matrix[row * width + j];
    tile[row * TILE_ROWS] = 1 / matrix[row * width + row];
  }
  return out;
}

std::vector<float> squares_of(const std::vector<float> &matrix, int64_t rows, int64_t width) {
  std::vector<float> out(tiles_of(rows) * TILE_ROWS);
  for (int64_t row = 0; row < rows; row++) {
    double sum = 0;
    for (int64_t j = 0; j < width; j++) sum += double(matrix[row * width + j]) * matrix[row * width + j];
    out[row] = float(sum);
  }
  return out;
}

void reliability(Features features, Matrix anchors, Matrix directions, Vector centre, Matrix cholesky, Longs nearest,
                 Floats distance, Longs second, Floats second_distance, Longs most_similar, Floats similarity,
                 Longs second_similar, Floats second_similarity, int isa, int threads) {
  int64_t rows = int64_t(features.shape(0)), width = int64_t(features.shape(1)), classes = int64_t(anchors.shape(0));
  for (size_t n : {nearest.shape(0), distance.shape(0), second.shape(0), second_distance.shape(0),
                   most_similar.shape(0), similarity.shape(0), second_similar.shape(0), second_similarity.shape(0)})
    if (int64_t(n) != rows) throw nb::value_error("outputs must have one element per row");
  for (size_t n : {anchors.shape(1), directions.shape(1), centre.shape(0), cholesky.shape(0), cholesky.shape(1)})
    if (int64_t(n) != width) throw nb::value_error("anchors, centre and cholesky must have the features' width");
  if (width < 1 || classes < 1 || int64_t(directions.shape(0)) != classes || classes > INT32_MAX - TILE_ROWS)
    throw nb::value_error("there must be one direction per anchor, and one anchor or more");
  auto *block_size = pick<ReliabilityBlock>(isa, TADPERF_BY_ISA(reliability_block));
  auto *whiten = pick<ReliabilityWhiten>(isa, TADPERF_BY_ISA(reliability_whiten));
  auto *fill_rows = pick<ReliabilityRows>(isa, TADPERF_BY_ISA(reliability));

  Reliability a{};
  a.type = type_of(features), a.features = features.data(), a.rows = rows, a.width = width, a.classes = classes;
  a.row_stride = rows ? features.stride(0) : 0, a.column_stride = rows ? features.stride(1) : 0;
  a.centre = centre.data();
  a.nearest = nearest.data(), a.distance = distance.data();
  a.second = second.data(), a.second_distance = second_distance.data();
  a.most_similar = most_similar.data(), a.similarity = similarity.data();
  a.second_similar = second_similar.data(), a.second_similarity = second_similarity.data();

  nb::gil_scoped_release release;
  int64_t block = block_size(width);
  std::vector<float> factor = pack_triangle(cholesky.data(), width), whitened(classes * width);
  a.factor = factor.data();
  Reliability of_anchors = a;
  of_anchors.type = Reliability::FLOAT, of_anchors.features = anchors.data();
  of_anchors.row_stride = width, of_anchors.column_stride = 1;
  parallel_for(classes, block, threads,
               [&](int64_t begin, int64_t end) { whiten(of_anchors, begin, end, whitened.data()); });
  std::vector<float> whitened_tiles = pack(whitened.data(), classes, width);
  std::vector<float> direction_tiles = pack(directions.data(), classes, width);
  std::vector<float> squares = squares_of(whitened, classes, width);
  a.whitened = whitened.data(), a.whitened_tiles = whitened_tiles.data();
  a.direction_tiles = direction_tiles.data(), a.squares = squares.data();
  parallel_for(rows, block, threads, [&](int64_t begin, int64_t end) { fill_rows(a, begin, end); });
}

}  // namespace

void bind_reliability(nb::module_ &m) {
  m.def("reliability", &reliability, "features"_a, "anchors"_a, "directions"_a, "centre"_a, "cholesky"_a, "nearest"_a,
        "distance"_a, "second"_a, "second_distance"_a, "most_similar"_a, "similarity"_a, "second_similar"_a,
        "second_similarity"_a, "isa"_a, "threads"_a,
        "Fill the eight outputs from features, anchors, anchors at length 1, their centre and the Cholesky factor.");
}
