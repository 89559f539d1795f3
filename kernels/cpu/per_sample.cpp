// Loss, confidence, prediction, margin and entropy of each row of logits, in one read of the logits.
//
// LANES rows go through side by side, one row to a lane, whatever the number of classes: rows are transposed on the way
// in (four columns at a time, in registers), so that nothing is ever reduced across lanes. Classes come in chunks that
// stay in the first-level cache: once for the running maximum, once for the sums, which are rescaled between chunks
// (the online softmax). A row's result depends on that row alone: any number of threads gives the same bits.
#include "per_sample.h"

#include "half.h"

namespace {

constexpr int CHUNK = 128;  // classes; 4 kB of AVX2 vectors
constexpr int TILES = 8;    // of LANES rows, one after the other
constexpr int SHORT = 32;   // classes; 16 kB of AVX-512 tiles in float32

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
template <class T> inline void load_tail(const T *const *rows, int64_t columns, f32 out[4]) {
  int left = int(columns % 4);
  f32 four[4];
  if (columns > 4) load_columns(rows, columns - 4, four);
  else
    for (int j = 4 - left; j < 4; j++) four[j] = load_column(rows, j - 4 + left);
  for (int j = 0; j < 4; j++) out[j] = j < left ? four[j + 4 - left] : fill(-INF);
}

template <class T> inline void reduce(const T *const rows[LANES], int64_t all_columns, Running &result) {
  Running s = result;
  f32 chunk[CHUNK];
  for (int64_t begin = 0; begin < all_columns; begin += CHUNK) {
    int64_t columns = 0;
    f32 old_top = s.top;
    int64_t whole = all_columns - begin < CHUNK ? (all_columns - begin) / 4 * 4 : CHUNK;
    for (; columns < whole; columns += 4) {
      load_columns(rows, begin + columns, chunk + columns);
      for (int j = 0; j < 4; j++) see(s, chunk[columns + j]);
    }
    if (whole < CHUNK && all_columns % 4) {
      load_tail(rows, all_columns, chunk + columns);
      for (int j = 0; j < 4; j++) see(s, chunk[columns + j]);
      columns += 4;
    }
    accumulate(s, chunk, columns, old_top);
  }
  result = s;
}

inline int64_t label(const Labels &labels, int64_t row) {
  int64_t i = row * labels.stride;
  return labels.are_64bit ? static_cast<const int64_t *>(labels.data)[i] : static_cast<const int32_t *>(labels.data)[i];
}

template <class T, class V> inline void store(T *out, const V &x, int count) {
  if (count == LANES) memcpy(out, &x, sizeof x);
  else memcpy(out, &x, sizeof(T) * count);
}

// What the row loop leaves of LANES rows, until their logarithms and quotients are taken together with others'.
struct Tile {
  Running s;
  f32 picked{};  // the logit of the given label
  i32 ignored;
};

// Between calls that bring some of the columns each. `column` counts within a call, `first` before it.
template <class F> inline void each_carried(const PerSample &a, int64_t row, Tile &t, F f) {
  void *parts[] = {&t.s.top, &t.s.second, &t.s.argmax, &t.s.sum, &t.s.weighted, &t.picked};
  for (int i = 0; i < 6; i++) f(a.state + i * a.rows + row, parts[i]);
}

// `row` is at `logits`. Returns the first of the rows whose label is out of range, or -1.
template <class T> inline int64_t read_tile(const PerSample &a, const T *logits, int64_t row, int count, Tile &tile) {
  int64_t wrong = -1;
  const T *rows[LANES], *at_label[LANES];  // beyond the last row, that row again
  alignas(sizeof(i32)) int32_t ignored[LANES], here[LANES];
  for (int i = LANES - 1; i >= 0; i--) {
    int64_t at = i < count ? i : count - 1, given = label(a.labels, row + at);
    if (given < -1 || given >= a.classes) wrong = row + at, given = -1;
    int64_t column = given - a.first;
    ignored[i] = given < 0 ? -1 : 0;
    here[i] = column >= 0 && column < a.columns ? -1 : 0;
    rows[i] = logits + at * a.stride;
    at_label[i] = rows[i] + (here[i] ? column : 0);
  }
  i32 is_here;
  memcpy(&tile.ignored, ignored, sizeof ignored);
  memcpy(&is_here, here, sizeof here);
  tile.s = Running{}, tile.picked = f32{};
  if (a.first > 0)
    each_carried(a, row, tile, [&](const float *state, void *part) { memcpy(part, state, sizeof(float) * count); });
  tile.s.column = i32{} + int32_t(a.first);
  tile.picked = is_here ? load_column(at_label, 0) : tile.picked;
  reduce(rows, a.columns, tile.s);
  return wrong;
}

inline void write_tile(const PerSample &a, int64_t row, int count, Tile &tile) {
  if (a.first + a.columns < a.classes)
    return each_carried(a, row, tile, [&](float *state, void *part) { memcpy(state, part, sizeof(float) * count); });
  const Running &s = tile.s;
  i32 defined = s.sum > 0;  // not where a logit is NaN or +inf (the sum is NaN) or all are -inf (it is 0)
  f32 log_sum = log_above_one(s.sum), share = 1.0f / s.sum, gap = s.second - s.top, nan = fill(NaN);
  f32 loss = defined ? log_sum + (s.top - tile.picked) : nan;
  store(a.loss + row, tile.ignored ? fill(0) : loss, count);
  store(a.confidence + row, defined ? share : nan, count);
  store(a.margin + row, defined ? (1.0f - exp_nonpositive(gap)) * share : nan, count);
  store(a.entropy + row, defined ? log_sum - s.weighted * share : nan, count);
  store(a.prediction + row, __builtin_convertvector(defined ? s.argmax : i32{} - 1, i64), count);
  if (a.top) store(a.top + row, s.top, count);
}

// The rows begin..end, the first of them at `logits`.
template <class T> inline int64_t group_of_rows(const PerSample &a, const T *logits, int64_t begin, int64_t end) {
  // The steps of one tile form one long chain; those of several overlap once the reductions are out of the way.
  Tile tiles[TILES];
  int64_t first_wrong = -1;
  auto count = [&](int64_t row) { return int(end - row < LANES ? end - row : LANES); };
  for (int64_t row = begin; row < end; row += LANES) {
    int64_t wrong = read_tile(a, logits + (row - begin) * a.stride, row, count(row), tiles[(row - begin) / LANES]);
    if (first_wrong < 0) first_wrong = wrong;
  }
  for (int64_t row = begin; row < end; row += LANES) write_tile(a, row, count(row), tiles[(row - begin) / LANES]);
  return first_wrong;
}

template <class F> inline int64_t each_group(int64_t begin, int64_t end, F f) {
  int64_t first_wrong = -1;
  for (int64_t row = begin; row < end; row += TILES * LANES) {
    int64_t wrong = f(row, end - row < TILES * LANES ? end : row + TILES * LANES);
    if (first_wrong < 0) first_wrong = wrong;
  }
  return first_wrong;
}

template <class T> inline int64_t all_rows(const PerSample &a, int64_t begin, int64_t end) {
  const T *logits = static_cast<const T *>(a.logits);
  return each_group(begin, end, [&](int64_t row, int64_t stop) {
    return group_of_rows(a, logits + row * a.stride, row, stop);
  });
}

// Half types of few classes are widened whole, row after row: gathering two bytes at a time costs half of the time more.
inline int64_t all_short_rows(const PerSample &a, int64_t begin, int64_t end) {
  float wide[TILES * LANES * SHORT];
  return each_group(begin, end, [&](int64_t row, int64_t stop) {
    read_floats(a.logits, a.kind, row * a.columns, (stop - row) * a.columns, wide);
    return group_of_rows(a, wide, row, stop);
  });
}

}  // namespace

int64_t TADPERF_ISA::per_sample(const PerSample &a, int64_t begin, int64_t end) {
  if (a.kind != Kind::float32 && a.columns <= SHORT && a.stride == a.columns) return all_short_rows(a, begin, end);
  if (a.kind == Kind::bfloat16) return all_rows<bf16>(a, begin, end);
  if (a.kind == Kind::float16) return all_rows<f16>(a, begin, end);
  return all_rows<float>(a, begin, end);
}

void TADPERF_ISA::per_sample_gradient(const PerSampleGradient &a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float *x = a.logits + row * a.stride;
    float *out = a.out + row * a.columns;
    int64_t given = label(a.labels, row);
    float scale = given < 0 ? 0 : a.scale[row], share = a.confidence[row] * scale;
    auto step = [&](int64_t c, int count) {
      f32 d{};
      memcpy(&d, x + c, sizeof(float) * count);
      d -= a.top[row];
      f32 gradient = given < 0 ? f32{} : exp_nonpositive(d) * share;
      memcpy(out + c, &gradient, sizeof(float) * count);
    };
    int64_t c = 0;
    for (; c + LANES <= a.columns; c += LANES) step(c, LANES);
    if (c < a.columns) step(c, int(a.columns - c));
    if (given >= a.first && given < a.first + a.columns) out[given - a.first] -= scale;
  }
}
