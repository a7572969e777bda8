#define PROA_LANES 16
#define PROA_ROWS 12
#define PROA_DOT 1
#define PROA_TILES 1
#include "tiles.h"

const proa::Kernels* proa::kernels_amx() { return on_tiles<kernels_avx512>("amx"); }
