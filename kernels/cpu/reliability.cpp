// Nearest and most similar anchors of blocks of samples, in one read of the features.
//
// A block of samples is transposed on the way in, LANES samples to a vector. It stays in the second-level cache while
// it is multiplied by three matrices, in tiles of TILE_ROWS rows: the anchors' directions (cosines), the Cholesky
// factor (forward substitution, in place) and the whitened anchors (distances). Every product is `multiply`. Nothing is
// ever reduced across lanes. A sample's result depends on that sample only: any number of threads gives the same bits.
#include "reliability.h"

#include <algorithm>
#include <new>

#include "common/load_store.h"
#include "common/vector_math.h"

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

// The largest and the second largest score with their classes. Among equal scores the first one stays.
struct TopTwo {
  f32 best = fill(-INF), second = fill(-INF);
  i32 best_class = i32{} - 1, second_class = i32{} - 1;
};

inline void update(TopTwo &top, f32 score, int32_t index) {
  i32 column = i32{} + index;
  i32 is_best = score > top.best, is_second = score > top.second;  // false for NaN
  top.second_class = is_best ? top.best_class : is_second ? column : top.second_class;
  top.second = is_best ? top.best : is_second ? score : top.second;
  top.best_class = is_best ? column : top.best_class;
  top.best = is_best ? score : top.best;
}

using Sums = f32[TILE][WIDE];

// sums[r][w] += sum over k of tile[k][r] * panel[k][w]: the dot products of TILE rows with PANEL samples.
inline void multiply(const float *tile, const f32 *panel, int64_t depth, Sums &sums) {
  Sums in_registers;
  memcpy(in_registers, sums, sizeof in_registers);
  for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 12
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 2
      for (int w = 0; w < WIDE; w++) in_registers[r][w] += tile[r] * panel[w];
    tile += TILE;
    panel += WIDE;
  }
  memcpy(sums, in_registers, sizeof in_registers);
}

// Writes the columns first..first + count of one row as float32.
inline void convert(const Reliability &args, int64_t row, int64_t first, int64_t count, float *out) {
  int64_t begin = row * args.row_stride + first * args.column_stride, step = args.column_stride;
  with_element(args.type, [&](auto element) {
    const auto *from = static_cast<const decltype(element) *>(args.features) + begin;
    for (int64_t j = 0; j < count; j++) out[j] = widen(from[j * step]);
  });
}

// Transposes PANEL samples from `row` on: panel[j][w]. Beyond row end - 1, it repeats that row.
inline void load_panel(const Reliability &args, int64_t row, int64_t end, f32 *panel) {
  alignas(64) float scratch[LANES][CHUNK];
  bool direct = args.type == ElementType::float32 && args.column_stride == 1;
  for (int w = 0; w < WIDE; w++)
    for (int64_t first = 0; first < args.width; first += CHUNK) {
      int64_t count = std::min(CHUNK, args.width - first), j = 0;
      const float *rows[LANES];
      for (int i = 0; i < LANES; i++) {
        int64_t r = std::min(row + w * LANES + i, end - 1);
        rows[i] = direct ? static_cast<const float *>(args.features) + r * args.row_stride + first : scratch[i];
        if (!direct) convert(args, r, first, count, scratch[i]);
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

// The samples of a block, as panels.
struct Block {
  int64_t panels, size;  // size: vectors of one panel
  f32 *data;

  Block(int64_t count, int64_t width) : panels((count + PANEL - 1) / PANEL), size(width * WIDE) {
    data = static_cast<f32 *>(::operator new(panels * size * sizeof(f32), std::align_val_t(64)));
  }
  ~Block() { ::operator delete(data, std::align_val_t(64)); }
  Block(const Block &) = delete;
  f32 *panel(int64_t p) { return data + p * size; }
};

// sums[p] = the first `depth` columns of a tile times panel p. The columns come in steps whose part of the tile stays
// in the first-level cache for all panels.
inline void multiply_block(const float *tile, int64_t depth, Block &block, Sums *sums) {
  memset(sums, 0, sizeof(Sums) * block.panels);
  for (int64_t k = 0; k < depth; k += STEP)
    for (int64_t p = 0; p < block.panels; p++)
      multiply(tile + k * TILE, block.panel(p) + k * WIDE, std::min(STEP, depth - k), sums[p]);
}

// Forward substitution of one tile, after the columns before it. `rows` points to the tile's first row in the panel.
inline void substitute(const float *corner, int count, const Sums &sums, f32 *rows) {
  for (int r = 0; r < count; r++)
    for (int w = 0; w < WIDE; w++) {
      f32 x = rows[r * WIDE + w] - sums[r][w];
      for (int q = 0; q < r; q++) x -= corner[q * TILE + r] * rows[q * WIDE + w];
      rows[r * WIDE + w] = x * corner[r * TILE + r];
    }
}

inline void centre_and_whiten(const Reliability &args, Block &block) {
  for (int64_t p = 0; p < block.panels; p++)
    for (int64_t j = 0; j < args.width; j++)
      for (int w = 0; w < WIDE; w++) block.panel(p)[j * WIDE + w] -= args.centre[j];
  Sums sums[MOST_PANELS];
  for (int64_t first = 0; first < args.width; first += TILE) {
    const float *tile = args.factor + triangle_offset(first / TILE);
    int count = int(std::min<int64_t>(TILE, args.width - first));
    multiply_block(tile, first, block, sums);
    for (int64_t p = 0; p < block.panels; p++)
      substitute(tile + first * TILE, count, sums[p], block.panel(p) + first * WIDE);
  }
}

// The largest two of score(class, direction . sample) over all classes, for each sample of the block.
template <class F>
void rank(const Reliability &args, const float *tiles, Block &block, TopTwo *tops, F score) {
  Sums sums[MOST_PANELS];
  for (int64_t first = 0; first < args.classes; first += TILE) {
    multiply_block(tiles + first * args.width, args.width, block, sums);
    for (int64_t p = 0; p < block.panels; p++)
      for (int r = 0; r < TILE; r++)
        for (int w = 0; w < WIDE; w++) update(tops[p * WIDE + w], score(first + r, sums[p][r][w]), int32_t(first) + r);
  }
}

// |sample - whitened anchor|^2 without the cancellation of the expanded form; 0 if the sample is its anchor.
inline f32 exact_square(const Reliability &args, const f32 *samples, i32 classes) {
  const float *rows[LANES];
  for (int i = 0; i < LANES; i++) rows[i] = args.whitened + std::max<int64_t>(classes[i], 0) * args.width;
  f32 sums[4]{};
  int64_t j = 0;
  for (; j + 4 <= args.width; j += 4) {
    f32 four[4];
    load_columns(rows, j, four);
    for (int q = 0; q < 4; q++) {
      f32 d = samples[(j + q) * WIDE] - four[q];
      sums[q] += d * d;
    }
  }
  for (; j < args.width; j++) {
    f32 d = samples[j * WIDE] - load_column(rows, j);
    sums[0] += d * d;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Replaces the negative squares of the ranking by exact ones, and puts the two in order again.
inline void refine(const Reliability &args, const f32 *samples, TopTwo &top) {
  f32 best = -exact_square(args, samples, top.best_class), second = -exact_square(args, samples, top.second_class);
  best = top.best_class < 0 ? fill(-INF) : best;
  second = top.second_class < 0 ? fill(-INF) : second;
  i32 is_tie_of_lower_class = (second == best) & (top.second_class < top.best_class) & (top.second_class >= 0);
  i32 swap = (second > best) | is_tie_of_lower_class;
  i32 best_class = top.best_class;
  top.best = swap ? second : best;
  top.second = swap ? best : second;
  top.best_class = swap ? top.second_class : best_class;
  top.second_class = swap ? best_class : top.second_class;
}

// Writes classes and values; -1 and NaN for a value that is not finite or a class that does not exist.
inline void write(int64_t *index, float *value, f32 values, i32 classes, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    bool defined = classes[i] >= 0 && values[i] - values[i] == 0;
    index[i] = defined ? classes[i] : -1;
    value[i] = defined ? values[i] : NaN;
  }
}

inline f32 square_of_columns(const f32 *samples, int64_t width) {
  f32 sums[4]{};
  for (int64_t j = 0; j < width; j++) sums[j % 4] += samples[j * WIDE] * samples[j * WIDE];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline void write_similarities(const Reliability &args, int64_t row, int64_t count, const f32 *samples,
                               const TopTwo &top) {
  f32 square = square_of_columns(samples, args.width);
  f32 length = square_root(square);
  f32 scale = square > 0 ? 1.0f / length : square;  // NaN stays NaN; a sample of length 0 has similarity 0
  auto cosine = [&](f32 x) { return square < INF ? min(fill(1), max(fill(-1), x * scale)) : fill(NaN); };
  write(args.most_similar + row, args.similarity + row, cosine(top.best), top.best_class, count);
  write(args.second_similar + row, args.second_similarity + row, cosine(top.second), top.second_class, count);
}

inline void write_distances(const Reliability &args, int64_t row, int64_t count, const f32 *samples, TopTwo &top) {
  refine(args, samples, top);
  write(args.nearest + row, args.distance + row, square_root(-top.best), top.best_class, count);
  write(args.second + row, args.second_distance + row, square_root(-top.second), top.second_class, count);
}

// Calls f(first row, number of rows, their samples, their TopTwo) for each vector of the block.
template <class F>
void each_vector(Block &block, int64_t begin, int64_t end, TopTwo *tops, F f) {
  int64_t v = 0;
  for (int64_t row = begin; row < end; row += LANES) {
    f(row, std::min<int64_t>(LANES, end - row), block.panel(v / WIDE) + v % WIDE, tops[v]);
    v++;
  }
}

}  // namespace

int64_t TADPERF_ISA::reliability_block(int64_t width) {
  return std::min(MOST_PANELS, std::max<int64_t>(1, BLOCK_BYTES / (width * PANEL * 4))) * PANEL;
}

void TADPERF_ISA::reliability_whiten(const Reliability &args, int64_t begin, int64_t end, float *out) {
  Block block(end - begin, args.width);
  for (int64_t p = 0; p < block.panels; p++) load_panel(args, begin + p * PANEL, end, block.panel(p));
  centre_and_whiten(args, block);
  for (int64_t row = 0; row < end - begin; row++) {
    const f32 *samples = block.panel(row / PANEL) + row % PANEL / LANES;
    for (int64_t j = 0; j < args.width; j++) out[(begin + row) * args.width + j] = samples[j * WIDE][row % LANES];
  }
}

void TADPERF_ISA::reliability(const Reliability &args, int64_t begin, int64_t end) {
  Block block(end - begin, args.width);
  for (int64_t p = 0; p < block.panels; p++) load_panel(args, begin + p * PANEL, end, block.panel(p));
  TopTwo similar[MOST_PANELS * WIDE], near[MOST_PANELS * WIDE];
  rank(args, args.direction_tiles, block, similar, [](int64_t, f32 product) { return product; });
  each_vector(block, begin, end, similar, [&](int64_t row, int64_t count, const f32 *samples, TopTwo &top) {
    write_similarities(args, row, count, samples, top);
  });
  centre_and_whiten(args, block);
  rank(args, args.whitened_tiles, block, near,
       [&](int64_t c, f32 product) { return 2.0f * product - args.squares[c]; });
  each_vector(block, begin, end, near, [&](int64_t row, int64_t count, const f32 *samples, TopTwo &top) {
    write_distances(args, row, count, samples, top);
  });
}
