// The sampler over vectors of PROA_LANES floats. decoding/weights.py, filters.py and draw.py define the results: weights are
// whole numbers, so every sum in double precision is exact and comes out the same in any order.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "sampler.h"

namespace proa {
namespace {

constexpr int kLanes = PROA_LANES;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeastDistance = -87.f, kLog2E = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first has few bits: its product is exact
constexpr double kLargestWeight = 4294967296.0;
constexpr int kWeightShift = 32;
constexpr double kBelowOne = 1.0 - 0x1p-52;

#if PROA_LANES == 16
using Floats = __m512;
using Doubles = __m512d;
using Mask = __mmask16;
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b if one is no number
inline Floats round(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// A product rounded by itself: the compiler must not fuse it with a sum.
inline Floats mul(Floats a, Floats b) {
  Floats product = _mm512_mul_ps(a, b);
  asm("" : "+v"(product));
  return product;
}
inline Floats power_of_2(Floats exponent, int shift) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(exponent), _mm512_set1_epi32(127 + shift)), 23));
}
inline Doubles low(Floats v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
inline Doubles high(Floats v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
inline double sum(Doubles v) { return _mm512_reduce_add_pd(v); }
inline Doubles splat_double(double v) { return _mm512_set1_pd(v); }
inline float largest(Floats v) { return _mm512_reduce_max_ps(v); }
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask unordered(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline Floats only(Mask mask, Floats v) { return _mm512_maskz_mov_ps(mask, v); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline void pack(float* out, Mask mask, Floats v) { store(out, _mm512_maskz_compress_ps(mask, v)); }
#else
using Floats = __m256;
using Doubles = __m256d;
using Mask = int;
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats splat(float v) { return _mm256_set1_ps(v); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b if one is no number
inline Floats round(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// A product rounded by itself: the compiler must not fuse it with a sum.
inline Floats mul(Floats a, Floats b) {
  Floats product = _mm256_mul_ps(a, b);
  asm("" : "+x"(product));
  return product;
}
inline Floats power_of_2(Floats exponent, int shift) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127 + shift)), 23));
}
inline Doubles low(Floats v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
inline Doubles high(Floats v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
inline double sum(Doubles v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline Doubles splat_double(double v) { return _mm256_set1_pd(v); }
inline float largest(Floats v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline Mask at_least(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline Mask above(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline Mask unordered(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
// For each mask of 8 lanes: the chosen lanes, in order.
struct Lanes {
  constexpr Lanes() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, count = 0; lane < 8; ++lane)
        if (mask >> lane & 1) chosen[mask][count++] = lane;
  }
  alignas(32) int32_t chosen[256][8] = {};
};
constexpr Lanes kChosen;
inline __m256i lanes_of(Mask mask) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(kChosen.chosen[mask]));
}
inline Floats only(Mask mask, Floats v) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i is_on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
  return _mm256_and_ps(v, _mm256_castsi256_ps(is_on));
}
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline void pack(float* out, Mask mask, Floats v) { store(out, _mm256_permutevar8x32_ps(v, lanes_of(mask))); }
#endif
inline int count(Mask mask) { return __builtin_popcount(unsigned(mask)); }
inline Mask first_lanes(int n) { return n >= kLanes ? Mask((1u << kLanes) - 1) : Mask((1u << n) - 1); }

// Whole vectors of a row, then what is left, filled up with `rest`.
template <class Visit>
inline void each_vector(const float* values, int n, float rest, Visit visit) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(i, load(values + i));
  if (i < n) {
    float padded[kLanes];
    std::fill(padded, padded + kLanes, rest);
    std::memcpy(padded, values + i, size_t(n - i) * sizeof(float));
    visit(i, load(padded));
  }
}

float find_largest(const float* values, int n) {
  Floats found[4];
  std::fill(found, found + 4, splat(-kInfinity));
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) found[j] = max(load(values + i + j * kLanes), found[j]);
  each_vector(values + i, n - i, -kInfinity, [&](int, Floats v) { found[0] = max(v, found[0]); });
  return largest(max(max(found[0], found[1]), max(found[2], found[3])));
}

inline Floats distance(Floats logits, Floats top, Floats inverse_temperature) {
  return max(splat(kLeastDistance), mul(sub(logits, top), inverse_temperature));
}

// exp(v) * 2^shift for v from kLeastDistance to 0.
inline Floats exponential(Floats v, int shift) {
  const Floats n = round(mul(v, splat(kLog2E)));
  const Floats r = sub(sub(v, mul(n, splat(kLn2High))), mul(n, splat(kLn2Low)));
  Floats p = splat(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = add(mul(p, r), splat(c));
  return mul(p, power_of_2(n, shift));
}

int take_largest(const float* logits, int width) {
  unsigned bad = 0;
  each_vector(logits, width, 0.f, [&](int, Floats v) { bad |= unsigned(unordered(v, v)); });
  const float top = find_largest(logits, width);
  if (bad || !std::isfinite(top)) return -1;
  int i = 0;
  for (; i + kLanes <= width; i += kLanes)
    if (const unsigned mask = unsigned(at_least(load(logits + i), splat(top)))) return i + __builtin_ctz(mask);
  while (logits[i] != top) ++i;
  return i;
}

void measure(const float* logits, int width, double* entropy, double* log_mass, int64_t* num_possible) {
  const float most = find_largest(logits, width);
  const Floats top = splat(most), one = splat(1.f);
  Doubles total[2] = {splat_double(0), splat_double(0)}, moment[2] = {splat_double(0), splat_double(0)};
  int64_t possible = 0;
  each_vector(logits, width, -kInfinity, [&](int, Floats v) {
    possible += count(above(v, splat(-kInfinity)));
    const Floats away = distance(v, top, one), weight = exponential(away, 0);
    total[0] += low(weight), total[1] += high(weight);
    moment[0] += low(weight) * low(away), moment[1] += high(weight) * high(away);
  });
  const double mass = sum(total[0] + total[1]);
  *log_mass = most + std::log(mass);
  *entropy = std::log(mass) - sum(moment[0] + moment[1]) / mass;
  if (*entropy < 0) *entropy = 0;
  *num_possible = possible;
}

// Weights of a row, with the sums and largest of their blocks. Returns the sum of all.
double weigh(const float* logits, int width, float inverse_temperature, SamplerScratch& s) {
  const Floats top = splat(find_largest(logits, width)), inverse = splat(inverse_temperature);
  float padded[kWeightBlock];
  double mass = 0;
  for (int start = 0; start < width; start += kWeightBlock) {
    const float* from = logits + start;
    if (start + kWeightBlock > width) {
      std::fill(padded, padded + kWeightBlock, -kInfinity);
      std::memcpy(padded, from, size_t(width - start) * sizeof(float));
      from = padded;
    }
    Doubles total[2] = {splat_double(0), splat_double(0)};
    Floats most = splat(0.f);
    for (int i = 0; i < kWeightBlock; i += kLanes) {
      const Floats weight = round(exponential(distance(load(from + i), top, inverse), kWeightShift));
      store(s.weights.get() + start + i, weight);
      most = max(most, weight);
      total[0] += low(weight), total[1] += high(weight);
    }
    store(s.lane_max.get() + start / kWeightBlock * kLanes, most);
    mass += s.sums[start / kWeightBlock] = sum(total[0] + total[1]);
  }
  return mass;
}

double sum_all(const float* values, int n) {
  Doubles total[2] = {splat_double(0), splat_double(0)};
  each_vector(values, n, 0.f, [&](int, Floats v) { total[0] += low(v), total[1] += high(v); });
  return sum(total[0] + total[1]);
}

// Return the first token up to which the weights of at least `least` sum to more than the random number's share of their
// `mass`; the sums of their blocks are in s.sums.
int draw_weight(double mass, double uniform, float least, const SamplerScratch& s) {
  double target = std::min(uniform * mass, mass * kBelowOne);
  int block = 0;
  for (; s.sums[block] <= target; ++block) target -= s.sums[block];
  for (int i = block * kWeightBlock;; ++i) {
    const float weight = s.weights[i] < least ? 0.f : s.weights[i];
    if (weight > target) return i;
    target -= weight;
  }
}

// Draw among the tokens of at least this weight, which is above 0.
int draw_above(int width, float least, double uniform, SamplerScratch& s) {
  double mass = 0;
  for (int start = 0, block = 0; start < width; start += kWeightBlock, ++block) {
    Doubles total[2] = {splat_double(0), splat_double(0)};
    if (at_least(load(s.lane_max.get() + block * kLanes), splat(least))) {
      for (int i = start; i < start + kWeightBlock; i += kLanes) {
        const Floats weight = load(s.weights.get() + i), kept = only(at_least(weight, splat(least)), weight);
        total[0] += low(kept), total[1] += high(kept);
      }
    }
    mass += s.sums[block] = sum(total[0] + total[1]);
  }
  return draw_weight(mass, uniform, least, s);
}

// Copy the weights of at least `least` to the candidates. Returns how many.
int pack_candidates(int width, float least, SamplerScratch& s) {
  int size = 0;
  for (int start = 0; start < width; start += kWeightBlock) {
    if (!at_least(load(s.lane_max.get() + start / kWeightBlock * kLanes), splat(least))) continue;
    for (int i = start; i < start + kWeightBlock; i += kLanes) {
      const Floats weight = load(s.weights.get() + i);
      const Mask mask = at_least(weight, splat(least));
      pack(s.candidates.get() + size, mask, weight);
      size += count(mask);
    }
  }
  return size;
}

// What is selected among: keys, and masses that are all 1, the keys themselves, or an array of their own.
struct Selection {
  const float* keys;
  const float* masses;  // null: all 1; may be the keys
  int n;
  SamplerScratch* s;

  // Sums of the masses of the keys above `high`, and of those that are at least `low`.
  std::pair<double, double> weigh_between(float low_key, float high_key) const {
    Doubles upper[2] = {splat_double(0), splat_double(0)}, least[2] = {splat_double(0), splat_double(0)};
    int num_upper = 0, num_least = 0;
    for (int i = 0; i < n; i += kLanes) {
      const Floats key = load(keys + i);
      const Mask lanes = first_lanes(n - i);
      const Mask is_upper = above(key, splat(high_key)) & lanes, is_least = at_least(key, splat(low_key)) & lanes;
      if (masses) {
        const Floats mass = load(masses + i), more = only(is_upper, mass), same = only(is_least, mass);
        upper[0] += low(more), upper[1] += high(more);
        least[0] += low(same), least[1] += high(same);
      } else {
        num_upper += count(is_upper), num_least += count(is_least);
      }
    }
    if (!masses) return {num_upper, num_least};
    return {sum(upper[0] + upper[1]), sum(least[0] + least[1])};
  }

  // Go on with the keys for which the test gives true.
  template <class Test>
  void keep(Test test) {
    float *kept_keys = s->left[0].get(), *kept_masses = s->left[1].get();
    const bool has_masses = masses && masses != keys;
    int kept = 0;
    for (int i = 0; i < n; i += kLanes) {
      const Floats key = load(keys + i);
      const Mask mask = Mask(test(key)) & first_lanes(n - i);
      if (has_masses) pack(kept_masses + kept, mask, load(masses + i));
      pack(kept_keys + kept, mask, key);
      kept += count(mask);
    }
    masses = has_masses ? kept_masses : masses ? kept_keys : nullptr;
    keys = kept_keys, n = kept;
  }

  // Choose two keys that are likely to have between them the one at this share of the mass: a sample's.
  std::pair<float, float> guess(double share) const {
    constexpr int kSample = 64, kMargin = 5;
    std::pair<float, float> sample[kSample];
    double total = 0;
    for (int i = 0; i < kSample; ++i) {
      const int64_t from = int64_t(n - 1) * i / (kSample - 1);
      sample[i] = {keys[from], masses ? masses[from] : 1.f};
      total += sample[i].second;
    }
    // A comparison of this file's own keeps the sort out of reach of code for other instruction sets.
    std::sort(sample, sample + kSample, [](const auto& a, const auto& b) { return a.first > b.first; });
    int i = 0;
    for (double sum = sample[0].second; i < kSample - 1 && sum < share * total; sum += sample[++i].second) {
    }
    return {i + kMargin < kSample ? sample[i + kMargin].first : -kInfinity,
            i >= kMargin ? sample[i - kMargin].first : kInfinity};
  }

  float median() const {
    float sample[9];
    for (int i = 0; i < 9; ++i) sample[i] = keys[int64_t(n - 1) * i / 8];
    std::nth_element(sample, sample + 4, sample + 9, [](float a, float b) { return a < b; });
    return sample[4];
  }

  // Return the largest key whose own mass and that of larger keys reach `target`; none above the least key if none does.
  // `mass` is that of all keys.
  float find(double target, double mass) {
    constexpr int kMany = 512;
    for (bool may_guess = true;;) {
      std::pair<float, float> between;
      if (n >= kMany && may_guess) {
        between = guess(target / mass);
      } else {
        const float pivot = median();
        between = {pivot, pivot};
      }
      const float low_key = between.first, high_key = between.second;
      const auto [upper, least] = weigh_between(low_key, high_key);
      const int before = n;
      if (upper > 0 && upper >= target) {
        keep([=](Floats key) { return above(key, splat(high_key)); });
        mass = upper;
      } else if (least > 0 && least >= target) {
        if (low_key == high_key) return low_key;
        keep([=](Floats key) { return at_least(key, splat(low_key)) & ~above(key, splat(high_key)); });
        target -= upper, mass = least - upper;
      } else {
        keep([=](Floats key) { return ~at_least(key, splat(low_key)); });
        if (!n) return low_key;
        target -= least, mass -= least;
      }
      may_guess = n < before / 2;
    }
  }
};

// The least float that is not below v.
float round_up(double v) {
  const float near = float(v);
  return double(near) < v ? std::nextafter(near, kInfinity) : near;
}

// Set the weights of tokens below `least`, and of those that typical-p drops, to 0. Returns the largest that is left.
float keep_typical(const float* logits, int width, float least, double mass, const DrawOptions& o, SamplerScratch& s) {
  const Floats top = splat(find_largest(logits, width)), inverse = splat(o.inverse_temperature);
  float *weights = s.weights.get(), *keys = s.candidates.get();
  Doubles moment[2] = {splat_double(0), splat_double(0)};
  each_vector(logits, width, -kInfinity, [&](int i, Floats v) {
    const Floats away = distance(v, top, inverse), all = load(weights + i), weight = only(at_least(all, splat(least)), all);
    store(weights + i, weight), store(keys + i, away);
    moment[0] += low(weight) * low(away), moment[1] += high(weight) * high(away);
  });
  const Floats mean = splat(float(sum(moment[0] + moment[1]) / mass)), none = splat(0.f);
  float *left_keys = s.left[0].get(), *left_masses = s.left[1].get();
  int size = 0;
  for (int i = 0; i < width; i += kLanes) {
    const Floats apart = sub(load(keys + i), mean), key = min(apart, sub(none, apart)), weight = load(weights + i);
    const Mask mask = above(weight, none);
    store(keys + i, key);
    pack(left_keys + size, mask, key), pack(left_masses + size, mask, weight);
    size += count(mask);
  }
  const Floats limit = splat(Selection{left_keys, left_masses, size, &s}.find(o.typical_p * mass, mass));
  Floats most = splat(0.f);
  for (int i = 0; i < width; i += kLanes) {
    const Floats weight = only(at_least(load(keys + i), limit), load(weights + i));
    store(weights + i, weight);
    most = max(most, weight);
  }
  return largest(most);
}

int draw_filtered(const float* logits, int width, double mass, const DrawOptions& o, SamplerScratch& s) {
  float least = 1.f, most = float(kLargestWeight);
  Selection left{s.weights.get(), s.weights.get(), width, &s};
  if (o.top_k > 0 && o.top_k < width) {
    // As many lanes of blocks have a token as likely as this one.
    const int num_lanes = (width + kWeightBlock - 1) / kWeightBlock * kLanes;
    if (o.top_k <= num_lanes)
      least = std::max(least, Selection{s.lane_max.get(), nullptr, num_lanes, &s}.find(double(o.top_k), num_lanes));
    const float* candidates = s.candidates.get();
    const int size = pack_candidates(width, least, s);
    least = std::max(least, Selection{candidates, nullptr, size, &s}.find(double(o.top_k), size));
    left = {candidates, candidates, size, &s};
    left.keep([=](Floats weight) { return at_least(weight, splat(least)); });
    mass = sum_all(left.keys, left.n);
  }
  if (o.typical_p < 1.0) {
    most = keep_typical(logits, width, least, mass, o, s);
    least = 1.f;
    left = {s.weights.get(), s.weights.get(), width, &s};
    mass = sum_all(left.keys, width);
  }
  if (o.top_p < 1.0) least = std::max(least, left.find(o.top_p * mass, mass));
  if (o.min_p > 0.0) least = std::max(least, round_up(o.min_p * double(most)));
  return draw_above(width, least, o.uniform, s);
}

int draw(const float* logits, int width, const DrawOptions& o, SamplerScratch& s) {
  const double mass = weigh(logits, width, o.inverse_temperature, s);
  if (!(mass > 0)) return -1;
  const bool is_filtered = o.top_k > 0 || o.typical_p < 1.0 || o.top_p < 1.0 || o.min_p > 0.0;
  return is_filtered ? draw_filtered(logits, width, mass, o, s) : draw_weight(mass, o.uniform, 0.f, s);
}

constexpr SamplerKernels kSampler = {take_largest, draw, measure};

}  // namespace
}  // namespace proa
