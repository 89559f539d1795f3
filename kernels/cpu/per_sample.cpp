// Loss, confidence, prediction, margin and entropy of each row of logits, in one read of the logits.
//
// LANES rows go through side by side, one row to a lane, whatever the number of classes: rows are transposed on the way
// in (four columns at a time, in registers), so that nothing is ever reduced across lanes. Classes come in chunks that
// stay in the first-level cache: once for the running maximum, once for the sums, which are rescaled between chunks
// (the online softmax). A row's result depends on that row alone: any number of threads gives the same bits.
#include "per_sample.h"

#include "simd.h"

namespace {

constexpr int CHUNK = 128;  // classes; 4 kB of AVX2 vectors

struct Running {
  f32 top = fill(-INF), second = fill(-INF);
  i32 argmax{}, column{};
  f32 sum{}, weighted{};  // of e = exp(x - top), and of e * (x - top)
};

inline void see(Running &s, f32 x) {
  i32 higher = x > s.top;  // strictly: of equals the first column stays
  s.argmax = higher ? s.column : s.argmax;
  s.second = max(min(x, s.top), s.second);
  s.top = max(x, s.top);
  s.column += 1;
}

// Adds a chunk whose maximum is already in s.top; `columns` is a multiple of 4.
inline void accumulate(Running &s, const f32 *chunk, int64_t columns, f32 old_top) {
  f32 top = s.top == -INF ? fill(0) : s.top;  // -inf - -inf would be NaN, yet finite logits may still come
  f32 sum{}, weighted{};
#pragma GCC unroll 4  // 13 % faster than none
  for (int64_t c = 0; c < columns; c++) {
    f32 d = chunk[c] - top;
    f32 e = exp_nonpositive(d);
    sum += e;
    weighted += e * d;
  }
  f32 drop = old_top == -INF ? fill(0) : old_top - top;
  f32 scale = exp_nonpositive(drop);
  s.weighted = (s.weighted + s.sum * drop) * scale + weighted;
  s.sum = s.sum * scale + sum;
}

// The last 1 to 3 columns of the rows, and -inf after them: classes that change nothing.
inline void load_tail(const float *const *rows, int64_t classes, f32 out[4]) {
  int left = int(classes % 4);
  f32 four[4];
  if (classes > 4) load_columns(rows, classes - 4, four);
  else
    for (int j = 4 - left; j < 4; j++)
      for (int i = 0; i < LANES; i++) four[j][i] = rows[i][j - 4 + left];
  for (int j = 0; j < 4; j++) out[j] = j < left ? four[j + 4 - left] : fill(-INF);
}

inline void reduce(const float *const rows[LANES], int64_t classes, Running &result) {
  Running s;
  f32 chunk[CHUNK];
  for (int64_t begin = 0; begin < classes; begin += CHUNK) {
    int64_t columns = 0;
    f32 old_top = s.top;
    int64_t whole = classes - begin < CHUNK ? (classes - begin) / 4 * 4 : CHUNK;
    for (; columns < whole; columns += 4) {
      load_columns(rows, begin + columns, chunk + columns);
      for (int j = 0; j < 4; j++) see(s, chunk[columns + j]);
    }
    if (whole < CHUNK && classes % 4) {
      load_tail(rows, classes, chunk + columns);
      for (int j = 0; j < 4; j++) see(s, chunk[columns + j]);
      columns += 4;
    }
    accumulate(s, chunk, columns, old_top);
  }
  result = s;
}

inline int64_t label(const PerSample &a, int64_t row) {
  int64_t i = row * a.label_stride;
  return a.labels_are_64bit ? static_cast<const int64_t *>(a.labels)[i] : static_cast<const int32_t *>(a.labels)[i];
}

template <class T, class V> inline void store(T *out, const V &x, int count) {
  if (count == LANES) memcpy(out, &x, sizeof x);
  else memcpy(out, &x, sizeof(T) * count);
}

// What the row loop leaves of LANES rows, until their logarithms and quotients are taken together with others'.
struct Tile {
  Running s;
  alignas(sizeof(f32)) float picked[LANES];  // the logit of the given label
  alignas(sizeof(f32)) int32_t ignored[LANES];
};

// Returns the first of the rows whose label is out of range, or -1.
inline int64_t read_tile(const PerSample &a, int64_t row, int count, Tile &tile) {
  int64_t wrong = -1;
  const float *rows[LANES];  // beyond the last row, that row again
  for (int i = LANES - 1; i >= 0; i--) {
    int64_t at = row + (i < count ? i : count - 1), given = label(a, at);
    if (given < -1 || given >= a.classes) wrong = at, given = -1;
    rows[i] = a.logits + at * a.stride;
    tile.picked[i] = rows[i][given < 0 ? 0 : given];
    tile.ignored[i] = given < 0 ? -1 : 0;
  }
  reduce(rows, a.classes, tile.s);
  return wrong;
}

inline void write_tile(const PerSample &a, int64_t row, int count, const Tile &tile) {
  const Running &s = tile.s;
  i32 defined = s.sum > 0;  // not where a logit is NaN or +inf (the sum is NaN) or all are -inf (it is 0)
  f32 log_sum = log_above_one(s.sum), share = 1.0f / s.sum, gap = s.second - s.top, nan = fill(NaN), picked;
  i32 ignored;
  memcpy(&picked, tile.picked, sizeof picked);
  memcpy(&ignored, tile.ignored, sizeof ignored);
  f32 loss = defined ? log_sum + (s.top - picked) : nan;
  store(a.loss + row, ignored ? fill(0) : loss, count);
  store(a.confidence + row, defined ? share : nan, count);
  store(a.margin + row, defined ? (1.0f - exp_nonpositive(gap)) * share : nan, count);
  store(a.entropy + row, defined ? log_sum - s.weighted * share : nan, count);
  store(a.prediction + row, __builtin_convertvector(defined ? s.argmax : i32{} - 1, i64), count);
}

}  // namespace

int64_t TADPERF_ISA::per_sample(const PerSample &a, int64_t begin, int64_t end) {
  // The steps of one tile form one long chain; those of several overlap once the reductions are out of the way.
  constexpr int TILES = 8;
  Tile tiles[TILES];
  int64_t first_wrong = -1;
  for (int64_t group = begin; group < end; group += TILES * LANES) {
    int64_t stop = end - group < TILES * LANES ? end : group + TILES * LANES;
    auto count = [&](int64_t row) { return int(stop - row < LANES ? stop - row : LANES); };
    for (int64_t row = group; row < stop; row += LANES) {
      int64_t wrong = read_tile(a, row, count(row), tiles[(row - group) / LANES]);
      if (first_wrong < 0) first_wrong = wrong;
    }
    for (int64_t row = group; row < stop; row += LANES)
      write_tile(a, row, count(row), tiles[(row - group) / LANES]);
  }
  return first_wrong;
}
