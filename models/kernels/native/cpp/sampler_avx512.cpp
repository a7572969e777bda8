#define PROA_LANES 16
#include "sampler_impl.h"

const proa::SamplerKernels* proa::sampler_avx512() { return &kSampler; }
