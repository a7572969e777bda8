#define PROA_LANES 8
#define PROA_ROWS 6
#define PROA_DOT 0
#define PROA_NAME "avx2"
#include <type_traits>
#include <utility>

#include "kernels_impl.h"

const proa::Kernels* proa::kernels_avx2() { return &kTable; }
