// Polynomial attention of a few queries, most often one, against many keys: a decoding step.
//
// Every key and value is read once, where it lies, for all heads that share it, and nothing but memory should bound a
// long step. So keys and values come in blocks so small that the processor sees two streams that advance together, 16-bit
// numbers become fp32 in registers, and the few sums per query stay in the first cache.
#pragma once

#include "cpu.h"

namespace {

constexpr int DECODE_ROWS = 8;          // as many queries at most; more are worth packing the keys for
constexpr int BLOCK = 16;               // keys, and then their values, that are read in turn
constexpr int WIDE = 2 * LANES;         // elements of a row that are loaded together
constexpr int AHEAD = 4 * BLOCK;        // keys for which memory is asked where the rows of a head do not adjoin
constexpr int64_t WORTH_A_THREAD = 1 << 18;  // bytes of keys and values

INLINE void load_wide(const float* x, vec& first, vec& second) { first = load(x), second = load(x + LANES); }
// Apart as even and odd elements, which takes a shift and a mask; see `place`.
INLINE void load_wide(const bf16* x, vec& even, vec& odd) {
  typedef uint32_t bits __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
  typedef uint32_t words __attribute__((vector_size(LANES * 4)));
  words both = *(const bits*)x;
  even = (vec)(both << 16), odd = (vec)(both & 0xffff0000u);
}
// Where element d of a row stands after load_wide.
template <class U> INLINE int place(int d) {
  return std::is_same_v<U, float> ? d : d / WIDE * WIDE + d % 2 * LANES + d % WIDE / 2;
}

// sums[n] += q . key n over `depth` elements, a multiple of WIDE.
template <class U> INLINE void add_dots(vec (&sums)[LANES], const float* q, const U* keys, int64_t row, int depth) {
  UNROLL for (int d = 0; d < depth; d += WIDE) {
    vec first = load(q + d), second = load(q + d + LANES);
    UNROLL for (int n = 0; n < LANES; n++) {
      vec a, b;
      load_wide(keys + n * row + d, a, b);
      sums[n] += a * first;
      sums[n] += b * second;
    }
  }
}

// q . k of one query and LANES keys. rest: what is left of the rows after `depth` elements, or null.
template <class U> __attribute__((noinline)) vec dots(const float* q, const U* keys, int64_t row, int depth, const U* rest) {
  vec sums[LANES] = {};
  add_dots(sums, q, keys, row, depth);
  if (rest) add_dots(sums, q + depth, rest, WIDE, WIDE);
  return add_lanes_of_each(sums);
}

// o[0, 2 N LANES) += sum_j w[j] value j. Eight sums at least, so that none waits for itself: SPLIT has two for each.
template <int N, bool SPLIT, class U> INLINE void add_values(float* o, const float* w, const U* values, int64_t row, int count) {
  vec sums[2 * N], odd[2 * N] = {};
  UNROLL for (int n = 0; n < 2 * N; n++) sums[n] = load(o + n * LANES);
  int j = 0;
  for (; j + 1 < count; j += 2) {
    UNROLL for (int n = 0; n < N; n++) {
      vec a, b;
      load_wide(values + j * row + n * WIDE, a, b);
      sums[2 * n] += a * w[j], sums[2 * n + 1] += b * w[j];
    }
    UNROLL for (int n = 0; n < N; n++) {
      vec a, b, *to = SPLIT ? odd : sums;
      load_wide(values + (j + 1) * row + n * WIDE, a, b);
      to[2 * n] += a * w[j + 1], to[2 * n + 1] += b * w[j + 1];
    }
  }
  if (j < count) UNROLL for (int n = 0; n < N; n++) {
    vec a, b;
    load_wide(values + j * row + n * WIDE, a, b);
    sums[2 * n] += a * w[j], sums[2 * n + 1] += b * w[j];
  }
  UNROLL for (int n = 0; n < 2 * N; n++) store(o + n * LANES, SPLIT ? sums[n] + odd[n] : sums[n]);
}

// Asks the second cache for keys or values that come next. Where the rows of a head adjoin, the processor goes on by itself once it
// has seen how a block begins; where rows of other heads lie between, it does not, and every line is asked for.
template <class U> INLINE void fetch(const U* x, int64_t row, int width) {
  constexpr int LINE = 64 / sizeof(U);
  if (row == width) {
    UNROLL for (int n = 0; n < 4; n++) __builtin_prefetch(x + BLOCK * row + n * LINE, 0, 2);
    return;
  }
  UNROLL for (int n = 0; n < BLOCK; n++)
    for (int d = 0; d < width; d += LINE) __builtin_prefetch(x + (AHEAD + n) * row + d, 0, 2);
}

// o += sum_j phi(q . key j) value j over whole blocks, for rows of D elements that adjoin: the sums stay in registers.
// total: the statistic of the row; it grows.
template <int D, bool ADJOIN, class U, class F>
__attribute__((noinline)) void run(const float* q, const U* keys, int64_t key_row, const U* values, int64_t value_row, int count,
                                   F phi, float slope, float shift, Normalization normalization, float* o, float* total) {
  if (ADJOIN) key_row = value_row = D;
  constexpr int N = D / LANES;
  constexpr bool SPLIT = N <= 4;  // two sums for each vector: one alone would wait for itself
  vec sums[N], odd[N] = {}, all = {};
  alignas(64) float w[BLOCK];
  UNROLL for (int n = 0; n < N; n++) sums[n] = load(o + n * LANES);
  for (int j = 0; j < count; j += BLOCK, keys += BLOCK * key_row, values += BLOCK * value_row) {
    fetch(keys, key_row, D);
    fetch(values, value_row, D);
    UNROLL for (int n = 0; n < BLOCK; n += LANES) {
      vec scores[LANES] = {};
      UNROLL for (int i = 0; i < LANES; i++) UNROLL for (int d = 0; d < D; d += WIDE) {
        vec a, b;
        load_wide(keys + (n + i) * key_row + d, a, b);
        scores[i] += a * load(q + d);
        scores[i] += b * load(q + d + LANES);
      }
      vec here = phi(add_lanes_of_each(scores) * slope + shift);
      store(w + n, here);
      if (normalization >= SUM && normalization <= L2) all += statistic(here, normalization);
    }
    UNROLL for (int n = 0; n < BLOCK; n++) {
      vec *to = SPLIT && n % 2 ? odd : sums, weight = broadcast(w[n]);
      UNROLL for (int d = 0; d < N; d += 2) {
        vec a, b;
        load_wide(values + n * value_row + d * LANES, a, b);
        to[d] += a * weight, to[d + 1] += b * weight;
      }
    }
  }
  UNROLL for (int n = 0; n < N; n++) store(o + n * LANES, SPLIT ? sums[n] + odd[n] : sums[n]);
  *total += add_lanes(all);
}

// Elements [from, width) of some rows, zeros after them: what is left when a row is read by WIDE elements.
template <class U> void copy_rest(const U* x, int64_t row, int count, int from, int width, int to, U* out) {
  for (int n = 0; n < count; n++, x += row, out += to) {
    memcpy(out, x + from, (width - from) * sizeof(U));
    std::fill(out + width - from, out + to, U(0));
  }
}

// Rows of one head against some of its keys.
template <class U, class F> struct Step {
  const Problem& x;
  const int depth, width, rows, whole, whole_out;
  Buffer<float> q, sums, totals, weights;
  Buffer<U> last_keys, key_rests, value_rests;
  Buffer<int32_t> keep;
  std::vector<uint8_t> holes;  // whether the keep mask leaves keys out, by row

  explicit Step(const Problem& x)
      : x(x), depth(up(x.D, WIDE)), width(up(x.Dv, WIDE)), rows(x.group() * x.T), whole(x.D / WIDE * WIDE),
        whole_out(x.Dv / WIDE * WIDE), q(buffer<float>(rows * depth)), sums(buffer<float>(rows * width)),
        totals(buffer<float>(rows)), weights(buffer<float>(BLOCK)), last_keys(buffer<U>(BLOCK * depth)),
        key_rests(buffer<U>(BLOCK * WIDE)), value_rests(buffer<U>(BLOCK * WIDE)), keep(buffer<int32_t>(BLOCK)),
        holes(rows) {
    std::fill(q.get(), q.get() + rows * depth, 0.0f);
    std::fill(last_keys.get(), last_keys.get() + BLOCK * depth, U(0));
  }

  void attend(int b, int head, int from, int to) {
    std::fill(sums.get(), sums.get() + rows * width, 0.0f);
    std::fill(totals.get(), totals.get() + rows, 0.0f);
    for (int r = 0; r < rows; r++) {
      int h = head * x.group() + r / x.T, i = r % x.T;
      const U* query = x.q.at<U>(b, h, i);
      for (int d = 0; d < x.D; d++) q[r * depth + place<U>(d)] = widen(query[d]);
      int seen = std::min(to, x.masks.high(b, i)) - std::max(from, x.masks.low(i));
      holes[r] = x.masks.keep && x.masks.count(b, h, i, from, to) < seen;
    }
    int j = from;
    bool plain = x.T == 1 && x.D == x.Dv && std::ranges::count(holes, 1) == 0;
    if (plain && (x.D == 32 || x.D == 64 || x.D == 128)) {
      const int end = from + (to - from) / BLOCK * BLOCK, most = rows == 1 ? end : 2 * BLOCK;
      for (int count; j < end; j += count) {
        count = std::min(most, end - j);
        for (int r = 0; r < rows; r++) x.D == 32 ? go<32>(b, head, r, j, count) : x.D == 64 ? go<64>(b, head, r, j, count) : go<128>(b, head, r, j, count);
      }
    }
    for (; j < to; j += BLOCK) block(b, head, j, std::min(BLOCK, to - j));
  }

  template <int D> void go(int b, int head, int r, int j, int count) {
    int h = head * x.group() + r;
    auto of = x.k.row == D && x.v.row == D ? run<D, true, U, F> : run<D, false, U, F>;
    of(&q[r * depth], x.k.at<U>(b, head, j), x.k.row, x.v.at<U>(b, head, j), x.v.row, count, x.phi<F>(h), x.slope(h), x.shift(h),
       x.normalization, &sums[r * width], &totals[r]);
  }

  void block(int b, int head, int j, int count) {
    const U *keys = x.k.at<U>(b, head, j), *values = x.v.at<U>(b, head, j);
    int64_t key_row = x.k.row;
    int read = whole;
    fetch(keys, x.k.row, x.D);
    fetch(values, x.v.row, x.Dv);
    if (count < BLOCK) {
      copy_rest(keys, key_row, count, 0, x.D, depth, last_keys.get());
      keys = last_keys.get(), key_row = read = depth;
    } else if (read < depth) {
      copy_rest(keys, key_row, count, whole, x.D, WIDE, key_rests.get());
    }
    if (whole_out < width) copy_rest(values, x.v.row, count, whole_out, x.Dv, WIDE, value_rests.get());
    for (int r = 0; r < rows; r++) {
      weigh(b, head * x.group() + r / x.T, r % x.T, &q[r * depth], keys, key_row, read, holes[r], j, count);
      if (x.normalized()) totals[r] += statistic(weights.get(), count, x.normalization);
      float* o = &sums[r * width];
      int d = 0;
      for (; d + 4 * WIDE <= whole_out; d += 4 * WIDE)
        add_values<4, false>(o + d, weights.get(), values + d, x.v.row, count);
      for (; d + 2 * WIDE <= whole_out; d += 2 * WIDE)
        add_values<2, true>(o + d, weights.get(), values + d, x.v.row, count);
      for (; d < whole_out; d += WIDE) add_values<1, true>(o + d, weights.get(), values + d, x.v.row, count);
      if (d < width) add_values<1, true>(o + d, weights.get(), value_rests.get(), WIDE, count);
    }
  }

  inline __attribute__((always_inline)) void weigh(int b, int h, int i, const float* query, const U* keys, int64_t row, int read, bool partial, int j,
                           int count) {
    F phi = x.phi<F>(h);
    bool masked = partial || x.masks.low(i) > j || x.masks.high(b, i) < j + count;
    if (masked) x.masks.write(b, h, i, i + 1, j, BLOCK, partial, keep.get(), BLOCK);
    UNROLL for (int n = 0; n < BLOCK; n += LANES) {
      vec w = dots(query, keys + n * row, row, read, read < depth ? &key_rests[n * WIDE] : nullptr);
      w = phi(w * x.slope(h) + x.shift(h));
      store(&weights[n], masked ? select(*(const unaligned_mask*)&keep[n], w) : w);
    }
  }
};

template <class U> void finish(const Problem& x, Rows out, float* divisors, int b, int head, int r, const float* o, float total) {
  int h = head * x.group() + r / x.T, i = r % x.T;
  float z = x.divisor(b, h, i, total), factor = x.gain_of(h) / z;
  if (divisors) divisors[((int64_t)b * x.H + h) * x.T + i] = z;
  U* to = out.at<U>(b, h, i);
  for (int d = 0; d < x.Dv; d++) narrow(to + d, o[place<U>(d)] * factor);
}

// divisors: [B, H, T], or null where they are not wanted.
template <class U, class F> void decode(const Problem& x, Rows out, float* divisors) {
  const int width = up(x.Dv, WIDE), rows = x.group() * x.T;
  const int64_t heads = (int64_t)x.B * x.Hk, bytes = heads * x.S * (x.D + x.Dv) * sizeof(U);
  const int64_t threads = std::clamp<int64_t>(bytes / WORTH_A_THREAD, 1, at::get_num_threads());
  // keys of one head are cut where there are few heads, so that all threads have work; the parts' sums are added then
  const int64_t wanted = threads == 1 || heads >= 4 * threads ? 1 : (4 * threads + heads - 1) / heads;
  const int64_t parts = std::clamp<int64_t>(x.S / 256, 1, wanted), part = up((x.S + parts - 1) / parts, BLOCK);
  Buffer<float> sums, totals;
  if (parts > 1) sums = buffer<float>(parts * heads * rows * width), totals = buffer<float>(parts * heads * rows);
  share(parts * heads, threads, [&](auto next) {
    Step<U, F> step(x);
    for (int64_t item; (item = next()) < parts * heads;) {
      int head = item % x.Hk, b = item / x.Hk % x.B;
      int64_t at = item / heads * part;
      step.attend(b, head, std::max<int64_t>(at, x.masks.low(0)), std::min<int64_t>(at + part, x.masks.high(b, x.T - 1)));
      if (parts > 1) {
        std::copy_n(step.sums.get(), rows * width, &sums[item * rows * width]);
        std::copy_n(step.totals.get(), rows, &totals[item * rows]);
      } else {
        for (int r = 0; r < rows; r++)
          finish<U>(x, out, divisors, b, head, r, &step.sums[r * width], step.totals[r]);
      }
    }
  });
  for (int64_t row = 0; parts > 1 && row < heads * rows; row++) {
    for (int64_t other = 1; other < parts; other++) {
      int64_t from = other * heads * rows + row;
      for (int d = 0; d < width; d++) sums[row * width + d] += sums[from * width + d];
      totals[row] += totals[from];
    }
    int64_t item = row / rows;
    finish<U>(x, out, divisors, item / x.Hk, item % x.Hk, row % rows, &sums[row * width], totals[row]);
  }
}

}  // namespace
