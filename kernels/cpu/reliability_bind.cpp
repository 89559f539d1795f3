// tadperf.kernels._native.reliability: packs the matrices and shares the rows among threads without the GIL.
#include "reliability.h"

#include <limits>
#include <vector>

#include "common/arrays.h"
#include "common/dispatch.h"
#include "common/parallel.h"

using namespace nb::literals;

namespace {

using Matrix = Dense<const float, 2>;

int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Packs rows in tiles (see reliability.h). Rows beyond the last one are NaN.
std::vector<float> pack(const float *matrix, int64_t rows, int64_t width) {
  std::vector<float> out(tiles_of(rows) * TILE_ROWS * width, std::numeric_limits<float>::quiet_NaN());
  for (int64_t row = 0; row < rows; row++) {
    float *tile = out.data() + row / TILE_ROWS * TILE_ROWS * width + row % TILE_ROWS;
    for (int64_t j = 0; j < width; j++) tile[j * TILE_ROWS] = matrix[row * width + j];
  }
  return out;
}

// Packs the lower triangle in tiles, with the reciprocals of its diagonal.
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

using Classes = Dense<int64_t, 1>;
using Values = Dense<float, 1>;

void reliability(Strided<2> features, Matrix anchors, Matrix directions, Dense<const float, 1> centre, Matrix cholesky,
                 Classes nearest, Values distance, Classes second, Values second_distance, Classes most_similar,
                 Values similarity, Classes second_similar, Values second_similarity, int isa, int threads) {
  int64_t rows = size_of(features, 0), width = size_of(features, 1), classes = size_of(anchors, 0);
  if (width < 1 || classes < 1 || classes > INT32_MAX - TILE_ROWS)
    throw nb::value_error("anchors: expected 1 or more, of 1 or more features");
  check_shape("anchors", anchors, {classes, width});
  check_shape("directions", directions, {classes, width});
  check_shape("centre", centre, {width});
  check_shape("cholesky", cholesky, {width, width});
  for (const Classes *result : {&nearest, &second, &most_similar, &second_similar})
    check_shape("results", *result, {rows});
  for (const Values *result : {&distance, &second_distance, &similarity, &second_similarity})
    check_shape("results", *result, {rows});
  auto *block_size = pick<ReliabilityBlock>(isa, TADPERF_BY_ISA(reliability_block));
  auto *whiten = pick<ReliabilityWhiten>(isa, TADPERF_BY_ISA(reliability_whiten));
  auto *fill_rows = pick<ReliabilityRows>(isa, TADPERF_BY_ISA(reliability));

  Reliability a{};
  a.type = kind_of(features.dtype());
  a.features = features.data();
  a.rows = rows;
  a.width = width;
  a.classes = classes;
  a.row_stride = stride_of(features, 0);
  a.column_stride = stride_of(features, 1);
  a.centre = centre.data();
  a.nearest = nearest.data();
  a.distance = distance.data();
  a.second = second.data();
  a.second_distance = second_distance.data();
  a.most_similar = most_similar.data();
  a.similarity = similarity.data();
  a.second_similar = second_similar.data();
  a.second_similarity = second_similarity.data();

  nb::gil_scoped_release release;
  int64_t block = block_size(width);
  std::vector<float> factor = pack_triangle(cholesky.data(), width), whitened(classes * width);
  a.factor = factor.data();
  Reliability of_anchors = a;
  of_anchors.type = ElementType::float32;
  of_anchors.features = anchors.data();
  of_anchors.row_stride = width;
  of_anchors.column_stride = 1;
  parallel_for(classes, block, threads,
               [&](int64_t begin, int64_t end) { whiten(of_anchors, begin, end, whitened.data()); });
  std::vector<float> whitened_tiles = pack(whitened.data(), classes, width);
  std::vector<float> direction_tiles = pack(directions.data(), classes, width);
  std::vector<float> squares = squares_of(whitened, classes, width);
  a.whitened = whitened.data();
  a.whitened_tiles = whitened_tiles.data();
  a.direction_tiles = direction_tiles.data();
  a.squares = squares.data();
  parallel_for(rows, block, threads, [&](int64_t begin, int64_t end) { fill_rows(a, begin, end); });
}

}  // namespace

void bind_reliability(nb::module_ &m) {
  m.def(
      "reliability", &reliability, array("features"), array("anchors"), array("directions"), array("centre"),
      array("cholesky"), array("nearest"), array("distance"), array("second"), array("second_distance"),
      array("most_similar"), array("similarity"), array("second_similar"), array("second_similarity"), "isa"_a,
      "threads"_a,
      "Fills the eight results from features, anchors, anchors of length 1, the mean anchor and the Cholesky factor.");
}
