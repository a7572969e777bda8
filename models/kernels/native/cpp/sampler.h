// Taking a token from a row of logits: what each instruction set implements; sampler.cpp calls it.
#pragma once
#include <cstdint>
#include <memory>

namespace proa {

struct DrawOptions {
  float inverse_temperature;
  double uniform;               // in [0, 1)
  int64_t top_k;                // <= 0: all
  double typical_p, top_p;      // >= 1: all
  double min_p;                 // <= 0: all
};

// What a thread works in; grows with the vocabulary.
struct SamplerScratch {
  void reserve(int width);
  int capacity = 0;
  std::unique_ptr<float[]> logits;      // of a row after its edits
  std::unique_ptr<float[]> weights;     // whole blocks
  std::unique_ptr<float[]> lane_max;    // a vector for each block: the largest weight that each lane met
  std::unique_ptr<double[]> sums;       // of each kWeightBlock weights
  std::unique_ptr<float[]> candidates;  // weights of the tokens that may be kept
  std::unique_ptr<float[]> left[2];     // keys and masses that a selection has narrowed down to
};

constexpr int kWeightBlock = 256;
constexpr int kMaxLanes = 16;

struct SamplerKernels {
  // Both return the token, or -1 where the logits are not numbers.
  int (*take_largest)(const float* logits, int width);
  int (*draw)(const float* logits, int width, const DrawOptions& options, SamplerScratch& scratch);
  // Entropy in nats at temperature 1, NaN where the logits are not numbers, log of the sum of their exponentials, and how
  // many tokens are possible.
  void (*measure)(const float* logits, int width, double* entropy, double* log_mass, int64_t* num_possible);
};

const SamplerKernels* sampler_avx2();
const SamplerKernels* sampler_avx512();

}  // namespace proa
