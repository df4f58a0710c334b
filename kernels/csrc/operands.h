// How matrices become operands of products and results of them, once per instruction set as in tiles.h.
#pragma once

#include <cstdint>

namespace stepkto {

constexpr int64_t PAIR = 2;  // products of 16-bit numbers take pairs along K: K is padded to a multiple of it

// What depends on the type of the inputs; `Product` is what they are multiplied as, fp32 or bf16.
struct OperandKernels {
  // rows of a matrix, listed or (rows null) from its first one on, as columns of an operand (D, n_padded); zeros behind
  void (*pack_columns)(const void* matrix, int64_t stride, const int32_t* rows, int64_t n, int64_t n_padded, int64_t D,
                       void* out);
  // such rows as rows of an operand (m_padded, columns), of the columns from `column` on
  void (*pack_rows)(const void* matrix, int64_t stride, const int32_t* rows, int64_t m, int64_t m_padded,
                    int64_t column, int64_t columns, void* out);
  // such rows, from the first one on, as they are, in the type of the product and D_padded wide
  void (*copy_rows)(const void* matrix, int64_t stride, int64_t m, int64_t D, int64_t D_padded, void* out);
  // a block of gradients in the type of the product: as it is, and transposed, (columns, TILE), zeros behind
  void (*store_gradients)(const float* dz, int64_t rows, int64_t columns, void* as_is, void* transposed);
  void (*add_row_sums)(const void* as_is, int64_t rows, int64_t columns, float* sums);
  // fp32 to the type of the inputs
  void (*store)(const float* x, int64_t stride, int64_t rows, int64_t columns, void* out, int64_t out_stride);
  // Sums carried between chunks. fp32: in place. bf16: in their own 16 bits and 8 more, in `rest`. fp16: fp32, in
  // `rest`; `finish` rounds.
  void (*load_sums)(const void* sums, const void* rest, int64_t at, int64_t count, float* out);
  void (*store_sums)(const float* x, int64_t at, int64_t count, void* sums, void* rest);
  void (*finish_sums)(void* sums, const void* rest, int64_t at, int64_t count);
  int64_t rest_size;  // bytes of `rest` per element
};

// By the types of the inputs and of the product; bf16 as fp32 is for processors without bf16 products.
struct Operands {
  OperandKernels f32, bf16, bf16_as_f32, f16;
};

const Operands& operands();

}  // namespace stepkto
