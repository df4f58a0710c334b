// Which of the builds of tiles.cpp runs: torch's own choice, so that ATEN_CPU_CAPABILITY steers both.

#include <ATen/Version.h>

#include <string>

#include "tiles.h"

namespace stepkto {

namespace DEFAULT {
extern const TileKernels kernels;
}
#ifdef STEPKTO_X86
namespace AVX2 {
extern const TileKernels kernels;
}
namespace AVX512 {
extern const TileKernels kernels;
}
#endif

const TileKernels& tile_kernels() {
  static const TileKernels& chosen = []() -> const TileKernels& {
#ifdef STEPKTO_X86
    const std::string capability = at::get_cpu_capability();
    if (capability.find("AVX512") != std::string::npos) return AVX512::kernels;
    if (capability.find("AVX2") != std::string::npos) return AVX2::kernels;
#endif
    return DEFAULT::kernels;
  }();
  return chosen;
}

}  // namespace stepkto
