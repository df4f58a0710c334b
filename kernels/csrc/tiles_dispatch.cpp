// Which of the builds of tiles.cpp and operands.cpp runs: torch's own choice, so that ATEN_CPU_CAPABILITY steers both.

#include <ATen/Version.h>

#include <string>

#include "operands.h"
#include "tiles.h"

namespace stepkto {

#define STEPKTO_BUILD(ISA)                \
  namespace ISA {                         \
  extern const TileKernels tile_kernels;  \
  extern const Operands operands;         \
  }
STEPKTO_BUILD(DEFAULT)
#ifdef STEPKTO_X86
STEPKTO_BUILD(AVX2)
STEPKTO_BUILD(AVX512)
#endif

namespace {

struct Build {
  const TileKernels& tile_kernels;
  const Operands& operands;
};

const Build& chosen() {
  static const Build build = []() -> Build {
#ifdef STEPKTO_X86
    const std::string capability = at::get_cpu_capability();
    if (capability.find("AVX512") != std::string::npos) return {AVX512::tile_kernels, AVX512::operands};
    if (capability.find("AVX2") != std::string::npos) return {AVX2::tile_kernels, AVX2::operands};
#endif
    return {DEFAULT::tile_kernels, DEFAULT::operands};
  }();
  return build;
}

}  // namespace

const TileKernels& tile_kernels() { return chosen().tile_kernels; }

const Operands& operands() { return chosen().operands; }

}  // namespace stepkto
