// Products through torch's own oneDNN (`brgemm`): small blocks in a cache, 16-bit operands summed in fp32 and never
// rounded between. Measured on 2 cores (docs/native.md): faster than MKL's products of whole matrices in both types.

#include "products.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <string>

namespace stepkto {
namespace {

// bf16 products need AVX512-BF16 or AMX, and nothing but trying tells what this oneDNN makes of this processor.
bool has_bf16_products() {
  static const bool answer = [] {
    alignas(64) c10::BFloat16 a[16 * 16], b[16 * 16];
    alignas(64) float c[16 * 16];
    for (int i = 0; i < 16 * 16; ++i) a[i] = b[i] = 1.0f;
    try {
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a, b, c, true);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {
      return false;
    }
    return std::all_of(c, c + 16 * 16, [](float x) { return x == 16.0f; });
  }();
  return answer;
}

// Asked every time: torch.backends.mkldnn.flags(enabled=False) switches them off.
bool multiplies_bf16() { return at::globalContext().userEnabledMkldnn() && has_bf16_products(); }

}  // namespace

std::string instruction_set() {
#ifdef _OPENMP
  const int count = at::get_num_threads();
  const std::string threads = std::to_string(count) + (count == 1 ? " thread" : " threads");
#else
  const std::string threads = "one thread: built without OpenMP";
#endif
  return std::string(tile_kernels().name) + (multiplies_bf16() ? ", bf16 products, " : ", bf16 multiplied as fp32, ") +
         threads;
}

Arithmetic::Arithmetic(at::ScalarType inputs) {
  const Operands& by_type = operands();
  as_bf16 = inputs == at::kBFloat16 && multiplies_bf16();
  pack = as_bf16                     ? &by_type.bf16
         : inputs == at::kBFloat16 ? &by_type.bf16_as_f32
         : inputs == at::kHalf     ? &by_type.f16
                                   : &by_type.f32;
  input_size = inputs == at::kFloat ? 4 : 2;
  product_size = as_bf16 ? 2 : 4;
}

void Arithmetic::multiply(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_stride, const void* b,
                          int64_t b_stride, float* c, int64_t c_stride, bool add) const {
  namespace blas = at::native::cpublas;
  if (k == 0) {
    for (int64_t i = 0; i < m && !add; ++i) std::fill_n(c + i * c_stride, n, 0.0f);
  } else if (as_bf16) {
    blas::brgemm(m, n, k, a_stride, b_stride, c_stride, add, static_cast<const c10::BFloat16*>(a),
                 static_cast<const c10::BFloat16*>(b), c, true);
  } else {
    blas::brgemm(m, n, k, a_stride, b_stride, c_stride, add, static_cast<const float*>(a),
                 static_cast<const float*>(b), c, false);
  }
}

Matrix::Matrix(const at::Tensor& x)
    : tensor(x.stride(1) == 1 && x.stride(0) >= x.size(1) ? x : x.contiguous()),
      arithmetic(x.scalar_type()),
      rows(x.size(0)),
      D(x.size(1)),
      depth(arithmetic.depth(D)),
      stride(std::max<int64_t>({tensor.stride(0), D, 1})) {  // that of a single row may be anything
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int32_t>::max(), "a matrix of ", rows, " rows; expected below 2^31");
}

const void* Matrix::row(int64_t i) const {
  return static_cast<const char*>(tensor.const_data_ptr()) + i * stride * arithmetic.input_size;
}

bool Matrix::copies() const {
  const bool far = stride > (int64_t{1} << 20);  // the products address their operands with 32 bits
  return far || depth != D || arithmetic.product_size != arithmetic.input_size;
}

const void* Matrix::left(int64_t first, int64_t count, char* copy, int64_t& operand_stride) const {
  if (!copies()) {
    operand_stride = stride;
    return row(first);
  }
  arithmetic.pack->copy_rows(row(first), stride, count, D, depth, copy);
  operand_stride = depth;
  return copy;
}

Head head_of(double logit_scale, const std::optional<double>& softcap, double temperature) {
  const double cap = softcap.value_or(1.0);
  return {static_cast<float>(logit_scale / temperature), static_cast<float>(logit_scale / cap),
          static_cast<float>(cap / temperature), softcap.has_value()};
}

std::vector<float> as_floats(const std::optional<at::Tensor>& bias) {
  if (!bias) return {};
  const at::Tensor b = bias->to(at::kFloat).contiguous();
  return {b.const_data_ptr<float>(), b.const_data_ptr<float>() + b.numel()};
}

void release_products() {
  if (multiplies_bf16()) at::native::cpublas::brgemm_release(true);
}

int64_t tokens_of_block(int64_t bytes_per_token) {
  constexpr int64_t CACHE = int64_t{1} << 19;  // half of a core's second-level cache
  return std::clamp<int64_t>(CACHE / std::max<int64_t>(bytes_per_token, 1) / 64 * 64, 64, BLOCK);
}

}  // namespace stepkto
