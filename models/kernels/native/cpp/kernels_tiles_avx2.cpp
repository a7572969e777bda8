#define PROA_LANES 8
#define PROA_ROWS 6
#define PROA_DOT 1
#define PROA_TILES 2
#include "tiles.h"

namespace proa {

const Kernels* kernels_tiles() {
  static const Kernels table = [] {
    Kernels kernels = *kernels_avx2();
    kernels.name = "tiles";
    kernels.many = [](const Piece& piece, int index, int group, int inputs, const Activations& act, int rows, float* out, float* tile) {
      panel_on_tiles(kernels_avx2()->many, piece, index, group, inputs, act, rows, out, tile);
    };
    return kernels;
  }();
  return &table;
}

}  // namespace proa
