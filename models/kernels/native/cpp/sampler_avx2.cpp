#define PROA_LANES 8
#include "sampler_impl.h"

const proa::SamplerKernels* proa::sampler_avx2() { return &kSampler; }
