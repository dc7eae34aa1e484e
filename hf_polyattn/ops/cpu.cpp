// Polynomial attention on a CPU: the definition of naive.py in cache-sized tiles, with its gradients.
//
// Forward: a strip of a few queries meets a run of keys, S = Q K^T in registers, phi is applied before the strip is
// stored, and O += phi(S) V. No row needs its maximum first, so nothing is ever rescaled; Z divides once at the end.
// Backward: S and dO V^T are computed again, side by side in registers; dQ, dK, dV are three more products of tiles.
//
// One source, one build for each instruction set: the width of `vec` decides. 16-bit inputs are converted to fp32
// while they are packed, except where the processor multiplies bf16 itself (AVX512_BF16); sums are always fp32.

#include "cpu.h"
#include "cpu_decode.h"

namespace {

// ------------------------------------------------------------------------------------------------------ packing

// Asks for a row some rows ahead: where heads lie side by side, every row is on a page of its own, and no processor
// foresees it.
template <class U> INLINE void foresee(const U* x, int64_t row, int i, int count, int width) {
  constexpr int AHEAD = 8, LINE = 64 / sizeof(U);
  if (i + AHEAD >= count) return;
  for (int d = 0; d < width; d += LINE) __builtin_prefetch(x + (i + AHEAD) * row + d);
}

// rows [count, width] -> the same, `to` elements apart, zeros around them; each row times scale[i] where given
template <class U, class T> void pack_rows(const U* x, int64_t row, int count, int padded, int width, int to, T* out,
                                           const float* scale = nullptr) {
  for (int i = 0; i < padded; i++, out += to) {
    int filled = i < count ? width : 0;
    foresee(x, row, i, count, width);
    const U* in = x + i * row;
    if constexpr (std::is_same_v<U, T>) {
      if (!scale) memcpy(out, in, filled * sizeof(T));
    }
    if (scale || !std::is_same_v<U, T>)
      for (int d = 0; d < filled; d++) narrow(out + d, widen(in[d]) * (scale ? scale[i] : 1.0f));
    std::fill(out + filled, out + to, T(0));
  }
}

// rows [count, width] -> columns of a product: [depth / PAIR][to][PAIR], depth = the rows
template <class U, class T> void pack_depth(const U* x, int64_t row, int count, int padded, int width, int to, T* out,
                                            const float* scale = nullptr) {
  constexpr int PAIR = Tile<T>::PAIR;
  if constexpr (PAIR == 1) return pack_rows(x, row, count, padded, width, to, out, scale);
  for (int i = 0; i < padded; i++) {
    T* line = out + (int64_t)(i / PAIR) * to * PAIR + i % PAIR;
    foresee(x, row, i, count, width);
    int filled = i < count ? width : 0;
    for (int d = 0; d < filled; d++) narrow(line + d * PAIR, widen(x[i * row + d]) * (scale ? scale[i] : 1.0f));
    for (int d = filled; d < to; d++) line[d * PAIR] = T(0);
  }
}

// rows [count, width] -> panels of their transpose: [count / PANEL][depth / PAIR][PANEL][PAIR], depth = the width
template <class U, class T> void pack_panels(const U* x, int64_t row, int count, int padded, int width, int depth, T* out) {
  constexpr int PAIR = Tile<T>::PAIR;
  for (int j0 = 0; j0 < padded; j0 += PANEL, out += (int64_t)PANEL * depth) {
    for (int j = 0; j < PANEL; j++) {
      T* lane = out + j * PAIR;
      foresee(x, row, j0 + j, count, width);
      int filled = j0 + j < count ? width : 0;
      const U* in = x + (j0 + j) * row;
      for (int d = 0; d < filled; d++) narrow(lane + (d / PAIR) * PANEL * PAIR + d % PAIR, widen(in[d]));
      for (int d = filled; d < depth; d++) lane[(d / PAIR) * PANEL * PAIR + d % PAIR] = T(0);
    }
  }
}

// C [rows, vectors * LANES] += A B: rows a multiple of 2, depth counted in elements
template <int R, int N, class T>
INLINE void product_block(const T* a, long row, long step, const T* b, long width, float* c, long to, int depth) {
  vec acc[R][N];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) acc[i][j] = load(c + i * to + j * LANES);
  multiply<R, N>(acc, a, row, step, b, width, depth / Tile<T>::PAIR);
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) store(c + i * to + j * LANES, acc[i][j]);
}

template <int N, class T>
INLINE void product_columns(const T* a, long row, long step, const T* b, long width, float* c, long to, int rows, int depth) {
  int i = 0;
  for (; i + 6 <= rows; i += 6) product_block<6, N>(a + i * row, row, step, b, width, c + i * to, to, depth);
  for (; i < rows; i += 2) product_block<2, N>(a + i * row, row, step, b, width, c + i * to, to, depth);
}

template <class T>
__attribute__((noinline)) void product(const T* a, long row, long step, const T* b, long width, float* c, long to, int rows, int depth) {
  int d = 0;
  for (; d + OUT * LANES <= width; d += OUT * LANES)
    product_columns<OUT>(a, row, step, b + d * Tile<T>::PAIR, width, c + d, to, rows, depth);
  for (; d < width; d += LANES)
    product_columns<1>(a, row, step, b + d * Tile<T>::PAIR, width, c + d, to, rows, depth);
}

// ------------------------------------------------------------------------------------------------------ forward

// What the divisors of a strip's rows depend on, lane by lane, of one panel more.
template <Normalization N> INLINE void add_statistics(const vec (&weights)[STRIP][2], vec* sums) {
  UNROLL for (int i = 0; i < STRIP; i++) sums[i] += statistic(weights[i][0], N) + statistic(weights[i][1], N);
}

// weights [STRIP][columns] = phi(scaling * Q K^T), masked; sums [STRIP] get their statistics where they are normalized
template <bool NORMALIZED, class T, class F>
__attribute__((noinline)) void strip_weights(const T* q, int depth, const T* panels, int columns, float scaling, F phi,
                                             const int32_t* keep, T* weights, Normalization normalization, vec* sums) {
  for (int j = 0; j < columns; j += PANEL) {
    vec acc[STRIP][2];
    UNROLL for (int i = 0; i < STRIP; i++) acc[i][0] = acc[i][1] = vec{};
    multiply<STRIP, 2>(acc, q, depth, 1, panels + (int64_t)j * depth, PANEL, depth / Tile<T>::PAIR);
    UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int n = 0; n < 2; n++) {
      vec w = phi(acc[i][n] * scaling);
      int at = i * FORWARD_KEYS + j + n * LANES;
      if (keep) w = select(*(const unaligned_mask*)(keep + at), w);
      store_weights(weights + at, w);
      acc[i][n] = w;
    }
    if constexpr (NORMALIZED) {
      if (normalization == L1) add_statistics<L1>(acc, sums);
      else normalization == SUM ? add_statistics<SUM>(acc, sums) : add_statistics<L2>(acc, sums);
    }
  }
}

// Blocks of FORWARD_ROWS queries, with the memory that one thread needs for them.
template <class U, class T, class F> struct ForwardBlock {
  const Problem& x;
  Rows out;
  float* divisors;
  const int depth = up(x.D, 2), width = up(x.Dv, LANES);
  Buffer<T> q = buffer<T>(FORWARD_ROWS * depth), weights = buffer<T>(STRIP * FORWARD_KEYS);
  Buffer<float> o = buffer<float>(FORWARD_ROWS * width);
  Buffer<int32_t> keep = buffer<int32_t>(STRIP * FORWARD_KEYS);
  float total[FORWARD_ROWS];
  std::vector<Span> spans;

  int64_t keys() const { return up(x.S, PANEL); }
  int64_t panels_size() const { return keys() * depth; }
  int64_t values_size() const { return keys() * width; }

  void pack(int b, int head, T* panels, T* values) const {
    pack_panels(x.k.at<U>(b, head, 0), x.k.row, x.S, keys(), x.D, depth, panels);
    pack_depth(x.v.at<U>(b, head, 0), x.v.row, x.S, keys(), x.Dv, width, values);
  }

  // panels, values: what `pack` made of the keys and values of h's group
  void attend(int b, int h, int i0, const T* panels, const T* values) {
    int rows = std::min(FORWARD_ROWS, x.T - i0), padded = up(rows, STRIP);
    F phi = x.phi<F>(h);
    float gain = x.gain_of(h);
    pack_rows(x.q.at<U>(b, h, i0), x.q.row, rows, padded, x.D, depth, q.get());
    std::fill(o.get(), o.get() + padded * width, 0.0f);
    std::fill(total, total + padded, 0.0f);
    x.masks.spans(b, h, i0, i0 + rows, 0, x.S, FORWARD_KEYS, spans);
    for (const Span& span : spans) {
      for (int s = 0; s < rows; s += STRIP) {
        int first = i0 + s, last = std::min(i0 + rows, first + STRIP);
        int j0 = std::max(span.first, x.masks.low(first) / PANEL * PANEL);
        int j1 = std::min(span.last, x.masks.high(b, last - 1));
        if (j0 >= j1) continue;
        int columns = up(j1 - j0, PANEL);
        bool masked = span.partial || !x.masks.full(b, first, last, j0, j0 + columns);
        if (masked) x.masks.write(b, h, first, last, j0, columns, span.partial, keep.get(), FORWARD_KEYS);
        auto weigh = [&](auto normalized) {
          vec sums[STRIP]{};
          strip_weights<normalized>(&q[s * depth], depth, panels + (int64_t)j0 * depth, columns, x.scaling, phi,
                                    masked ? keep.get() : nullptr, weights.get(), x.normalization, sums);
          for (int i = first; normalized && i < last; i++) total[i - i0] += add_lanes(sums[i - first]);
        };
        x.normalized() ? weigh(std::true_type()) : weigh(std::false_type());
        product(weights.get(), FORWARD_KEYS, 1, values + (int64_t)j0 * width, width, &o[s * width], width, STRIP, columns);
      }
    }
    for (int i = 0; i < rows; i++) {
      float z = x.divisor(b, h, i0 + i, total[i]);
      divisors[((int64_t)b * x.H + h) * x.T + i0 + i] = z;
      U* to = out.at<U>(b, h, i0 + i);
      for (int d = 0; d < x.Dv; d++) narrow(to + d, o[i * width + d] * (gain / z));
    }
  }
};

template <class U, class T, class F> void forward(const Problem& x, Rows out, float* divisors) {
  const int group = x.group(), blocks = (x.T + FORWARD_ROWS - 1) / FORWARD_ROWS;
  const int64_t heads = (int64_t)x.B * x.Hk, threads = at::get_num_threads();
  if (threads == 1 || heads >= 4 * threads) {
    // one thread does a head from end to end: what it packs stays in its cache, and takes the memory of one head
    share(heads, threads, [&](auto next) {
      ForwardBlock<U, T, F> block{x, out, divisors};
      auto panels = buffer<T>(block.panels_size()), values = buffer<T>(block.values_size());
      for (int64_t item; (item = next()) < heads;) {
        int b = item / x.Hk, head = item % x.Hk;
        block.pack(b, head, panels.get(), values.get());
        for (int h = head * group; h < (head + 1) * group; h++)
          for (int i0 = 0; i0 < x.T; i0 += FORWARD_ROWS) block.attend(b, h, i0, panels.get(), values.get());
      }
    });
    return;
  }
  const ForwardBlock<U, T, F> packing{x, out, divisors};
  const int64_t per_panels = packing.panels_size(), per_values = packing.values_size();
  auto panels = buffer<T>(heads * per_panels), values = buffer<T>(heads * per_values);
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; h++) packing.pack(h / x.Hk, h % x.Hk, &panels[h * per_panels], &values[h * per_values]);
  });
  share((int64_t)x.B * x.H * blocks, threads, [&](auto next) {
    ForwardBlock<U, T, F> block{x, out, divisors};
    for (int64_t item; (item = next()) < (int64_t)x.B * x.H * blocks;) {
      // the last rows first: under a causal mask they are the longest
      int h = item % x.H, b = item / x.H % x.B, i0 = (blocks - 1 - item / x.H / x.B) * FORWARD_ROWS;
      int64_t shared = (int64_t)b * x.Hk + h / group;
      block.attend(b, h, i0, &panels[shared * per_panels], &values[shared * per_values]);
    }
  });
}

// ----------------------------------------------------------------------------------------------------- backward

struct Gradients {
  Rows out_grad, out;  // dO and, for normalizations that depend on the weights, O; [B, H, T, Dv]
  const float* divisors;
  Rows dk, dv;
  float* dq;  // [chunks][B][H][T rounded up][D rounded up]
  double* dc;  // [chunks][B][H][degree + 1] or null
};

// weights and score gradients of HALF rows: A = phi(s), dS = phi'(s) dw, in the layouts that the three products want
template <class T> struct BackwardTiles {
  static constexpr int SIZE = ROWS * BACKWARD_KEYS;
  Buffer<T> weights = buffer<T>(SIZE), slopes = buffer<T>(SIZE), slopes_down = buffer<T>(SIZE);

  // row i of columns; `down`: pairs along the rows, which dV and dK sum over
  static T* down(Buffer<T>& x, int i, int j) {
    constexpr int PAIR = Tile<T>::PAIR;
    return &x[(i / PAIR) * BACKWARD_KEYS * PAIR + j * PAIR];
  }
};

template <class T, bool NORMALIZED, class F>
__attribute__((noinline)) void strip_gradients(const T* q, int depth, const T* key_panels, const T* g, int value_depth,
                                               const T* value_panels, int columns, const Problem& x, F phi,
                                               const int32_t* keep, const float* pull, BackwardTiles<T>& tiles, int row,
                                               vec* dc) {
  constexpr int PAIR = Tile<T>::PAIR;
  for (int j = 0; j < columns; j += PANEL) {
    vec s[HALF][2], dw[HALF][2];
    UNROLL for (int i = 0; i < HALF; i++) UNROLL for (int n = 0; n < 2; n++) s[i][n] = dw[i][n] = vec{};
    const T *keys = key_panels + (int64_t)j * depth, *values = value_panels + (int64_t)j * value_depth;
    bool both = false;
    if constexpr (HALF * 2 < 8 && PAIR == 1)
      if ((both = depth == value_depth)) multiply_both<HALF, 2>(s, q, keys, dw, g, values, depth, PANEL, depth);
    if (!both) {
      multiply<HALF, 2>(s, q, depth, 1, keys, PANEL, depth / PAIR);
      multiply<HALF, 2>(dw, g, value_depth, 1, values, PANEL, value_depth / PAIR);
    }
    UNROLL for (int i = 0; i < HALF; i++) UNROLL for (int n = 0; n < 2; n++) {
      vec score = s[i][n] * x.scaling, slope, grad = dw[i][n];
      mask_vec kept{};
      if (keep) {
        // before phi: what a masked key holds may make its slope infinite, and 0 times that is no number
        kept = *(const unaligned_mask*)(keep + i * BACKWARD_KEYS + j + n * LANES);
        score = select(kept, score);
      }
      vec w = phi.with_slope(score, slope);
      if constexpr (NORMALIZED) {
        vec p = broadcast(pull[i]);
        if (x.normalization == SUM) grad -= p;
        else if (x.normalization == L1) grad -= (vec)(((mask_vec)p ^ ((mask_vec)w & INT32_MIN)) & (w != 0));
        else grad -= p * w;
      }
      if (keep) w = select(kept, w), grad = select(kept, grad);
      if (dc) {
        vec term = grad;
        dc[0] += term;
        for (int k = 1; k <= phi.degree(); k++) dc[k] += term *= score;
      }
      s[i][n] = w;
      dw[i][n] = grad * slope;
    }
    UNROLL for (int i = 0; i < HALF; i++) UNROLL for (int n = 0; n < 2; n++) {
      int at = j + n * LANES;
      if constexpr (PAIR == 1) {
        store(&tiles.weights[(row + i) * BACKWARD_KEYS + at], s[i][n]);
        store(&tiles.slopes[(row + i) * BACKWARD_KEYS + at], dw[i][n]);
      } else {
        store_weights(&tiles.slopes[(row + i) * BACKWARD_KEYS + at], dw[i][n]);
        if (i % 2) {
          store_pairs(tiles.down(tiles.weights, row + i, at), s[i - 1][n], s[i][n]);
          store_pairs(tiles.down(tiles.slopes_down, row + i, at), dw[i - 1][n], dw[i][n]);
        }
      }
    }
  }
}

// How many parts the keys of one head are cut into, so that all threads have work: what grows is the memory of dQ.
int chunks_of_keys(const Problem& x) {
  int64_t threads = at::get_num_threads(), heads = (int64_t)x.B * x.Hk;
  int64_t wanted = heads >= threads ? (heads % threads && heads < 4 * threads ? 2 : 1) : 2 * ((threads + heads - 1) / heads);
  return std::max<int64_t>(1, std::min<int64_t>({wanted, x.S / (2 * BACKWARD_KEYS), 16}));
}

template <class U, class T, class F> void backward(const Problem& x, const Gradients& to, int chunks) {
  constexpr int PAIR = Tile<T>::PAIR;
  const int depth = up(x.D, LANES), value_depth = up(x.Dv, LANES), group = x.group(), rows = up(x.T, STRIP);
  const int chunk = up((x.S + chunks - 1) / chunks, BACKWARD_KEYS);
  share((int64_t)chunks * x.B * x.Hk, at::get_num_threads(), [&](auto next) {
    const int most = std::min<int64_t>(chunk, up(x.S, PANEL));
    auto keys = buffer<T>((int64_t)most * depth), key_panels = buffer<T>((int64_t)most * depth);
    auto value_panels = buffer<T>((int64_t)most * value_depth);
    auto q = buffer<T>((int64_t)rows * depth), g = buffer<T>((int64_t)rows * value_depth);
    Buffer<T> q_pairs, g_pairs;
    if (PAIR > 1) q_pairs = buffer<T>((int64_t)rows * depth), g_pairs = buffer<T>((int64_t)rows * value_depth);
    auto dk = buffer<float>((int64_t)most * depth), dv = buffer<float>((int64_t)most * value_depth);
    auto keep = buffer<int32_t>(HALF * BACKWARD_KEYS);
    std::vector<float> inverse(rows), pull(rows);
    std::vector<vec> dc(x.degree + 1);
    std::vector<Span> spans;
    BackwardTiles<T> tiles;
    for (int64_t item; (item = next()) < (int64_t)chunks * x.B * x.Hk;) {
      // the first keys first: under a causal mask most rows see them
      int head = item % x.Hk, b = item / x.Hk % x.B, part = item / x.Hk / x.B;
      int c0 = part * chunk, c1 = std::min(x.S, c0 + chunk), count = std::max(0, c1 - c0), padded = up(count, PANEL);
      if (!count) continue;
      pack_depth(x.k.at<U>(b, head, c0), x.k.row, count, padded, x.D, depth, keys.get());
      pack_panels(x.k.at<U>(b, head, c0), x.k.row, count, padded, x.D, depth, key_panels.get());
      pack_panels(x.v.at<U>(b, head, c0), x.v.row, count, padded, x.Dv, value_depth, value_panels.get());
      std::fill(dk.get(), dk.get() + (int64_t)padded * depth, 0.0f);
      std::fill(dv.get(), dv.get() + (int64_t)padded * value_depth, 0.0f);
      for (int h = head * group; h < (head + 1) * group; h++) {
        F phi = x.phi<F>(h);
        float gain = x.gain_of(h);
        for (int i = 0; i < x.T; i++) {
          float z = to.divisors[((int64_t)b * x.H + h) * x.T + i];
          inverse[i] = gain / z;
          if (!x.normalized()) continue;
          const U *grad = to.out_grad.at<U>(b, h, i), *out = to.out.at<U>(b, h, i);
          float along = 0;
#pragma omp simd reduction(+ : along)
          for (int d = 0; d < x.Dv; d++) along += widen(grad[d]) * widen(out[d]);
          pull[i] = along / (x.normalization == L2 ? z * z : z);
        }
        pack_rows(x.q.at<U>(b, h, 0), x.q.row, x.T, rows, x.D, depth, q.get());
        pack_rows(to.out_grad.at<U>(b, h, 0), to.out_grad.row, x.T, rows, x.Dv, value_depth, g.get(), inverse.data());
        const T *q_down = q.get(), *g_down = g.get();
        if constexpr (PAIR > 1) {
          pack_depth(q.get(), depth, rows, rows, depth, depth, q_pairs.get());
          pack_depth(g.get(), value_depth, rows, rows, value_depth, value_depth, g_pairs.get());
          q_down = q_pairs.get(), g_down = g_pairs.get();
        }
        int64_t of_head = ((int64_t)part * x.B + b) * x.H + h;
        float* dq = to.dq + of_head * rows * depth;
        std::fill(dc.begin(), dc.end(), vec{});
        double sums[17] = {};
        for (int i0 = 0; i0 < x.T; i0 += ROWS) {
          int i1 = std::min(x.T, i0 + ROWS), height = up(i1 - i0, STRIP);
          x.masks.spans(b, h, i0, i1, c0, c1, BACKWARD_KEYS, spans);
          for (const Span& span : spans) {
            int j0 = span.first, at = j0 - c0, columns = up(span.last - j0, PANEL);
            bool masked = span.partial || !x.masks.full(b, i0, i1, j0, j0 + columns);
            for (int s = 0; s < height; s += HALF) {
              int first = std::min(i0 + s, i1), last = std::min(i1, i0 + s + HALF);
              if (masked) {
                x.masks.write(b, h, first, last, j0, columns, span.partial, keep.get(), BACKWARD_KEYS);
                std::fill(&keep[(last - first) * BACKWARD_KEYS], &keep[HALF * BACKWARD_KEYS], 0);
              }
              auto strip = [&](auto normalized) {
                strip_gradients<T, decltype(normalized)::value>(
                    &q[(int64_t)(i0 + s) * depth], depth, &key_panels[(int64_t)at * depth],
                    &g[(int64_t)(i0 + s) * value_depth], value_depth, &value_panels[(int64_t)at * value_depth], columns, x,
                    phi, masked ? keep.get() : nullptr, pull.data() + i0 + s, tiles, s, to.dc ? dc.data() : nullptr);
              };
              x.normalized() ? strip(std::true_type()) : strip(std::false_type());
            }
            // rows past the end have dO = 0 and q = 0: they add nothing
            product(tiles.slopes.get(), BACKWARD_KEYS, 1, &keys[(int64_t)at * depth], depth, dq + (int64_t)i0 * depth, depth,
                    height, columns);
            product(tiles.weights.get(), PAIR, BACKWARD_KEYS, g_down + (int64_t)i0 * value_depth, value_depth,
                    &dv[(int64_t)at * value_depth], value_depth, columns, height);
            product((PAIR > 1 ? tiles.slopes_down : tiles.slopes).get(), PAIR, BACKWARD_KEYS, q_down + (int64_t)i0 * depth,
                    depth, &dk[(int64_t)at * depth], depth, columns, height);
          }
          for (int k = 0; to.dc && k <= x.degree; k++) sums[k] += add_lanes(dc[k]), dc[k] = vec{};
        }
        for (int k = 0; to.dc && k <= x.degree; k++) to.dc[of_head * (x.degree + 1) + k] = sums[k];
      }
      for (int j = 0; j < count; j++) {
        U *dk_row = to.dk.at<U>(b, head, c0 + j), *dv_row = to.dv.at<U>(b, head, c0 + j);
        for (int d = 0; d < x.D; d++) narrow(dk_row + d, dk[(int64_t)j * depth + d] * x.scaling);
        for (int d = 0; d < x.Dv; d++) narrow(dv_row + d, dv[(int64_t)j * value_depth + d]);
      }
    }
  });
}

// Sum of the chunks' dQ, times the scaling, in the caller's type.
template <class U> void gather_query_gradient(const Problem& x, const float* parts, int chunks, Rows dq) {
  const int depth = up(x.D, LANES), rows = up(x.T, STRIP), heads = x.B * x.H;
  at::parallel_for(0, (int64_t)heads * x.T, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      int head = row / x.T, i = row % x.T;
      U* to = dq.at<U>(head / x.H, head % x.H, i);
      for (int d = 0; d < x.D; d++) {
        float total = 0;
        for (int c = 0; c < chunks; c++) total += parts[(((int64_t)c * heads + head) * rows + i) * depth + d];
        narrow(to + d, total * x.scaling);
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------- registration

Problem problem_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& coefficients,
                   const std::optional<at::Tensor>& gain, int64_t degree, int64_t normalization, double constant,
                   double scaling, bool causal, int64_t window, const std::optional<at::Tensor>& lengths,
                   const std::optional<at::Tensor>& keep) {
  Problem x;
  x.B = q.size(0), x.H = q.size(1), x.Hk = k.size(1), x.T = q.size(2), x.S = k.size(2), x.D = q.size(3), x.Dv = v.size(3);
  x.degree = degree, x.normalization = (Normalization)normalization, x.constant = constant, x.scaling = scaling;
  TORCH_CHECK(degree >= 1 && degree <= 16, "degree must be 1 to 16, got ", degree);
  auto floats = [](const std::optional<at::Tensor>& t) {
    if (t) TORCH_CHECK(t->is_contiguous() && t->scalar_type() == at::kFloat, "coefficients and gain must be contiguous float32");
    return t ? t->data_ptr<float>() : nullptr;
  };
  x.coefficients = floats(coefficients), x.gain = floats(gain);
  x.q = rows_of(q), x.k = rows_of(k), x.v = rows_of(v);
  x.masks.T = x.T, x.masks.S = x.S, x.masks.causal = causal, x.masks.window = window;
  x.masks.lengths = lengths ? lengths->data_ptr<int64_t>() : nullptr;
  if (keep) {
    auto stride = [&](int dim) { return keep->size(dim) > 1 ? keep->stride(dim) : 0; };
    x.masks.keep = keep->data_ptr<bool>();
    x.masks.batch = stride(0), x.masks.head = stride(1), x.masks.row = stride(2), x.masks.key = stride(3);
    x.masks.batches = keep->size(0), x.masks.heads = keep->size(1);
  }
  return x;
}

// Calls work<U, T, F> for the caller's type, what it is computed in, and phi.
#define FOR_PHI(U, T, work) \
  if (x.coefficients) x.degree == 3 ? work(U(), T(), Phi<true, 3>()) : work(U(), T(), Phi<true, 0>()); \
  else if (x.degree == 2) work(U(), T(), Phi<false, 2>()); \
  else x.degree == 3 ? work(U(), T(), Phi<false, 3>()) : work(U(), T(), Phi<false, 0>());

template <class W> void dispatch(const Problem& x, at::ScalarType type, const W& work) {
  if (type == at::kFloat) {
    FOR_PHI(float, float, work)
  } else {
    TORCH_CHECK(type == at::kBFloat16, "the compiled CPU form knows float32 and bfloat16");
#ifdef __AVX512BF16__
    FOR_PHI(bf16, bf16, work)
#else
    FOR_PHI(bf16, float, work)
#endif
  }
}

// Empty [B, H, T, width], heads and rows in memory as the query's: its consumer wants it that way.
at::Tensor like(const at::Tensor& q, int64_t width) {
  if (q.stride(1) < q.stride(2)) return at::empty({q.size(0), q.size(2), q.size(1), width}, q.options()).transpose(1, 2);
  return at::empty({q.size(0), q.size(1), q.size(2), width}, q.options());
}

#define OPTIONS                                                                                                        \
  const std::optional<at::Tensor>&coefficients, const std::optional<at::Tensor>&gain, int64_t degree,                  \
      int64_t normalization, double constant, double scaling, bool causal, int64_t window,                             \
      const std::optional<at::Tensor>&lengths, const std::optional<at::Tensor>&keep
#define PASSED coefficients, gain, degree, normalization, constant, scaling, causal, window, lengths, keep

std::tuple<at::Tensor, at::Tensor> cpu_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, OPTIONS) {
  Problem x = problem_of(q, k, v, PASSED);
  if (x.T > DECODE_ROWS) x.masks.summarise();
  auto out = like(q, x.Dv), divisors = at::empty({x.B, x.H, x.T}, q.options().dtype(at::kFloat));
  Rows to = rows_of(out);
  dispatch(x, q.scalar_type(), [&]<class U, class T, class F>(U, T, F) {
    if (x.T <= DECODE_ROWS)
      decode<U, F>(x, to, divisors.data_ptr<float>());
    else
      forward<U, T, F>(x, to, divisors.data_ptr<float>());
  });
  return {out, divisors};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cpu_backward(const at::Tensor& grad, const at::Tensor& q,
                                                                        const at::Tensor& k, const at::Tensor& v,
                                                                        const at::Tensor& out, const at::Tensor& divisors,
                                                                        bool wants_coefficients, OPTIONS) {
  Problem x = problem_of(q, k, v, PASSED);
  x.masks.summarise();
  int chunks = chunks_of_keys(x);
  auto floats = q.options().dtype(at::kFloat);
  auto dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  auto parts = at::zeros({chunks, x.B, x.H, up(x.T, STRIP), up(x.D, LANES)}, floats);
  auto dc = wants_coefficients ? at::zeros({chunks, x.B, x.H, x.degree + 1}, floats.dtype(at::kDouble)) : at::Tensor();
  Gradients to{rows_of(grad), rows_of(out), divisors.data_ptr<float>(), rows_of(dk), rows_of(dv), parts.data_ptr<float>(),
               wants_coefficients ? dc.data_ptr<double>() : nullptr};
  dispatch(x, q.scalar_type(), [&]<class U, class T, class F>(U, T, F) {
    backward<U, T, F>(x, to, chunks);
    gather_query_gradient<U>(x, parts.data_ptr<float>(), chunks, rows_of(dq));
  });
  return {dq, dk, dv, wants_coefficients ? dc.sum({0, 1}).to(at::kFloat) : at::empty({0}, floats)};
}

// One row against all keys, without gradients: [B, H, 1, Dv]. The numbers of heads come as the model holds them, of any
// floating type: alpha, beta and gain [H], coefficients [H, p + 1], beside which `degree` is not read.
#define STEP_OPTIONS                                                                                                   \
  const std::optional<at::Tensor>&coefficients, const std::optional<at::Tensor>&alpha,                                 \
      const std::optional<at::Tensor>&beta, const std::optional<at::Tensor>&gain, int64_t degree,                      \
      int64_t normalization, double constant, double scaling, int64_t window, const std::optional<at::Tensor>&keep

std::vector<float> numbers(const std::optional<at::Tensor>& t, int64_t heads, const char* name) {
  std::vector<float> out;
  if (!t) return out;
  TORCH_CHECK_VALUE(t->dim() >= 1 && t->dim() <= 2 && t->size(0) == heads, name, " must have ", heads, " rows, got ", t->sizes());
  const int64_t width = t->dim() == 2 ? t->size(1) : 1, row = t->stride(0), step = t->dim() == 2 ? t->stride(1) : 0;
  out.reserve(heads * width);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t->scalar_type(), "cpu_step", [&] {
    const scalar_t* data = t->const_data_ptr<scalar_t>();
    for (int64_t h = 0; h < heads; h++)
      for (int64_t k = 0; k < width; k++) out.push_back((float)data[h * row + k * step]);
  });
  return out;
}

at::Tensor cpu_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, STEP_OPTIONS) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "expected query [B, H, 1, D], key [B, Hk, S, D], value [B, Hk, S, Dv]; got query ",
                    q.sizes(), ", key ", k.sizes(), ", value ", v.sizes());
  TORCH_CHECK_VALUE(q.size(2) == 1, "a step has one row, got ", q.size(2));
  TORCH_CHECK_VALUE(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) && q.size(0) == k.size(0) && q.size(3) == k.size(3),
                    "batch, key length, key heads and head_dim must agree; got query ", q.sizes(), ", key ", k.sizes(), ", value ", v.sizes());
  TORCH_CHECK_VALUE(k.size(1) && q.size(1) % k.size(1) == 0, "the number of query heads must be a multiple of the key heads; got query ",
                    q.sizes(), ", key ", k.sizes());
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "query, key and value must have one dtype");
  const int64_t heads = q.size(1);
  std::optional<at::Tensor> whole = keep;
  if (keep) {
    TORCH_CHECK_VALUE(keep->scalar_type() == at::kBool && keep->dim() <= 4, "keep must be bool, of four dimensions at most");
    while (whole->dim() < 4) whole = whole->unsqueeze(0);
    const int64_t full[] = {q.size(0), heads, 1, k.size(2)};
    for (int i = 0; i < 4; i++)
      TORCH_CHECK_VALUE(whole->size(i) == 1 || whole->size(i) == full[i], "keep ", keep->sizes(), " does not broadcast to [B, H, 1, S] = ", at::IntArrayRef(full));
  }
  auto rows = [](const at::Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); };
  const at::Tensor query = rows(q), key = rows(k), value = rows(v);
  const auto c = numbers(coefficients, heads, "coefficients"), a = numbers(alpha, heads, "alpha");
  const auto b = numbers(beta, heads, "beta"), g = numbers(gain, heads, "gain");
  Problem x = problem_of(query, key, value, std::nullopt, std::nullopt, coefficients ? coefficients->size(-1) - 1 : degree, normalization,
                         constant, scaling, false, window, std::nullopt, whole);
  auto there = [](const std::vector<float>& numbers) { return numbers.empty() ? nullptr : numbers.data(); };
  x.coefficients = there(c), x.alpha = there(a), x.beta = there(b), x.gain = there(g);
  auto out = at::empty({x.B, x.H, 1, x.Dv}, q.options());
  dispatch(x, q.scalar_type(), [&]<class U, class T, class F>(U, T, F) { decode<U, F>(x, rows_of(out), nullptr); });
  return out;
}

// A result without a derivative must not be taken for one with.
at::Tensor cpu_step_without_gradients(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, STEP_OPTIONS) {
  const std::optional<at::Tensor> given[] = {q, k, v, coefficients, alpha, beta, gain};
  for (const auto& t : given)
    TORCH_CHECK(!t || !((at::GradMode::is_enabled() && t->requires_grad()) || t->_fw_grad(0).defined()),
                "a step of the compiled form has no derivative: call polynomial_attention");
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("hf_polyattn::cpu_step", "").typed<decltype(cpu_step)>();
  return op.call(q, k, v, coefficients, alpha, beta, gain, degree, normalization, constant, scaling, window, keep);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hf_polyattn, m) {
  const char* options =
      "Tensor? coefficients, Tensor? gain, int degree, int normalization, float constant, float scaling, bool causal, "
      "int window, Tensor? lengths, Tensor? keep";
  m.def((std::string("cpu_forward(Tensor q, Tensor k, Tensor v, ") + options + ") -> (Tensor, Tensor)").c_str());
  m.def((std::string("cpu_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor divisors, "
                     "bool wants_coefficients, ") + options + ") -> (Tensor, Tensor, Tensor, Tensor)").c_str());
  m.def("cpu_step(Tensor q, Tensor k, Tensor v, Tensor? coefficients, Tensor? alpha, Tensor? beta, Tensor? gain, int degree, "
        "int normalization, float constant, float scaling, int window, Tensor? keep) -> Tensor");
}

TORCH_LIBRARY_IMPL(hf_polyattn, CPU, m) {
  m.impl("cpu_forward", &cpu_forward);
  m.impl("cpu_backward", &cpu_backward);
  m.impl("cpu_step", &cpu_step);
}

TORCH_LIBRARY_IMPL(hf_polyattn, Autograd, m) { m.impl("cpu_step", &cpu_step_without_gradients); }
