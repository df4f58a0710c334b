// The sum behind both reference points on the CPU: see torch-ext/stepkto_kernels/reference_points/README.md.
// Blocks of a fixed size are summed in parallel and then one after the other, so the result is the same for any number
// of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace stepkto {
namespace {

constexpr int64_t VALUES = 16384;  // of a block: about 5 us of work
constexpr int64_t LANES = 8;

template <typename scalar_t>
double sum(const scalar_t* x, int64_t count) {
  double lane[LANES] = {};
  int64_t n = 0;
  for (; n + LANES <= count; n += LANES) {
    for (int64_t k = 0; k < LANES; ++k) lane[k] += static_cast<double>(x[n + k]);
  }
  for (; n < count; ++n) lane[0] += static_cast<double>(x[n]);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

}  // namespace

at::Tensor reference_points(const at::Tensor& values) {
  const bool is_double = values.scalar_type() == at::kDouble;
  const at::Tensor x = (is_double ? values : values.to(at::kFloat)).contiguous();
  const int64_t blocks = (x.numel() + VALUES - 1) / VALUES;
  std::vector<double> sums(blocks);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * VALUES, count = std::min(VALUES, x.numel() - first);
      sums[i] = is_double ? sum(x.const_data_ptr<double>() + first, count)
                          : sum(x.const_data_ptr<float>() + first, count);
    }
  });
  double total = 0;
  for (const double each : sums) total += each;
  return at::empty({}, x.options()).fill_(total);
}

}  // namespace stepkto
