#define PROA_LANES 8
#define PROA_ROWS 6
#define PROA_DOT 1
#define PROA_TILES 2
#include "tiles.h"

const proa::Kernels* proa::kernels_tiles() { return on_tiles<kernels_avx2>("tiles"); }
