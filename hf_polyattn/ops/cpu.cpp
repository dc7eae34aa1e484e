// Polynomial attention on a CPU: the definition of naive.py in cache-sized tiles, with its gradients.
//
// Forward: a strip of a few queries meets a run of keys, S = Q K^T in registers, phi is applied before the strip is
// stored, and O += phi(S) V. No row needs its maximum first, so nothing is ever rescaled; Z divides once at the end.
// Backward: S and dO V^T are computed again, side by side in registers; dQ, dK, dV are three more products of tiles.
//
// One source, one build for each instruction set: the width of `vec` decides. 16-bit inputs are converted to fp32
// while they are packed, except where the processor multiplies bf16 itself (AVX512_BF16); sums are always fp32.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, STRIP = 12;  // 12 x 2 accumulators, 2 columns, 1 broadcast: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, STRIP = 6;  // 6 x 2 accumulators: 15 of 16 registers
#else
constexpr int LANES = 4, STRIP = 6;
#endif
constexpr int PANEL = 2 * LANES;                // keys that one pass of a strip covers
constexpr int HALF = STRIP / 2;                 // rows of a strip in the backward, which holds two products
constexpr int OUT = LANES == 16 ? 4 : 2;        // vectors of one row that a product of tiles covers
constexpr int CELL = 32;                        // keys for which a keep mask is summarised; a multiple of PANEL
constexpr int ROWS = 48;                        // queries for which it is; a multiple of STRIP
constexpr int FORWARD_ROWS = 96, FORWARD_KEYS = 256;
constexpr int BACKWARD_KEYS = 96;

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t mask_vec __attribute__((vector_size(LANES * 4)));
typedef float unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t unaligned_mask __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec load(const float* x) { return *(const unaligned*)x; }
INLINE void store(float* x, vec v) { *(unaligned*)x = v; }
INLINE vec broadcast(float x) { return x - vec{}; }
INLINE vec select(mask_vec keep, vec v) { return (vec)((mask_vec)v & keep); }
INLINE float add_lanes(vec v) {
  UNROLL for (int half = LANES / 2; half; half /= 2) {
    mask_vec order{};
    UNROLL for (int i = 0; i < LANES; i++) order[i] = (i + half) % LANES;
    v += __builtin_shuffle(v, order);
  }
  return v[0];
}

// lane l of the result is the sum of the lanes of v[l]: half the shuffles and adds of LANES times `add_lanes`, or less
INLINE vec add_lanes_of_each(vec (&v)[LANES]) {
  UNROLL for (int half = LANES / 2; half; half /= 2) {
    mask_vec own{}, other{};
    UNROLL for (int l = 0; l < LANES; l++) {
      int from = l & half ? LANES : 0;
      own[l] = from + l;
      other[l] = from + (l ^ half);
    }
    UNROLL for (int i = 0; i < half; i++)
      v[i] = __builtin_shuffle(v[i], v[i + half], own) + __builtin_shuffle(v[i], v[i + half], other);
  }
  return v[0];
}

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
INLINE vec load_wide(const float* x) { return load(x); }
INLINE vec load_wide(const bf16* x) {
  typedef bf16 narrow_vec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
  typedef uint32_t bits_vec __attribute__((vector_size(LANES * 4)));
  return (vec)(__builtin_convertvector(*(const narrow_vec*)x, bits_vec) << 16);
}
INLINE void narrow(float* to, float x) { *to = x; }
INLINE void narrow(bf16* to, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *to = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// What a tile is computed in: fp32, or bf16 where the processor has a product of pairs of it. PAIR: elements along the
// depth of a product that lie side by side in packed operands.
template <class T> struct Tile;
template <> struct Tile<float> { static constexpr int PAIR = 1; };
template <> struct Tile<bf16> { static constexpr int PAIR = 2; };

// acc[i][j] += sum_k a(i, k) b(k, j), a at a + i * row + k * step, b in rows of `width` elements, N vectors of it.
template <int R, int N>
INLINE void multiply(vec (&acc)[R][N], const float* a, long row, long step, const float* b, long width, int depth) {
  for (int k = 0; k < depth; k++) {
    vec columns[N];
    UNROLL for (int j = 0; j < N; j++) columns[j] = load(b + k * width + j * LANES);
    UNROLL for (int i = 0; i < R; i++) {
      vec x = broadcast(a[i * row + k * step]);
      UNROLL for (int j = 0; j < N; j++) acc[i][j] += x * columns[j];
    }
  }
}

INLINE void store_weights(float* x, vec v) { store(x, v); }

#ifdef __AVX512BF16__
// The same for pairs: depth, step and width count pairs.
template <int R, int N>
INLINE void multiply(vec (&acc)[R][N], const bf16* a, long row, long step, const bf16* b, long width, int depth) {
  for (int k = 0; k < depth; k++) {
    vec columns[N];
    UNROLL for (int j = 0; j < N; j++) columns[j] = load((const float*)(b + 2 * k * width) + j * LANES);
    UNROLL for (int i = 0; i < R; i++) {
      int32_t pair;
      memcpy(&pair, a + i * row + 2 * k * step, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      UNROLL for (int j = 0; j < N; j++)
        acc[i][j] = (vec)_mm512_dpbf16_ps((__m512)acc[i][j], x, (__m512bh)columns[j]);
    }
  }
}

INLINE __m256i rounded(vec v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
INLINE void store_weights(bf16* x, vec v) { _mm256_storeu_si256((__m256i*)x, rounded(v)); }
INLINE void store_pairs(bf16* x, vec even, vec odd) {
  __m512i low = _mm512_cvtepu16_epi32(rounded(even)), high = _mm512_cvtepu16_epi32(rounded(odd));
  _mm512_storeu_si512(x, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// ---------------------------------------------------------------------------------------------------------- phi

// phi(s) = s^degree, or sum_k c_k s^k. DEGREE 0: known at run time only.
template <bool COEFFICIENTS, int DEGREE> struct Phi {
  int runtime;
  const float* c;
  inline __attribute__((always_inline)) int degree() const { return DEGREE ? DEGREE : runtime; }
  inline __attribute__((always_inline)) vec operator()(vec s) const {
    if constexpr (COEFFICIENTS) {
      vec out = broadcast(c[degree()]);
      UNROLL for (int k = degree() - 1; k >= 0; k--) out = out * s + c[k];
      return out;
    } else {
      vec out = s;
      UNROLL for (int k = 1; k < degree(); k++) out *= s;
      return out;
    }
  }
  inline __attribute__((always_inline)) vec with_slope(vec s, vec& slope) const {
    if constexpr (COEFFICIENTS) {
      vec out = broadcast(c[degree()]);
      slope = vec{};
      UNROLL for (int k = degree() - 1; k >= 0; k--) {
        slope = slope * s + out;
        out = out * s + c[k];
      }
      return out;
    } else {
      vec lower = broadcast(1.0f);
      UNROLL for (int k = 1; k < degree(); k++) lower *= s;
      slope = lower * (float)degree();
      return lower * s;
    }
  }
};

// -------------------------------------------------------------------------------------------------- the problem

enum Normalization { SQRT_LENGTH, LENGTH, SUM, L1, L2, CONSTANT };

struct Rows {  // [B, heads, rows, width]: strides count elements, that of the last dimension is 1
  void* data;
  int64_t batch, head, row;
  template <class U> U* at(int64_t b, int64_t h, int64_t i) const { return (U*)data + b * batch + h * head + i * row; }
};

Rows rows_of(const at::Tensor& x) {
  TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1, "the last dimension must be contiguous");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

struct Span {  // keys [first, last), some of them masked or none
  int first, last;
  bool partial;
};

// Which keys row i of batch b may attend to: those of [low, high) that the keep mask names. Both rise with i.
struct Masks {
  int T, S, window;
  bool causal;
  const int64_t* lengths = nullptr;  // [B]: keys from there on are padding
  const bool* keep = nullptr;                         // strides 0 where it is broadcast
  int64_t batch = 0, head = 0, row = 0, key = 0;
  std::vector<uint8_t> summary;  // [B or 1][H or 1][blocks of ROWS][cells]: 0 nobody attends, 1 some, 2 all to all
  int batches = 0, heads = 0, blocks = 0, cells = 0;

  int low(int i) const {
    return window ? std::max(0, i + S - T - window + 1) : 0;
  }
  int high(int b, int i) const {
    int out = lengths ? std::min<int64_t>(S, lengths[b]) : S;
    if (causal) out = std::min(out, i + S - T + 1);
    if (window) out = std::min(out, i + S - T + window);
    return out;
  }
  const bool* kept(int b, int h, int i) const { return keep + b * batch + h * head + i * row; }

  void summarise() {
    cells = (S + CELL - 1) / CELL;
    blocks = row ? (T + ROWS - 1) / ROWS : 1;
    summary.resize((size_t)batches * heads * blocks * cells);
    at::parallel_for(0, batches * heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t x = begin; x < end; x++) {
        int i0 = x % blocks * ROWS, i1 = row ? std::min(T, i0 + ROWS) : 1;
        int b = x / blocks / heads, h = x / blocks % heads;
        for (int cell = 0; cell < cells; cell++) {
          int first = cell * CELL, last = std::min(S, first + CELL), count = 0;
          for (int i = i0; i < i1; i++)
            for (int j = first; j < last; j++) count += kept(b, h, i)[j * key];
          summary[x * cells + cell] = count == 0 ? 0 : count == (i1 - i0) * (last - first) ? 2 : 1;
        }
      }
    });
  }

  // Runs of at most `most` keys that some row of [i0, i1) attends to.
  void spans(int b, int h, int i0, int i1, int from, int to, int most, std::vector<Span>& out) const {
    out.clear();
    int first = std::max(from, low(i0)) / PANEL * PANEL, last = std::min(to, high(b, i1 - 1));
    if (!keep) {
      for (int j = first; j < last; j += most) out.push_back({j, std::min(last, j + most), false});
      return;
    }
    const uint8_t* base = &summary[((size_t)(batches > 1 ? b : 0) * heads + (heads > 1 ? h : 0)) * blocks * cells];
    for (int cell = first / CELL; cell * CELL < last; cell++) {
      bool some = false, all = true;
      for (int block = i0 / ROWS; block <= (i1 - 1) / ROWS; block++) {
        uint8_t seen = base[(blocks > 1 ? block : 0) * cells + cell];
        some |= seen > 0;
        all &= seen == 2;
      }
      if (!some) continue;
      int j0 = std::max(first, cell * CELL), j1 = std::min(last, (cell + 1) * CELL);
      if (!out.empty() && out.back().last == j0 && out.back().partial == !all && j1 - out.back().first <= most)
        out.back().last = j1;
      else
        out.push_back({j0, j1, !all});
    }
  }

  bool full(int b, int i0, int i1, int j0, int j1) const { return low(i1 - 1) <= j0 && high(b, i0) >= j1; }

  // Lanes of the masked keys become 0, those of the others all ones: [i1 - i0][columns], `stride` apart.
  void write(int b, int h, int i0, int i1, int j0, int columns, bool partial, int32_t* out, int stride) const {
    for (int i = i0; i < i1; i++, out += stride) {
      int first = std::clamp(low(i) - j0, 0, columns), last = std::clamp(high(b, i) - j0, first, columns);
      std::fill(out, out + first, 0);
      std::fill(out + first, out + last, -1);
      std::fill(out + last, out + columns, 0);
      if (!partial) continue;
      const bool* row_keep = kept(b, h, i) + j0 * key;
      if (key == 1)
        for (int j = first; j < last; j++) out[j] = -(int32_t)row_keep[j];
      else
        for (int j = first; j < last; j++) out[j] = -(int32_t)row_keep[j * key];
    }
  }

  int length(int b, int h, int i) const {
    int first = low(i), last = high(b, i), count = 0;
    if (!keep) return std::max(0, last - first);
    const bool* row_keep = kept(b, h, i);
    if (key == 1)
      for (int j = first; j < last; j++) count += row_keep[j];
    else
      for (int j = first; j < last; j++) count += row_keep[j * key];
    return count;
  }
};

struct Problem {
  int B, H, Hk, T, S, D, Dv, degree;
  Normalization normalization;
  float constant, scaling;
  const float* coefficients;  // [H][degree + 1], null for s^degree
  const float* gain;          // [H], null for 1
  Masks masks;
  Rows q, k, v;

  int group() const { return H / Hk; }
  bool normalized() const { return normalization == SUM || normalization == L1 || normalization == L2; }
  template <class F> F phi(int h) const { return {degree, coefficients ? coefficients + h * (degree + 1) : nullptr}; }
  float gain_of(int h) const { return gain ? gain[h] : 1; }
  // Z of a row from sum phi, sum |phi| or sum phi^2.
  float divisor(int b, int h, int i, float total) const {
    constexpr float eps = 1e-6f;
    switch (normalization) {
      case SQRT_LENGTH: return std::sqrt((float)std::max(1, masks.length(b, h, i)));
      case LENGTH: return (float)std::max(1, masks.length(b, h, i));
      case SUM: case L1: return eps + total;
      case L2: return std::sqrt(eps + total);
      default: return constant;
    }
  }
};

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Free { void operator()(void* x) const { free(x); } };
template <class T> using Buffer = std::unique_ptr<T[], Free>;
template <class T> Buffer<T> buffer(int64_t count) {
  void* out = nullptr;
  // a panel more than asked for, so that whole vectors may be read past the end
  TORCH_CHECK(!posix_memalign(&out, 64, up((count + 4 * LANES) * sizeof(T), 64)), "out of memory");
  return Buffer<T>((T*)out);
}

// Items of different cost, each done by whichever thread is free; what an item writes belongs to it alone.
template <class F> void share(int64_t items, const F& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(items, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) work([&] { return next++; });
  });
}

// ------------------------------------------------------------------------------------------------------ packing

// rows [count, width] -> the same, `to` elements apart, zeros around them; each row times scale[i] where given
template <class U, class T> void pack_rows(const U* x, int64_t row, int count, int padded, int width, int to, T* out,
                                           const float* scale = nullptr) {
  for (int i = 0; i < padded; i++, out += to) {
    int filled = i < count ? width : 0;
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

// weights [STRIP][columns] = phi(scaling * Q K^T), masked
template <class T, class F>
__attribute__((noinline)) void strip_weights(const T* q, int depth, const T* panels, int columns, float scaling, F phi,
                                             const int32_t* keep, T* weights) {
  for (int j = 0; j < columns; j += PANEL) {
    vec acc[STRIP][2];
    UNROLL for (int i = 0; i < STRIP; i++) acc[i][0] = acc[i][1] = vec{};
    multiply<STRIP, 2>(acc, q, depth, 1, panels + (int64_t)j * depth, PANEL, depth / Tile<T>::PAIR);
    UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int n = 0; n < 2; n++) {
      vec w = phi(acc[i][n] * scaling);
      int at = i * FORWARD_KEYS + j + n * LANES;
      if (keep) w = select(*(const unaligned_mask*)(keep + at), w);
      store_weights(weights + at, w);
    }
  }
}

template <class T> float statistic(const T* weights, int columns, Normalization normalization) {
  float total = 0;
  for (int j = 0; j < columns; j++) {
    float w = widen(weights[j]);
    total += normalization == SUM ? w : normalization == L1 ? std::abs(w) : w * w;
  }
  return total;
}

template <class U, class T, class F> void forward(const Problem& x, Rows out, float* divisors) {
  const int depth = up(x.D, 2), width = up(x.Dv, LANES), keys = up(x.S, PANEL), group = x.group();
  auto panels = buffer<T>((int64_t)x.B * x.Hk * keys * depth);
  auto values = buffer<T>((int64_t)x.B * x.Hk * keys * width);
  at::parallel_for(0, x.B * x.Hk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; h++) {
      int b = h / x.Hk, head = h % x.Hk;
      pack_panels(x.k.at<U>(b, head, 0), x.k.row, x.S, keys, x.D, depth, &panels[h * keys * depth]);
      pack_depth(x.v.at<U>(b, head, 0), x.v.row, x.S, keys, x.Dv, width, &values[h * keys * width]);
    }
  });
  const int blocks = (x.T + FORWARD_ROWS - 1) / FORWARD_ROWS;
  share((int64_t)x.B * x.H * blocks, [&](auto next) {
    auto q = buffer<T>(FORWARD_ROWS * depth), weights = buffer<T>(STRIP * FORWARD_KEYS);
    auto o = buffer<float>(FORWARD_ROWS * width);
    auto keep = buffer<int32_t>(STRIP * FORWARD_KEYS);
    float total[FORWARD_ROWS];
    std::vector<Span> spans;
    for (int64_t item; (item = next()) < (int64_t)x.B * x.H * blocks;) {
      // the last rows first: under a causal mask they are the longest
      int h = item % x.H, b = item / x.H % x.B, i0 = (blocks - 1 - item / x.H / x.B) * FORWARD_ROWS;
      int rows = std::min(FORWARD_ROWS, x.T - i0), padded = up(rows, STRIP);
      int64_t shared = (int64_t)b * x.Hk + h / group;
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
          strip_weights(&q[s * depth], depth, &panels[(shared * keys + j0) * depth], columns, x.scaling, phi,
                        masked ? keep.get() : nullptr, weights.get());
          if (x.normalized())
            for (int i = first; i < last; i++)
              total[i - i0] += statistic(&weights[(i - first) * FORWARD_KEYS], columns, x.normalization);
          product(weights.get(), FORWARD_KEYS, 1, &values[(shared * keys + j0) * width], width, &o[s * width], width,
                  STRIP, columns);
        }
      }
      for (int i = 0; i < rows; i++) {
        float z = x.divisor(b, h, i0 + i, total[i]);
        divisors[((int64_t)b * x.H + h) * x.T + i0 + i] = z;
        U* to = out.at<U>(b, h, i0 + i);
        for (int d = 0; d < x.Dv; d++) narrow(to + d, o[i * width + d] * (gain / z));
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------------- decode

constexpr int DECODE_ROWS = 8;   // as many queries at most; more are worth packing the keys for
constexpr int AHEAD = 64;        // keys for which memory is asked before they are read
constexpr int DECODE_KEYS = 64;  // whose keys and values stay in the first cache

// Asks the second cache for rows of keys or values. Rows of other heads lie between those of one in some layouts, often
// a page apart, where the processor does not look ahead by itself; where rows adjoin, it does so too late for a cache
// that lies in memory.
template <class U> INLINE void fetch(const U* row, int64_t stride, int width) {
  UNROLL for (int n = 0; n < LANES; n++)
    for (int d = 0; d < width; d += 64 / sizeof(U)) __builtin_prefetch(row + n * stride + d, 0, 2);
}

// q . k of one query and LANES keys: their sums do not wait for one another, and end in one vector. DEPTH 0: known at
// run time only.
template <int DEPTH, class U> INLINE vec dots(const float* q, const U* keys, int64_t row, int depth) {
  vec sums[LANES] = {};
  UNROLL for (int d = 0; d < (DEPTH ? DEPTH : depth); d += LANES) {
    vec here = load(q + d);
    UNROLL for (int n = 0; n < LANES; n++) sums[n] += load_wide(keys + n * row + d) * here;
  }
  return add_lanes_of_each(sums);
}

// A few queries against many keys: every key and value is read once, where it lies, for all heads that share it.
// Long caches are cut into chunks, so that all threads have work; their sums are added at the end.
template <class U, class F> void decode(const Problem& x, Rows out, float* divisors) {
  const int depth = up(x.D, LANES), width = up(x.Dv, LANES), group = x.group(), rows = group * x.T;
  const int64_t heads = (int64_t)x.B * x.Hk, threads = at::get_num_threads();
  const int chunks = std::max<int64_t>(1, std::min<int64_t>(x.S / 256, heads >= threads ? 1 : 2 * threads / heads));
  const int chunk = up((x.S + chunks - 1) / chunks, DECODE_KEYS);
  auto parts = buffer<float>(chunks * heads * rows * width), totals = buffer<float>(chunks * heads * rows);
  std::fill(parts.get(), parts.get() + chunks * heads * rows * width, 0.0f);
  std::fill(totals.get(), totals.get() + chunks * heads * rows, 0.0f);
  share(chunks * heads, [&](auto next) {
    auto q = buffer<float>(rows * depth), weights = buffer<float>(rows * DECODE_KEYS);
    auto line = buffer<U>(std::max(depth, width));
    auto keep = buffer<int32_t>(DECODE_KEYS);
    for (int64_t item; (item = next()) < chunks * heads;) {
      int head = item % x.Hk, b = item / x.Hk % x.B, part = item / heads;
      float *o = &parts[item * rows * width], *total = &totals[item * rows];
      for (int r = 0; r < rows; r++)
        pack_rows(x.q.at<U>(b, head * group + r / x.T, r % x.T), 0, 1, 1, x.D, depth, &q[r * depth]);
      int from = std::max(part * chunk, x.masks.low(0)), to = std::min((part + 1) * chunk, x.masks.high(b, x.T - 1));
      for (int j0 = from; j0 < to; j0 += DECODE_KEYS) {
        int count = std::min(DECODE_KEYS, to - j0), padded = up(count, LANES);
        int j = 0;
        for (; depth == x.D && j + LANES <= count; j += LANES) {
          const U* key = x.k.at<U>(b, head, j0 + j);
          fetch(key + AHEAD * x.k.row, x.k.row, x.D);
          fetch(x.v.at<U>(b, head, j0 + j) + AHEAD * x.v.row, x.v.row, x.Dv);
          for (int r = 0; r < rows; r++) {
            const float* query = &q[r * depth];
            store(&weights[r * DECODE_KEYS + j],
                  depth == 64 ? dots<64>(query, key, x.k.row, depth) : dots<0>(query, key, x.k.row, depth));
          }
        }
        for (; j < count; j++) {
          pack_rows(x.k.at<U>(b, head, j0 + j), 0, 1, 1, x.D, depth, line.get());
          for (int r = 0; r < rows; r++) {
            vec sum{};
            for (int d = 0; d < depth; d += LANES) sum += load_wide(&line[d]) * load(&q[r * depth + d]);
            weights[r * DECODE_KEYS + j] = add_lanes(sum);
          }
        }
        for (int r = 0; r < rows; r++) {
          int h = head * group + r / x.T, i = r % x.T;
          float* w = &weights[r * DECODE_KEYS];
          F phi = x.phi<F>(h);
          std::fill(w + count, w + padded, 0.0f);
          x.masks.write(b, h, i, i + 1, j0, padded, x.masks.keep, keep.get(), DECODE_KEYS);
          for (int j = 0; j < padded; j += LANES)
            store(w + j, select(*(const unaligned_mask*)&keep[j], phi(load(w + j) * x.scaling)));
          if (x.normalized()) total[r] += statistic(w, count, x.normalization);
        }
        int d = 0;
        for (; d + 4 * LANES <= x.Dv; d += 4 * LANES) {
          const U* values = x.v.at<U>(b, head, j0) + d;
          for (int r = 0; r < rows; r++) {
            // even and odd keys apart: a sum that waits for itself alone takes twice the time
            vec sum[4], odd[4] = {};
            UNROLL for (int n = 0; n < 4; n++) sum[n] = load(&o[r * width + d + n * LANES]);
            const float* w = &weights[r * DECODE_KEYS];
            int j = 0;
            for (; j + 2 <= count; j += 2) {
              const U* value = values + j * x.v.row;
              UNROLL for (int n = 0; n < 4; n++) sum[n] += load_wide(value + n * LANES) * w[j];
              UNROLL for (int n = 0; n < 4; n++) odd[n] += load_wide(value + x.v.row + n * LANES) * w[j + 1];
            }
            if (j < count) UNROLL for (int n = 0; n < 4; n++) sum[n] += load_wide(values + j * x.v.row + n * LANES) * w[j];
            UNROLL for (int n = 0; n < 4; n++) store(&o[r * width + d + n * LANES], sum[n] + odd[n]);
          }
        }
        for (; d < x.Dv; d += LANES) {
          for (int r = 0; r < rows; r++) {
            vec sum = load(&o[r * width + d]);
            for (int j = 0; j < count; j++) {
              const U* value = x.v.at<U>(b, head, j0 + j) + d;
              if (d + LANES > x.Dv) pack_rows(value, 0, 1, 1, x.Dv - d, LANES, line.get()), value = line.get();
              sum += load_wide(value) * weights[r * DECODE_KEYS + j];
            }
            store(&o[r * width + d], sum);
          }
        }
      }
    }
  });
  for (int64_t row = 0; row < heads * rows; row++) {
    int r = row % rows, head = row / rows % x.Hk, b = row / rows / x.Hk, h = head * group + r / x.T, i = r % x.T;
    float total = 0;
    for (int c = 0; c < chunks; c++) total += totals[c * heads * rows + row];
    float z = x.divisor(b, h, i, total);
    divisors[((int64_t)b * x.H + h) * x.T + i] = z;
    U* to = out.at<U>(b, h, i);
    for (int d = 0; d < x.Dv; d++) {
      float sum = 0;
      for (int c = 0; c < chunks; c++) sum += parts[(c * heads * rows + row) * width + d];
      narrow(to + d, sum * (x.gain_of(h) / z));
    }
  }
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
    multiply<HALF, 2>(s, q, depth, 1, key_panels + (int64_t)j * depth, PANEL, depth / PAIR);
    multiply<HALF, 2>(dw, g, value_depth, 1, value_panels + (int64_t)j * value_depth, PANEL, value_depth / PAIR);
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
        else if (x.normalization == L1) grad -= (vec)((mask_vec)p & (w != 0)) * (vec)(((mask_vec)w & INT32_MIN) | (mask_vec)broadcast(1.0f));
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
  share((int64_t)chunks * x.B * x.Hk, [&](auto next) {
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
    x.masks.summarise();
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(hf_polyattn, m) {
  const char* options =
      "Tensor? coefficients, Tensor? gain, int degree, int normalization, float constant, float scaling, bool causal, "
      "int window, Tensor? lengths, Tensor? keep";
  m.def((std::string("cpu_forward(Tensor q, Tensor k, Tensor v, ") + options + ") -> (Tensor, Tensor)").c_str());
  m.def((std::string("cpu_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor divisors, "
                     "bool wants_coefficients, ") + options + ") -> (Tensor, Tensor, Tensor, Tensor)").c_str());
}

TORCH_LIBRARY_IMPL(hf_polyattn, CPU, m) {
  m.impl("cpu_forward", &cpu_forward);
  m.impl("cpu_backward", &cpu_backward);
}
