// See operands.h. Compiled once per instruction set, as tiles.cpp is.

#include "operands.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "tiles.h"

namespace stepkto {
namespace CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;
using c10::BFloat16;
using c10::Half;

// What a product takes at a time along K: one fp32 number, or a pair of bf16 numbers

template <typename Product>
constexpr int64_t UNIT = sizeof(float) / sizeof(Product);

const char* row_of(const void* matrix, int64_t stride, const int32_t* rows, int64_t i, int64_t size) {
  return static_cast<const char*>(matrix) + (rows ? rows[i] : i) * stride * size;
}

template <typename In, typename Product>
void convert(const In* from, int64_t count, Product* to) {
  if constexpr (std::is_same_v<In, Product>) {
    std::memcpy(to, from, count * sizeof(In));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Product>(from[i]);
  }
}

template <typename In, typename Product>
void pack_columns(const void* matrix, int64_t stride, const int32_t* rows, int64_t n, int64_t n_padded, int64_t D,
                  void* out) {
  constexpr int64_t STEP = LANES * UNIT<Product>;  // elements of a row in a square of 16 x 16 units
  float* to = static_cast<float*>(out);
  alignas(64) float square[LANES * LANES], turned[LANES * LANES];
  for (int64_t j = 0; j < n_padded; j += LANES) {
    const In* from[LANES];
    const int64_t some = std::min(LANES, n - j);
    for (int64_t i = 0; i < some; ++i) {
      from[i] = reinterpret_cast<const In*>(row_of(matrix, stride, rows, j + i, sizeof(In)));
    }
    std::memset(square, 0, sizeof(square));
    for (int64_t k = 0; k < D; k += STEP) {
      const int64_t count = std::min(STEP, D - k);
      if (count < STEP) std::memset(square, 0, sizeof(square));
      for (int64_t i = 0; i < some; ++i) {
        Product* row = reinterpret_cast<Product*>(square + i * LANES);
        if (count == STEP) {
          convert(from[i] + k, STEP, row);  // of a size that the compiler knows
        } else {
          convert(from[i] + k, count, row);
        }
      }
      float* at = to + k / UNIT<Product> * n_padded + j;
      if (count == STEP) {
        at::vec::transpose_mxn<float, LANES, LANES>(square, LANES, at, n_padded);
      } else {
        at::vec::transpose_mxn<float, LANES, LANES>(square, LANES, turned, LANES);
        const int64_t units = (count + UNIT<Product> - 1) / UNIT<Product>;
        for (int64_t u = 0; u < units; ++u) std::memcpy(at + u * n_padded, turned + u * LANES, LANES * sizeof(float));
      }
    }
  }
}

template <typename In, typename Product>
void pack_rows(const void* matrix, int64_t stride, const int32_t* rows, int64_t m, int64_t m_padded, int64_t column,
               int64_t columns, void* out) {
  const auto at = [&](int64_t i) {
    return reinterpret_cast<const In*>(row_of(matrix, stride, rows, i, sizeof(In))) + column;
  };
  if constexpr (UNIT<Product> == 1) {
    Product* to = static_cast<Product*>(out);
    for (int64_t i = 0; i < m; ++i) convert(at(i), columns, to + i * columns);
    std::fill(to + m * columns, to + m_padded * columns, Product(0));
  } else {
    static_assert(std::is_same_v<In, Product>);
    uint32_t* to = static_cast<uint32_t*>(out);
    for (int64_t i = 0; i < m_padded; i += 2, to += columns) {
      const auto* a = reinterpret_cast<const uint16_t*>(i < m ? at(i) : nullptr);
      const auto* b = reinterpret_cast<const uint16_t*>(i + 1 < m ? at(i + 1) : nullptr);
      if (b) {
        for (int64_t c = 0; c < columns; ++c) to[c] = a[c] | (static_cast<uint32_t>(b[c]) << 16);
      } else if (a) {
        for (int64_t c = 0; c < columns; ++c) to[c] = a[c];
      } else {
        std::memset(to, 0, columns * sizeof(uint32_t));
      }
    }
  }
}

template <typename In, typename Product>
void copy_rows(const void* matrix, int64_t stride, int64_t m, int64_t D, int64_t D_padded, void* out) {
  Product* to = static_cast<Product*>(out);
  for (int64_t i = 0; i < m; ++i, to += D_padded) {
    convert(static_cast<const In*>(matrix) + i * stride, D, to);
    std::fill(to + D, to + D_padded, Product(0.0f));
  }
}

// `count` a multiple of LANES
void rounded(const float* x, int64_t count, BFloat16* to) {
  using Out = at::vec::Vectorized<BFloat16>;
  for (int64_t i = 0; i < count; i += Out::size()) {
    const int64_t some = std::min<int64_t>(Out::size(), count - i);
    const Vec a = Vec::loadu(x + i), b = some > Vec::size() ? Vec::loadu(x + i + Vec::size()) : Vec(0.0f);
    at::vec::convert_float_bfloat16(a, b).store(to + i, static_cast<int>(some));
  }
}

void rounded(const float* x, int64_t count, float* to) { std::memcpy(to, x, count * sizeof(float)); }

template <typename Product>
void store_gradients(const float* dz, int64_t rows, int64_t columns, void* as_is, void* transposed) {
  if (as_is) rounded(dz, rows * columns, static_cast<Product*>(as_is));
  if (!transposed) return;
  Product* to = static_cast<Product*>(transposed);
  alignas(64) float square[LANES * LANES], turned[LANES * LANES];
  for (int64_t v = 0; v < TILE; v += LANES) {
    const int64_t some = std::clamp<int64_t>(rows - v, 0, LANES);
    for (int64_t n = 0; n < columns; n += LANES) {
      if (some == LANES) {
        at::vec::transpose_mxn<float, LANES, LANES>(dz + v * columns + n, columns, turned, LANES);
      } else {
        std::memset(square, 0, sizeof(square));
        for (int64_t i = 0; i < some; ++i) {
          std::memcpy(square + i * LANES, dz + (v + i) * columns + n, LANES * sizeof(float));
        }
        at::vec::transpose_mxn<float, LANES, LANES>(square, LANES, turned, LANES);
      }
      for (int64_t j = 0; j < LANES; ++j) rounded(turned + j * LANES, LANES, to + (n + j) * TILE + v);
    }
  }
}

template <typename Product>
void add_row_sums(const void* as_is, int64_t rows, int64_t columns, float* sums) {
  const Product* x = static_cast<const Product*>(as_is);
  for (int64_t v = 0; v < rows; ++v, x += columns) {
    float lanes[LANES] = {};
    for (int64_t n = 0; n < columns; n += LANES) {
      for (int64_t k = 0; k < LANES; ++k) lanes[k] += static_cast<float>(x[n + k]);
    }
    float sum = 0;
    for (float lane : lanes) sum += lane;
    sums[v] += sum;
  }
}

template <typename In>
void store(const float* x, int64_t stride, int64_t rows, int64_t columns, void* out, int64_t out_stride) {
  In* to = static_cast<In*>(out);
  for (int64_t i = 0; i < rows; ++i, x += stride, to += out_stride) {
    if constexpr (std::is_same_v<In, Half>) {
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<In>(x[c]);
    } else {
      const int64_t whole = columns / LANES * LANES;
      rounded(x, whole, to);
      for (int64_t c = whole; c < columns; ++c) to[c] = static_cast<In>(x[c]);
    }
  }
}

template <typename In>
void load_sums(const void* sums, const void* rest, int64_t at, int64_t count, float* out) {
  if constexpr (std::is_same_v<In, BFloat16>) {
    const uint16_t* __restrict__ high = static_cast<const uint16_t*>(sums) + at;
    const uint8_t* __restrict__ low = static_cast<const uint8_t*>(rest) + at;  // may alias all else without the word
    uint32_t* __restrict__ to = reinterpret_cast<uint32_t*>(out);
    for (int64_t i = 0; i < count; ++i) to[i] = (static_cast<uint32_t>(high[i]) << 16) | (uint32_t{low[i]} << 8);
  } else {
    const void* from = std::is_same_v<In, float> ? sums : rest;
    std::memcpy(out, static_cast<const float*>(from) + at, count * sizeof(float));
  }
}

template <typename In>
void store_sums(const float* x, int64_t at, int64_t count, void* sums, void* rest) {
  if constexpr (std::is_same_v<In, BFloat16>) {
    uint16_t* __restrict__ high = static_cast<uint16_t*>(sums) + at;
    uint8_t* __restrict__ low = static_cast<uint8_t*>(rest) + at;
    const uint32_t* __restrict__ from = reinterpret_cast<const uint32_t*>(x);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t b = (from[i] & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : from[i] + 0x80u;
      high[i] = static_cast<uint16_t>(b >> 16);
      low[i] = static_cast<uint8_t>(b >> 8);
    }
  } else {
    void* to = std::is_same_v<In, float> ? sums : rest;
    std::memcpy(static_cast<float*>(to) + at, x, count * sizeof(float));
  }
}

template <typename In>
void finish_sums(void* sums, const void* rest, int64_t at, int64_t count) {
  if constexpr (std::is_same_v<In, BFloat16>) {
    uint16_t* __restrict__ high = static_cast<uint16_t*>(sums) + at;
    const uint8_t* __restrict__ low = static_cast<const uint8_t*>(rest) + at;
    for (int64_t i = 0; i < count; ++i) high[i] += (low[i] + (high[i] & 1)) > 0x80;  // to nearest, ties to even
  } else if constexpr (std::is_same_v<In, Half>) {
    convert(static_cast<const float*>(rest) + at, count, static_cast<Half*>(sums) + at);
  }
}

template <typename In, typename Product>
constexpr OperandKernels kernels() {
  return {pack_columns<In, Product>, pack_rows<In, Product>, copy_rows<In, Product>, store_gradients<Product>,
          add_row_sums<Product>,     store<In>,              load_sums<In>,          store_sums<In>,
          finish_sums<In>,           std::is_same_v<In, float> ? 0 : std::is_same_v<In, Half> ? 4 : 1};
}

}  // namespace

extern const Operands operands;
constinit const Operands operands = {kernels<float, float>(), kernels<BFloat16, BFloat16>(),
                                     kernels<BFloat16, float>(), kernels<Half, float>()};

}  // namespace CPU_CAPABILITY
}  // namespace stepkto
