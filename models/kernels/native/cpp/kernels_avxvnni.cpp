#define PROA_LANES 8
#define PROA_ROWS 6
#define PROA_DOT 1
#define PROA_NAME "avxvnni"
#include <type_traits>
#include <utility>

#include "kernels_impl.h"

const proa::Kernels* proa::kernels_avxvnni() { return &kTable; }
