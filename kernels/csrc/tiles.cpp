// See tiles.h. CMake compiles this file once per instruction set, with -DCPU_CAPABILITY and its flags; at::vec takes
// its vector type from that. Contraction of a * b + c is off (CMakeLists.txt): products are fused where fmadd says so.

#include "tiles.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace stepkto {
namespace CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;
using Int = at::vec::Vectorized<int32_t>;
using at::vec::fmadd;

constexpr int64_t W = Vec::size();
constexpr float INFINITE = std::numeric_limits<float>::infinity(), NO_MASS = -INFINITE;
constexpr float LOWEST = -1e30f;  // for a log-probability of -inf where it is multiplied by its probability, 0
static_assert(LANES % W == 0);

Vec load(const float* x) { return Vec::loadu(x); }

Int bits(const Vec& x) { return at::vec::cast<int32_t>(x); }
Vec from_bits(const Int& x) { return at::vec::cast<float>(x); }

// x * 2^n for whole n; 0 below 2^-126
Vec scaled(const Vec& x, const Vec& n) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(x, n);
#else
  const Int exponent = at::vec::convert_to_int_of_same_size(n) + Int(127);
  return Vec::blendv(x * from_bits(exponent << Int(23)), Vec(0.0f), n < Vec(-126.0f));
#endif
}

// Cody and Waite's reduction, Cephes' polynomial: within 2 units in the last place; for x below 88
Vec exp(const Vec& x) {
  const Vec clamped = at::vec::maximum(x, Vec(-110.0f));  // its exponential is 0; NaN stays NaN
  const Vec n = (clamped * Vec(1.44269504f)).round();
  Vec r = fmadd(n, Vec(-0.693359375f), clamped);
  r = fmadd(n, Vec(2.12194440e-4f), r);
  Vec p = fmadd(Vec(1.9875691500e-4f), r, Vec(1.3981999507e-3f));
  p = fmadd(p, r, Vec(8.3334519073e-3f));
  p = fmadd(p, r, Vec(4.1665795894e-2f));
  p = fmadd(p, r, Vec(1.6666665459e-1f));
  p = fmadd(p, r, Vec(5.0000001201e-1f));
  return scaled(fmadd(p, r * r, r + Vec(1.0f)), n);
}

// Cephes: within 2 units in the last place; for positive normal numbers
Vec log(const Vec& x) {
  const Int b = bits(x);
  Vec e = at::vec::convert_to_fp_of_same_size<float>((b >> Int(23)) - Int(126));
  Vec m = from_bits((b & Int(0x007fffff)) | Int(0x3f000000));  // [0.5, 1)
  const Vec small = m < Vec(0.70710678f);
  e = Vec::blendv(e, e - Vec(1.0f), small);
  m = Vec::blendv(m, m + m, small) - Vec(1.0f);
  const Vec s = m * m;
  Vec p = fmadd(Vec(7.0376836292e-2f), m, Vec(-1.1514610310e-1f));
  p = fmadd(p, m, Vec(1.1676998740e-1f));
  p = fmadd(p, m, Vec(-1.2420140846e-1f));
  p = fmadd(p, m, Vec(1.4249322787e-1f));
  p = fmadd(p, m, Vec(-1.6668057665e-1f));
  p = fmadd(p, m, Vec(2.0000714765e-1f));
  p = fmadd(p, m, Vec(-2.4999993993e-1f));
  p = fmadd(p, m, Vec(3.3333331174e-1f));
  Vec y = p * m * s;
  y = fmadd(e, Vec(-2.12194440e-4f), y);
  y = fmadd(s, Vec(-0.5f), y);
  return fmadd(e, Vec(0.693359375f), m + y);
}

// relative error below 1e-6, also near 0, where 1 - 2 / (exp(2x) + 1) would cancel
Vec tanh(const Vec& x) {
  const Vec e = exp(x.abs() * Vec(-2.0f)), one(1.0f), s = x * x;
  const Vec large = (one - e) / (one + e);
  Vec series = fmadd(s, Vec(62.0f / 2835), Vec(-17.0f / 315));
  series = fmadd(series, s, Vec(2.0f / 15));
  series = fmadd(series, s, Vec(-1.0f / 3));
  const Vec small = x.abs() * fmadd(series, s, one);
  const Vec magnitude = Vec::blendv(large, small, s < Vec(0.04f));
  return Vec::blendv(magnitude, magnitude.neg(), x < Vec(0.0f));
}

// log of a sum of exponentials >= 1, or 0 of nothing
Vec log_or_no_mass(const Vec& s) { return Vec::blendv(log(s), Vec(NO_MASS), s == Vec(0.0f)); }

Vec finite(const Vec& x) { return Vec::blendv(x, Vec(0.0f), x == Vec(NO_MASS)); }

void logits(float* z, int64_t rows, int64_t columns, const float* bias, Head head) {
  for (int64_t v = 0; v < rows; ++v) {
    const Vec b(bias ? bias[v] : 0.0f);
    for (int64_t n = 0; n < columns; n += W) {
      const Vec x = load(z + v * columns + n) + b;
      const Vec out = head.capped ? Vec(head.cap_out) * tanh(x * Vec(head.cap_in)) : x * Vec(head.slope);
      out.store(z + v * columns + n);
    }
  }
}

Vec column_max(const float* z, int64_t rows, int64_t columns) {
  Vec m(NO_MASS);
  for (int64_t v = 0; v < rows; ++v) m = at::vec::maximum(m, load(z + v * columns));  // NaN stays NaN
  return m;
}

void log_sum_exp(const float* z, int64_t rows, int64_t columns, float* lse, float* entropy) {
  for (int64_t n = 0; n < columns; n += W) {
    const Vec m = finite(column_max(z + n, rows, columns));
    Vec s(0.0f), u(0.0f);
    for (int64_t v = 0; v < rows; ++v) {
      const Vec x = load(z + v * columns + n) - m, e = exp(x);
      s = s + e;
      if (entropy) u = u + Vec::blendv(e * x, Vec(0.0f), e == Vec(0.0f));
    }
    const Vec log_s = log_or_no_mass(s);
    Vec::blendv(m + log_s, m, m == Vec(INFINITE)).store(lse + n);
    if (entropy) Vec::blendv(log_s - u / s, Vec(0.0f), s == Vec(0.0f)).store(entropy + n);
  }
}

void collisions(const float* z, int64_t rows, int64_t columns, const float* lse, float* sum_sq, float* largest) {
  for (int64_t n = 0; n < columns; n += W) {
    const Vec l = finite(load(lse + n));
    Vec m(NO_MASS), s(0.0f);
    for (int64_t v = 0; v < rows; ++v) {
      const Vec x = load(z + v * columns + n), q = exp(x - l);
      m = at::vec::maximum(m, x);
      s = fmadd(q, q, s);
    }
    s.store(sum_sq + n);
    m.store(largest + n);
  }
}

void sums(const float* z, int64_t rows, int64_t columns, float* sum) {
  for (int64_t n = 0; n < columns; n += W) {
    Vec s(0.0f);
    for (int64_t v = 0; v < rows; ++v) s = s + load(z + v * columns + n);
    s.store(sum + n);
  }
}

void kl(const float* z, const float* y, int64_t rows, int64_t columns, float* lse, float* ref_lse, float* out) {
  for (int64_t n = 0; n < columns; n += W) {
    const Vec m = finite(column_max(z + n, rows, columns)), ref_m = finite(column_max(y + n, rows, columns));
    Vec s(0.0f), ref_s(0.0f);
    for (int64_t v = 0; v < rows; ++v) {
      s = s + exp(load(z + v * columns + n) - m);
      ref_s = ref_s + exp(load(y + v * columns + n) - ref_m);
    }
    const Vec l = m + log_or_no_mass(s), ref_l = ref_m + log_or_no_mass(ref_s);
    const Vec offset = finite(l) - finite(ref_l);
    Vec sum(0.0f);  // a second pass: subtracted first, the two logits do not cancel in the sum
    for (int64_t v = 0; v < rows; ++v) {
      const Vec a = load(z + v * columns + n), b = load(y + v * columns + n);
      const Vec term = exp(a - finite(l)) * ((a - b) - offset);
      sum = sum + Vec::blendv(term, Vec(0.0f), a == Vec(NO_MASS));
    }
    l.store(lse + n);
    ref_l.store(ref_lse + n);
    sum.store(out + n);
  }
}

void gradients(float* z, int64_t rows, int64_t columns, const float* lse, const float* grad_logp,
               const float* grad_entropy, const float* entropy, Head head) {
  const Vec to_tanh(head.capped ? 1.0f / head.cap_out : 0.0f), one(1.0f);
  for (int64_t n = 0; n < columns; n += W) {
    const Vec l = load(lse + n), g = load(grad_logp + n);
    const Vec g_H = grad_entropy ? load(grad_entropy + n) : Vec(0.0f), H = grad_entropy ? load(entropy + n) : Vec(0.0f);
    for (int64_t v = 0; v < rows; ++v) {
      float* at = z + v * columns + n;
      const Vec x = load(at), log_p = x - l;
      Vec d = exp(log_p) * (grad_entropy ? fmadd(g_H, at::vec::maximum(log_p, Vec(LOWEST)) + H, g) : g).neg();
      if (head.capped) {
        const Vec t = x * to_tanh;
        d = d * (one - t * t);
      }
      d.store(at);
    }
  }
}

void reduce_tiles(const float* tile_lse, int64_t T, int64_t stride, int64_t count, float* max, float* sum) {
  for (int64_t n = 0; n < count; n += W) {
    const int64_t some = std::min(W, count - n);
    Vec m(NO_MASS), s(0.0f);
    for (int64_t t = 0; t < T; ++t) m = at::vec::maximum(m, Vec::loadu(tile_lse + t * stride + n, some));
    m = finite(m);
    for (int64_t t = 0; t < T; ++t) s = s + exp(Vec::loadu(tile_lse + t * stride + n, some) - m);
    m.store(max + n, some);
    Vec::blendv(s, Vec(1.0f), m == Vec(INFINITE)).store(sum + n, some);
  }
}

void mean_over_tiles(const float* tile_lse, const float* ref_tile_lse, const float* within, int64_t T, int64_t stride,
                     int64_t count, const float* lse, const float* ref_lse, float* mean) {
  for (int64_t n = 0; n < count; n += W) {
    const int64_t some = std::min(W, count - n);
    const Vec l = Vec::loadu(lse + n, some), ref_l = ref_lse ? Vec::loadu(ref_lse + n, some) : Vec(0.0f);
    Vec sum(0.0f);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t at = t * stride + n;
      const Vec log_P = Vec::loadu(tile_lse + at, some) - l, P = exp(log_P), inside = Vec::loadu(within + at, some);
      const Vec term =
          P * (ref_lse ? inside + (log_P - (Vec::loadu(ref_tile_lse + at, some) - ref_l)) : inside - log_P);
      sum = sum + Vec::blendv(term, Vec(0.0f), P == Vec(0.0f));
    }
    sum.store(mean + n, some);
  }
}

void collisions_over_tiles(const float* tile_lse, const float* within, int64_t T, int64_t stride, int64_t count,
                           const float* lse, float* sum_sq) {
  for (int64_t n = 0; n < count; n += W) {
    const int64_t some = std::min(W, count - n);
    const Vec l = Vec::loadu(lse + n, some);
    Vec sum(0.0f);
    for (int64_t t = 0; t < T; ++t) {
      const Vec P = exp(Vec::loadu(tile_lse + t * stride + n, some) - l);
      sum = fmadd(P * P, Vec::loadu(within + t * stride + n, some), sum);
    }
    sum.store(sum_sq + n, some);
  }
}

// The logarithm of what a tile weighs: its mass or, with an entropy gradient, at least sum of p |log p + H| over it,
// since p |log p + H| <= p (|log P + H| - log(p / P)) and the entropy within a tile is at most log(TILE).
Vec score(const Vec& log_mass, const float* entropy, int64_t some) {
  if (!entropy) return log_mass;
  const Vec w = (log_mass + Vec::loadu(entropy, some)).abs() + Vec(4.852030263919617f);
  return Vec::blendv(log_mass + log(w), Vec(NO_MASS), log_mass == Vec(NO_MASS));
}

void thresholds(const float* tile_lse, int64_t T, int64_t stride, int64_t count, const float* lse, const float* entropy,
                const float* logp, const int32_t* home, float filter_eps, float* scratch, Routes out) {
  constexpr int HALVINGS = 12;  // of an interval log(T) wide: the threshold is found to 0.002 nats
  float* scores = scratch;
  float* weights = scratch + T * LANES;
  for (int64_t n = 0; n < count; n += W) {
    const int64_t some = std::min(W, count - n);
    const Vec l = Vec::loadu(lse + n, some);
    for (int64_t t = 0; t < T; ++t) {
      const Vec log_mass = Vec::loadu(tile_lse + t * stride + n, some) - l;
      score(log_mass, entropy ? entropy + n : nullptr, some).store(scores + t * W);
    }
    float budget[W], low[W], high[W], rest[W];
    for (int64_t k = 0; k < some; ++k) {  // the target's tile is never left out
      if (home[n + k] >= 0 && home[n + k] < T) scores[home[n + k] * W + k] = NO_MASS;
      rest[k] = -std::expm1(logp[n + k]);
      budget[k] = filter_eps * rest[k];
      // a tile above the one exceeds the budget alone; all tiles below the other stay within it together
      high[k] = std::log(budget[k]) + 0.01f;
      low[k] = std::log(budget[k]) - std::log(static_cast<float>(T)) - 0.01f;
    }
    for (int64_t t = 0; t < T; ++t) exp(load(scores + t * W)).store(weights + t * W);
    const Vec budget_V = Vec::loadu(budget, some);
    Vec low_V = Vec::loadu(low, some), high_V = Vec::loadu(high, some), dropped_V(0.0f);
    for (int k = 0; k <= HALVINGS; ++k) {
      const bool last = k == HALVINGS;  // weighs what the found threshold leaves out
      const Vec middle = last ? low_V : (low_V + high_V) * Vec(0.5f);
      Vec weight(0.0f);
      for (int64_t t = 0; t < T; ++t) {
        weight = weight + Vec::blendv(Vec(0.0f), load(weights + t * W), load(scores + t * W) < middle);
      }
      if (last) {
        dropped_V = weight;
      } else {
        const Vec fits = weight <= budget_V;
        low_V = Vec::blendv(low_V, middle, fits);
        high_V = Vec::blendv(middle, high_V, fits);
      }
    }
    float found[W], dropped[W];
    low_V.store(found);
    dropped_V.store(dropped);
    for (int64_t k = 0; k < some; ++k) {
      // where 1 - p underflows, so does every probability but the target's: there is nothing else to visit
      const bool nothing = budget[k] <= 0;
      out.threshold[n + k] = nothing ? std::numeric_limits<float>::infinity() : found[k];
      out.dropped[n + k] = nothing ? 0.0f : dropped[k] / rest[k];
      int32_t kept = 0;
      if (home[n + k] >= 0) {
        for (int64_t t = 0; t < T; ++t) kept += !(scores[t * W + k] < out.threshold[n + k]) || home[n + k] == t;
      }
      out.kept[n + k] = kept;
    }
  }
}

int64_t visitors(const float* tile_lse, const float* lse, const float* entropy, const float* threshold,
                 const int32_t* home, int64_t t, int64_t N, int32_t* out) {
  int64_t found = 0;
  float s[W];
  for (int64_t n = 0; n < N; n += W) {
    const int64_t some = std::min(W, N - n);
    score(Vec::loadu(tile_lse + n, some) - Vec::loadu(lse + n, some), entropy ? entropy + n : nullptr, some).store(s);
    for (int64_t k = 0; k < some; ++k) {
      // a NaN is visited
      const bool visits = home[n + k] >= 0 && (!(s[k] < threshold[n + k]) || home[n + k] == t);
      if (out && visits) out[found] = static_cast<int32_t>(n + k);
      found += visits;
    }
  }
  return found;
}

void add_rows(const float* x, const int32_t* rows, int64_t first_row, int64_t count, int64_t columns, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    float* to = sums + (rows[i] - first_row) * columns;
    const float* from = x + i * columns;
    for (int64_t c = 0; c < columns; ++c) to[c] += from[c];
  }
}

}  // namespace

#define STEPKTO_TEXT_(x) #x
#define STEPKTO_TEXT(x) STEPKTO_TEXT_(x)

extern const TileKernels tile_kernels;
constinit const TileKernels tile_kernels = {
    STEPKTO_TEXT(CPU_CAPABILITY), logits,          log_sum_exp,           collisions, sums,     kl,       gradients,
    reduce_tiles,                 mean_over_tiles, collisions_over_tiles, thresholds, visitors, add_rows,
};

}  // namespace CPU_CAPABILITY
}  // namespace stepkto
