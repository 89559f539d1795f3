// Loss, confidence, prediction, margin and entropy of each row of logits, in one read of the logits.
//
// LANES rows are processed side by side, one row per lane, for any number of classes. Rows are transposed on the way in
// (four columns at a time, in registers), so nothing is ever reduced across lanes. Classes come in chunks that stay in
// the first-level cache. A chunk is read once for the running maximum and once for the sums, which are rescaled between
// chunks (the online softmax). A row's result depends on that row only: any number of threads gives the same bits.
#include "per_sample.h"

#include "common/load_store.h"
#include "common/vector_math.h"

namespace {

constexpr int CHUNK = 128;  // classes; 4 kB of AVX2 vectors
constexpr int TILES = 8;    // of LANES rows, one after the other
constexpr int SHORT = 32;   // classes; 16 kB of AVX-512 tiles in float32

// State of LANES rows after some of their columns, with e = exp(x - top).
struct Running {
  f32 top = fill(-INF), second = fill(-INF);
  i32 argmax{}, column{};
  f32 sum{}, weighted{};  // sums of e and of e * (x - top)
};

inline void update_maximum(Running &state, f32 x) {
  i32 higher = x > state.top;  // strict, so that the first of equal columns stays
  state.argmax = higher ? state.column : state.argmax;
  state.second = max(min(x, state.top), state.second);
  state.top = max(x, state.top);
  state.column += 1;
}

// Adds a chunk whose maximum is already in state.top. `columns` is a multiple of 4.
inline void accumulate(Running &state, const f32 *chunk, int64_t columns, f32 old_top) {
  f32 top = state.top == -INF ? fill(0) : state.top;  // -inf - -inf would be NaN, and finite logits may follow
  f32 sum{}, weighted{};
#pragma GCC unroll 4  // 13 % faster than without
  for (int64_t c = 0; c < columns; c++) {
    f32 d = chunk[c] - top;
    f32 e = exp_nonpositive(d);
    sum += e;
    weighted += e * d;
  }
  f32 drop = old_top == -INF ? fill(0) : old_top - top;
  f32 scale = exp_nonpositive(drop);
  state.weighted = (state.weighted + state.sum * drop) * scale + weighted;
  state.sum = state.sum * scale + sum;
}

// Loads the last 1 to 3 columns of the rows, and -inf after them: classes that change nothing.
template <class T>
inline void load_tail(const T *const *rows, int64_t columns, f32 out[4]) {
  int left = int(columns % 4);
  f32 four[4];
  if (columns > 4)
    load_columns(rows, columns - 4, four);
  else
    for (int j = 4 - left; j < 4; j++) four[j] = load_column(rows, j - 4 + left);
  for (int j = 0; j < 4; j++) out[j] = j < left ? four[j + 4 - left] : fill(-INF);
}

template <class T>
inline void reduce(const T *const rows[LANES], int64_t all_columns, Running &result) {
  Running state = result;
  f32 chunk[CHUNK];
  for (int64_t begin = 0; begin < all_columns; begin += CHUNK) {
    int64_t columns = 0;
    f32 old_top = state.top;
    int64_t whole = all_columns - begin < CHUNK ? (all_columns - begin) / 4 * 4 : CHUNK;
    for (; columns < whole; columns += 4) {
      load_columns(rows, begin + columns, chunk + columns);
      for (int j = 0; j < 4; j++) update_maximum(state, chunk[columns + j]);
    }
    if (whole < CHUNK && all_columns % 4) {
      load_tail(rows, all_columns, chunk + columns);
      for (int j = 0; j < 4; j++) update_maximum(state, chunk[columns + j]);
      columns += 4;
    }
    accumulate(state, chunk, columns, old_top);
  }
  result = state;
}

inline int64_t label(const Labels &labels, int64_t row) {
  int64_t i = row * labels.stride;
  return labels.are_64bit ? static_cast<const int64_t *>(labels.data)[i] : static_cast<const int32_t *>(labels.data)[i];
}

// Writes the first `count` lanes.
template <class T, class V>
inline void store_lanes(T *out, const V &x, int count) {
  if (count == LANES)
    memcpy(out, &x, sizeof x);
  else
    memcpy(out, &x, sizeof(T) * count);
}

// What the row loop computes for LANES rows. Logarithms and quotients follow for several tiles together.
struct Tile {
  Running state;
  f32 picked{};  // the logit of the given label
  i32 ignored;
};

// Calls f for each part of the state that one call passes to the next. `column` is not carried: it follows from
// `first`.
template <class F>
inline void each_carried(const PerSample &args, int64_t row, Tile &tile, F f) {
  Running &state = tile.state;
  void *parts[] = {&state.top, &state.second, &state.argmax, &state.sum, &state.weighted, &tile.picked};
  for (int i = 0; i < 6; i++) f(args.state + i * args.rows + row, parts[i]);
}

// Reads `count` rows from `row` on, the first of them at `logits`. Returns the first row whose label is out of range,
// or -1.
template <class T>
inline int64_t read_tile(const PerSample &args, const T *logits, int64_t row, int count, Tile &tile) {
  int64_t wrong = -1;
  const T *rows[LANES], *at_label[LANES];  // lanes beyond the last row repeat that row
  alignas(sizeof(i32)) int32_t ignored[LANES], here[LANES];
  for (int i = LANES - 1; i >= 0; i--) {
    int64_t offset = i < count ? i : count - 1;
    int64_t given = label(args.labels, row + offset);
    if (given < -1 || given >= args.classes) {
      wrong = row + offset;
      given = -1;
    }
    int64_t column = given - args.first;
    ignored[i] = given < 0 ? -1 : 0;
    here[i] = column >= 0 && column < args.columns ? -1 : 0;
    rows[i] = logits + offset * args.stride;
    at_label[i] = rows[i] + (here[i] ? column : 0);
  }
  i32 is_here;
  memcpy(&tile.ignored, ignored, sizeof ignored);
  memcpy(&is_here, here, sizeof here);
  tile.state = Running{};
  tile.picked = f32{};
  if (args.first > 0)
    each_carried(args, row, tile, [&](const float *state, void *part) { memcpy(part, state, sizeof(float) * count); });
  tile.state.column = i32{} + int32_t(args.first);
  tile.picked = is_here ? load_column(at_label, 0) : tile.picked;
  reduce(rows, args.columns, tile.state);
  return wrong;
}

inline void write_tile(const PerSample &args, int64_t row, int count, Tile &tile) {
  if (args.first + args.columns < args.classes)
    return each_carried(args, row, tile, [&](float *state, void *part) { memcpy(state, part, sizeof(float) * count); });
  const Running &state = tile.state;
  i32 defined = state.sum > 0;  // false if a logit is NaN or +inf (the sum is NaN), or all are -inf (the sum is 0)
  f32 log_sum = log_above_one(state.sum), share = 1.0f / state.sum, gap = state.second - state.top, nan = fill(NaN);
  f32 loss = defined ? log_sum + (state.top - tile.picked) : nan;
  store_lanes(args.loss + row, tile.ignored ? fill(0) : loss, count);
  store_lanes(args.confidence + row, defined ? share : nan, count);
  store_lanes(args.margin + row, defined ? (1.0f - exp_nonpositive(gap)) * share : nan, count);
  store_lanes(args.entropy + row, defined ? log_sum - state.weighted * share : nan, count);
  store_lanes(args.prediction + row, __builtin_convertvector(defined ? state.argmax : i32{} - 1, i64), count);
  if (args.top) store_lanes(args.top + row, state.top, count);
}

// Rows begin..end, the first of them at `logits`: up to TILES tiles. The steps of one tile form a long chain. The
// chains of several tiles overlap if all reductions come first.
template <class T>
inline int64_t group_of_rows(const PerSample &args, const T *logits, int64_t begin, int64_t end) {
  Tile tiles[TILES];
  int64_t first_wrong = -1;
  auto count = [&](int64_t row) { return int(end - row < LANES ? end - row : LANES); };
  for (int64_t row = begin; row < end; row += LANES) {
    const T *from = logits + (row - begin) * args.stride;
    int64_t wrong = read_tile(args, from, row, count(row), tiles[(row - begin) / LANES]);
    if (first_wrong < 0) first_wrong = wrong;
  }
  for (int64_t row = begin; row < end; row += LANES) write_tile(args, row, count(row), tiles[(row - begin) / LANES]);
  return first_wrong;
}

template <class F>
inline int64_t each_group(int64_t begin, int64_t end, F f) {
  int64_t first_wrong = -1;
  for (int64_t row = begin; row < end; row += TILES * LANES) {
    int64_t wrong = f(row, end - row < TILES * LANES ? end : row + TILES * LANES);
    if (first_wrong < 0) first_wrong = wrong;
  }
  return first_wrong;
}

template <class T>
inline int64_t all_rows(const PerSample &args, int64_t begin, int64_t end) {
  const T *logits = static_cast<const T *>(args.logits);
  return each_group(begin, end, [&](int64_t row, int64_t stop) {
    return group_of_rows(args, logits + row * args.stride, row, stop);
  });
}

// Converts half types of few classes row by row first. To gather two bytes at a time would take 1.5 times as long.
inline int64_t all_short_rows(const PerSample &args, int64_t begin, int64_t end) {
  float wide[TILES * LANES * SHORT];
  return each_group(begin, end, [&](int64_t row, int64_t stop) {
    read_floats(args.logits, args.kind, row * args.columns, (stop - row) * args.columns, wide);
    return group_of_rows(args, wide, row, stop);
  });
}

}  // namespace

int64_t TADPERF_ISA::per_sample(const PerSample &args, int64_t begin, int64_t end) {
  bool is_half = args.kind != ElementType::float32;
  if (is_half && args.columns <= SHORT && args.stride == args.columns) return all_short_rows(args, begin, end);
  return with_element(args.kind, [&](auto element) { return all_rows<decltype(element)>(args, begin, end); });
}

void TADPERF_ISA::per_sample_gradient(const PerSampleGradient &args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float *logits = args.logits + row * args.stride;
    float *out = args.out + row * args.columns;
    int64_t given = label(args.labels, row);
    float scale = given < 0 ? 0 : args.scale[row];
    float share = args.confidence[row] * scale;
    each_vector_of(args.columns, [&](int64_t column, int64_t count) {
      f32 d{};
      memcpy(&d, logits + column, sizeof(float) * count);
      d -= args.top[row];
      f32 gradient = given < 0 ? f32{} : exp_nonpositive(d) * share;
      memcpy(out + column, &gradient, sizeof(float) * count);
    });
    if (given >= args.first && given < args.first + args.columns) out[given - args.first] -= scale;
  }
}
