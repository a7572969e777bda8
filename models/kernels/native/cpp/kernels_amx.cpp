#define PROA_LANES 16
#define PROA_ROWS 12
#define PROA_DOT 1
#define PROA_TILES 1
#include "tiles.h"

namespace proa {

const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels kernels = *kernels_avx512();
    kernels.name = "amx";
    kernels.many = [](const Piece& piece, int index, int group, int inputs, const Activations& act, int rows, float* out, float* tile) {
      panel_on_tiles(kernels_avx512()->many, piece, index, group, inputs, act, rows, out, tile);
    };
    return kernels;
  }();
  return &table;
}

}  // namespace proa
