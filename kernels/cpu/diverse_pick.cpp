// Rows scaled to length 1, and the largest cosine of each row with any image of a set.
//
// Each lane adds up the cosine with its own image, so nothing is reduced across lanes. Tiles of rows by blocks of
// images use each loaded vector for several products. A cosine is added in the same order in every place of
// a tile, so equal rows get equal cosines.
#include "diverse_pick.h"

#include "common/load_store.h"
#include "common/vector_math.h"

namespace {

constexpr int64_t CHUNK = 64 * LANES;
constexpr int64_t RUN = 64;   // products per partial sum: keeps the rounding error small
constexpr int TILE_ROWS = 6;  // times two blocks: 12 accumulators, which fit 16 registers

template <int ROWS, int BLOCKS>
inline void tile(const float *rows, const float *set, int64_t held, int64_t size, f32 *largest) {
  f32 sums[ROWS][BLOCKS]{};
  for (int64_t begin = 0; begin < size; begin += RUN) {
    int64_t end = size - begin < RUN ? size : begin + RUN;
    f32 partial[ROWS][BLOCKS]{};
    for (int64_t feature = begin; feature < end; feature++) {
      f32 image[BLOCKS];
      for (int j = 0; j < BLOCKS; j++) image[j] = load(set + (j * size + feature) * LANES);
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < BLOCKS; j++) partial[i][j] += rows[i * size + feature] * image[j];
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < BLOCKS; j++) sums[i][j] += partial[i][j];
  }
  i32 lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (int j = 0; j < BLOCKS; j++) {
    int64_t left = held - j * LANES;
    i32 present = lane < (i32{} + int(left < LANES ? left : LANES));
    for (int i = 0; i < ROWS; i++) largest[i] = max(largest[i], present ? sums[i][j] : fill(-INF));
  }
}

template <int ROWS>
inline void rows_by_set(const float *rows, const float *set, int64_t held, int64_t size, float *out) {
  f32 largest[ROWS];
  for (f32 &x : largest) x = fill(-INF);
  int64_t image = 0;
  for (; image + LANES < held; image += 2 * LANES) tile<ROWS, 2>(rows, set + image * size, held - image, size, largest);
  if (image < held) tile<ROWS, 1>(rows, set + image * size, held - image, size, largest);
  for (int i = 0; i < ROWS; i++) {
    out[i] = largest[i][0];
    for (int j = 1; j < LANES; j++) out[i] = out[i] > largest[i][j] ? out[i] : largest[i][j];
  }
}

inline f64 copy_and_square(const float *from, float *to, int64_t count) {
  f32 x{};
  __builtin_prefetch(from + AHEAD / 4);
  memcpy(&x, from, 4 * count);
  memcpy(to, &x, 4 * count);
  f64 wide = __builtin_convertvector(x, f64);
  return wide * wide;
}

}  // namespace

bool TADPERF_ISA::unit_row(const void *features, ElementType kind, int64_t size, float *unit) {
  float buffer[CHUNK];
  f64 squares{};
  for (int64_t begin = 0; begin < size; begin += CHUNK) {
    int64_t count = size - begin < CHUNK ? size - begin : CHUNK;
    const float *x = read_floats(features, kind, begin, count, buffer);
    each_vector_of(count, [&](int64_t i, int64_t n) { squares += copy_and_square(x + i, unit + begin + i, n); });
  }
  double square = total(squares);
  double scale = square > 0 ? 1 / __builtin_sqrt(square) : 0;
  for (int64_t i = 0; i < size; i++) unit[i] = float(unit[i] * scale);
  return square < double(INF);
}

void TADPERF_ISA::join_set(const float *unit, int64_t size, float *set, int64_t place) {
  float *to = set + place / LANES * LANES * size + place % LANES;
  for (int64_t i = 0; i < size; i++) to[i * LANES] = unit[i];
}

void TADPERF_ISA::largest_cosines(const float *units, int64_t count, const float *set, int64_t held, int64_t size,
                                  float *largest) {
  for (; count >= TILE_ROWS; count -= TILE_ROWS) {
    rows_by_set<TILE_ROWS>(units, set, held, size, largest);
    units += TILE_ROWS * size;
    largest += TILE_ROWS;
  }
  switch (count) {
    case 1:
      return rows_by_set<1>(units, set, held, size, largest);
    case 2:
      return rows_by_set<2>(units, set, held, size, largest);
    case 3:
      return rows_by_set<3>(units, set, held, size, largest);
    case 4:
      return rows_by_set<4>(units, set, held, size, largest);
    case 5:
      return rows_by_set<5>(units, set, held, size, largest);
    default:
      return;
  }
}
