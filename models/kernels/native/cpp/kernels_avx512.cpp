#define PROA_LANES 16
#define PROA_ROWS 12
#define PROA_DOT 1
#define PROA_NAME "avx512"
#include <type_traits>
#include <utility>

#include "kernels_impl.h"

const proa::Kernels* proa::kernels_avx512() { return &kTable; }
