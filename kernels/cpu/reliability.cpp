// Nearest and most similar anchors of blocks of samples, in one read of the features.
//
// A block of samples is transposed on the way in, LANES samples to a vector, and stays in the second-level cache while
// three matrices go past it in tiles of TILE_ROWS rows: the anchors' directions (cosines), the Cholesky factor (forward
// substitution, in place) and the whitened anchors (distances). Every product is `multiply`. Nothing is ever reduced
// across lanes, and a sample's result depends on that sample alone: any number of threads gives the same bits.
#include "reliability.h"

#include <algorithm>
#include <new>

#include "simd.h"

namespace {

constexpr int TILE = TILE_ROWS;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDE = 2;  // vectors of samples side by side; 32 registers hold TILE * WIDE sums
#else
constexpr int WIDE = 1;
#endif
constexpr int64_t PANEL = WIDE * LANES;     // samples
constexpr int64_t BLOCK_BYTES = 512 << 10;  // of one block of samples
constexpr int64_t MOST_PANELS = 8;          // of one block
constexpr int64_t STEP = 512;               // columns of a tile at a time: 24 kB
constexpr int64_t CHUNK = 64;               // columns converted at a time

// The largest and the second largest value seen, with their classes; of equals the first one seen stays.
struct TopTwo {
  f32 best = fill(-INF), second = fill(-INF);
  i32 best_class = i32{} - 1, second_class = i32{} - 1;
};

inline void see(TopTwo &s, f32 x, int32_t index) {
  i32 column = i32{} + index, first = x > s.best, next = x > s.second;  // false for NaN
  s.second_class = first ? s.best_class : next ? column : s.second_class;
  s.second = first ? s.best : next ? x : s.second;
  s.best_class = first ? column : s.best_class;
  s.best = first ? x : s.best;
}

using Sums = f32[TILE][WIDE];

// sums[r][w] += sum over k of tile[k][r] * panel[k][w], the dot products of TILE rows with PANEL samples.
inline void multiply(const float *tile, const f32 *panel, int64_t depth, Sums &sums) {
  Sums s;  // a copy stays in registers
  memcpy(s, sums, sizeof s);
  for (int64_t k = 0; k < depth; k++, tile += TILE, panel += WIDE) {
#pragma GCC unroll 12
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 2
      for (int w = 0; w < WIDE; w++) s[r][w] += tile[r] * panel[w];
  }
  memcpy(sums, s, sizeof s);
}

// IEEE binary16 of a normal or subnormal number by one exact product; infinity and NaN keep their bits.
inline float half_to_float(uint16_t h) {
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  float x;
  memcpy(&x, &magnitude, sizeof x);
  x *= 0x1p112f;
  uint32_t out;
  memcpy(&out, &x, sizeof out);
  out |= uint32_t(h & 0x8000) << 16 | (magnitude >= 0x0f800000 ? 0x7f800000 : 0);
  memcpy(&x, &out, sizeof x);
  return x;
}

// Columns first..first + count - 1 of one row, as float.
inline void convert(const Reliability &a, int64_t row, int64_t first, int64_t count, float *out) {
  int64_t begin = row * a.row_stride + first * a.column_stride, step = a.column_stride;
  const uint16_t *halves = static_cast<const uint16_t *>(a.features) + begin;
  const float *floats = static_cast<const float *>(a.features) + begin;
  if (a.type == Reliability::FLOAT)
    for (int64_t j = 0; j < count; j++) out[j] = floats[j * step];
  else if (a.type == Reliability::HALF)
    for (int64_t j = 0; j < count; j++) out[j] = half_to_float(halves[j * step]);
  else
    for (int64_t j = 0; j < count; j++) {
      uint32_t wide = uint32_t(halves[j * step]) << 16;
      memcpy(out + j, &wide, sizeof wide);
    }
}

// PANEL samples from `row` on, transposed: panel[j][w]. Beyond row `end - 1`, that row again.
inline void load_panel(const Reliability &a, int64_t row, int64_t end, f32 *panel) {
  alignas(64) float scratch[LANES][CHUNK];
  bool direct = a.type == Reliability::FLOAT && a.column_stride == 1;
  for (int w = 0; w < WIDE; w++)
    for (int64_t first = 0; first < a.width; first += CHUNK) {
      int64_t count = std::min(CHUNK, a.width - first), j = 0;
      const float *rows[LANES];
      for (int i = 0; i < LANES; i++) {
        int64_t at = std::min(row + w * LANES + i, end - 1);
        rows[i] = direct ? static_cast<const float *>(a.features) + at * a.row_stride + first : scratch[i];
        if (!direct) convert(a, at, first, count, scratch[i]);
      }
      for (; j + 4 <= count; j += 4) {
        f32 four[4];
        load_columns(rows, j, four);
        for (int q = 0; q < 4; q++) panel[(first + j + q) * WIDE + w] = four[q];
      }
      for (; j < count; j++)
        for (int i = 0; i < LANES; i++) panel[(first + j) * WIDE + w][i] = rows[i][j];
    }
}

struct Block {
  int64_t panels, size;  // size: vectors of one panel
  f32 *data;

  Block(int64_t count, int64_t width)
      : panels((count + PANEL - 1) / PANEL), size(width * WIDE),
        data(static_cast<f32 *>(::operator new(panels *size * sizeof(f32), std::align_val_t(64)))) {}
  ~Block() { ::operator delete(data, std::align_val_t(64)); }
  Block(const Block &) = delete;
  f32 *panel(int64_t p) { return data + p * size; }
};

// sums[p] = the first `depth` columns of a tile times panel p, in steps whose part of the tile stays in the first-level
// cache for all panels.
inline void multiply_block(const float *tile, int64_t depth, Block &block, Sums *sums) {
  memset(sums, 0, sizeof(Sums) * block.panels);
  for (int64_t k = 0; k < depth; k += STEP)
    for (int64_t p = 0; p < block.panels; p++)
      multiply(tile + k * TILE, block.panel(p) + k * WIDE, std::min(STEP, depth - k), sums[p]);
}

// One tile of forward substitution, after the columns before it: `rows` points at its first row in the panel.
inline void substitute(const float *corner, int count, const Sums &sums, f32 *rows) {
  for (int r = 0; r < count; r++)
    for (int w = 0; w < WIDE; w++) {
      f32 x = rows[r * WIDE + w] - sums[r][w];
      for (int q = 0; q < r; q++) x -= corner[q * TILE + r] * rows[q * WIDE + w];
      rows[r * WIDE + w] = x * corner[r * TILE + r];
    }
}

inline void centre_and_whiten(const Reliability &a, Block &block) {
  for (int64_t p = 0; p < block.panels; p++)
    for (int64_t j = 0; j < a.width; j++)
      for (int w = 0; w < WIDE; w++) block.panel(p)[j * WIDE + w] -= a.centre[j];
  Sums sums[MOST_PANELS];
  for (int64_t first = 0; first < a.width; first += TILE) {
    const float *tile = a.factor + triangle_offset(first / TILE);
    int count = int(std::min<int64_t>(TILE, a.width - first));
    multiply_block(tile, first, block, sums);
    for (int64_t p = 0; p < block.panels; p++)
      substitute(tile + first * TILE, count, sums[p], block.panel(p) + first * WIDE);
  }
}

// Largest two of score(class, direction . sample) over all classes, for each sample of the block.
template <class F> void rank(const Reliability &a, const float *tiles, Block &block, TopTwo *tops, F score) {
  Sums sums[MOST_PANELS];
  for (int64_t first = 0; first < a.classes; first += TILE) {
    multiply_block(tiles + first * a.width, a.width, block, sums);
    for (int64_t p = 0; p < block.panels; p++)
      for (int r = 0; r < TILE; r++)
        for (int w = 0; w < WIDE; w++) see(tops[p * WIDE + w], score(first + r, sums[p][r][w]), int32_t(first) + r);
  }
}

// |sample - whitened anchor|^2 without the cancellation of the expanded form; 0 for a sample that is its anchor.
inline f32 exact_square(const Reliability &a, const f32 *samples, i32 classes) {
  const float *rows[LANES];
  for (int i = 0; i < LANES; i++) rows[i] = a.whitened + std::max<int64_t>(classes[i], 0) * a.width;
  f32 sums[4]{};
  int64_t j = 0;
  for (; j + 4 <= a.width; j += 4) {
    f32 four[4];
    load_columns(rows, j, four);
    for (int q = 0; q < 4; q++) {
      f32 d = samples[(j + q) * WIDE] - four[q];
      sums[q] += d * d;
    }
  }
  for (; j < a.width; j++) {
    f32 column;
    for (int i = 0; i < LANES; i++) column[i] = rows[i][j];
    f32 d = samples[j * WIDE] - column;
    sums[0] += d * d;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Replaces the ranking's negative squares by exact ones, and puts the two in order again.
inline void refine(const Reliability &a, const f32 *samples, TopTwo &s) {
  f32 best = -exact_square(a, samples, s.best_class), second = -exact_square(a, samples, s.second_class);
  best = s.best_class < 0 ? fill(-INF) : best;
  second = s.second_class < 0 ? fill(-INF) : second;
  i32 swap = (second > best) | ((second == best) & (s.second_class < s.best_class) & (s.second_class >= 0));
  s.best = swap ? second : best, s.second = swap ? best : second;
  i32 first = s.best_class;
  s.best_class = swap ? s.second_class : first, s.second_class = swap ? first : s.second_class;
}

// Values that are not finite, and classes that do not exist, come out as NaN and -1.
inline void store(int64_t *index, float *value, f32 x, i32 found, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    bool defined = found[i] >= 0 && x[i] - x[i] == 0;
    index[i] = defined ? found[i] : -1;
    value[i] = defined ? x[i] : NaN;
  }
}

inline f32 square_root(f32 x) {
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

inline f32 square_of_columns(const f32 *samples, int64_t width) {
  f32 sums[4]{};
  for (int64_t j = 0; j < width; j++) sums[j % 4] += samples[j * WIDE] * samples[j * WIDE];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline void write_similarities(const Reliability &a, int64_t row, int64_t count, const f32 *samples, const TopTwo &s) {
  f32 square = square_of_columns(samples, a.width), length = square_root(square);
  f32 scale = square > 0 ? 1.0f / length : square;  // NaN stays NaN, a sample of length 0 is similar to nothing
  auto cosine = [&](f32 x) { return square < INF ? min(fill(1), max(fill(-1), x * scale)) : fill(NaN); };
  store(a.most_similar + row, a.similarity + row, cosine(s.best), s.best_class, count);
  store(a.second_similar + row, a.second_similarity + row, cosine(s.second), s.second_class, count);
}

inline void write_distances(const Reliability &a, int64_t row, int64_t count, const f32 *samples, TopTwo &s) {
  refine(a, samples, s);
  store(a.nearest + row, a.distance + row, square_root(-s.best), s.best_class, count);
  store(a.second + row, a.second_distance + row, square_root(-s.second), s.second_class, count);
}

// f(first row, number of rows, their samples, their TopTwo) for each vector of the block.
template <class F> void each_vector(Block &block, int64_t begin, int64_t end, TopTwo *tops, F f) {
  for (int64_t v = 0, row = begin; row < end; v++, row += LANES)
    f(row, std::min<int64_t>(LANES, end - row), block.panel(v / WIDE) + v % WIDE, tops[v]);
}

}  // namespace

int64_t TADPERF_ISA::reliability_block(int64_t width) {
  return std::min(MOST_PANELS, std::max<int64_t>(1, BLOCK_BYTES / (width * PANEL * 4))) * PANEL;
}

void TADPERF_ISA::reliability_whiten(const Reliability &a, int64_t begin, int64_t end, float *out) {
  Block block(end - begin, a.width);
  for (int64_t p = 0; p < block.panels; p++) load_panel(a, begin + p * PANEL, end, block.panel(p));
  centre_and_whiten(a, block);
  for (int64_t row = 0; row < end - begin; row++) {
    const f32 *samples = block.panel(row / PANEL) + row % PANEL / LANES;
    for (int64_t j = 0; j < a.width; j++) out[(begin + row) * a.width + j] = samples[j * WIDE][row % LANES];
  }
}

void TADPERF_ISA::reliability(const Reliability &a, int64_t begin, int64_t end) {
  Block block(end - begin, a.width);
  for (int64_t p = 0; p < block.panels; p++) load_panel(a, begin + p * PANEL, end, block.panel(p));
  TopTwo similar[MOST_PANELS * WIDE], near[MOST_PANELS * WIDE];
  rank(a, a.direction_tiles, block, similar, [](int64_t, f32 product) { return product; });
  each_vector(block, begin, end, similar, [&](int64_t row, int64_t count, const f32 *samples, TopTwo &s) {
    write_similarities(a, row, count, samples, s);
  });
  centre_and_whiten(a, block);
  rank(a, a.whitened_tiles, block, near, [&](int64_t c, f32 product) { return 2.0f * product - a.squares[c]; });
  each_vector(block, begin, end, near, [&](int64_t row, int64_t count, const f32 *samples, TopTwo &s) {
    write_distances(a, row, count, samples, s);
  });
}
