// What the kernels share: vectors of the widest registers, phi, masks, and the problem itself.
//
// One source, one build for each instruction set: the width of `vec` decides.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
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

// Two products of a few rows side by side: one alone has too few sums under way to hide how long an addition takes.
template <int R, int N>
INLINE void multiply_both(vec (&acc)[R][N], const float* a, const float* b, vec (&other)[R][N], const float* c,
                          const float* d, long row, long width, int depth) {
  for (int k = 0; k < depth; k++) {
    multiply<R, N>(acc, a + k, row, 1, b + k * width, width, 1);
    multiply<R, N>(other, c + k, row, 1, d + k * width, width, 1);
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

  int length(int b, int h, int i) const { return count(b, h, i, 0, S); }

  // Keys of [from, to) that row i attends to.
  int count(int b, int h, int i, int from, int to) const {
    int first = std::max(from, low(i)), last = std::min(to, high(b, i)), count = 0;
    if (!keep) return std::max(0, last - first);
    const bool* row_keep = kept(b, h, i);
    int j = first;
    // eight bytes at a time: their sum ends in the highest one of the product
    for (uint64_t eight; key == 1 && j + 8 <= last; j += 8) memcpy(&eight, row_keep + j, 8), count += eight * 0x0101010101010101u >> 56;
    for (; j < last; j++) count += row_keep[j * key];
    return count;
  }
};

struct Problem {
  int B, H, Hk, T, S, D, Dv, degree;
  Normalization normalization;
  float constant, scaling;
  const float* coefficients;  // [H][degree + 1], null for s^degree
  const float* gain;          // [H], null for 1
  const float *alpha = nullptr, *beta = nullptr;  // [H]: of an affine score, in decoding steps; elsewhere in the coefficients
  Masks masks;
  Rows q, k, v;

  int group() const { return H / Hk; }
  bool normalized() const { return normalization == SUM || normalization == L1 || normalization == L2; }
  template <class F> F phi(int h) const { return {degree, coefficients ? coefficients + h * (degree + 1) : nullptr}; }
  float gain_of(int h) const { return gain ? gain[h] : 1; }
  float slope(int h) const { return scaling * (alpha ? alpha[h] : 1); }
  float shift(int h) const { return beta ? beta[h] : 0; }
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
template <class F> void share(int64_t items, int64_t threads, const F& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(items, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) work([&] { return next++; });
  });
}

// A row's part of the statistic that its divisor depends on: sum phi, sum |phi| or sum phi^2.
INLINE vec statistic(vec w, Normalization normalization) {
  return normalization == SUM ? w : normalization == L1 ? (vec)((mask_vec)w & INT32_MAX) : w * w;
}
// In vectors: a compiler may not change the order of a sum by itself.
INLINE float statistic(const float* weights, int columns, Normalization normalization) {
  vec some{};
  int j = 0;
  for (; j + LANES <= columns; j += LANES) some += statistic(load(weights + j), normalization);
  float total = add_lanes(some);
  for (; j < columns; j++) total += statistic(broadcast(weights[j]), normalization)[0];
  return total;
}

}  // namespace
