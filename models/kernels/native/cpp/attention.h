// Attention over blocks of cached keys and values, and what fills them.
#pragma once
#include "vectors.h"

namespace proa {
namespace {

inline Floats load_int8(const int8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
#if PROA_LANES == 16
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
#else
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
#endif
}

constexpr int element_bytes(int format) { return format == kCacheFloat32 ? 4 : format == kCacheFloat16 ? 2 : 1; }

// Elements of a block, from `index` on; codes are not scaled.
template <int FORMAT>
inline Floats load_cached(const char* block, ptrdiff_t index) {
  const char* p = block + index * element_bytes(FORMAT);
  if constexpr (FORMAT == kCacheFloat32) return load(reinterpret_cast<const float*>(p));
  if constexpr (FORMAT == kCacheFloat16) return load_half(reinterpret_cast<const uint16_t*>(p));
  return load_int8(reinterpret_cast<const int8_t*>(p));
}
template <int FORMAT>
inline float load_cached_one(const char* block, ptrdiff_t index) {
  const char* p = block + index * element_bytes(FORMAT);
  if constexpr (FORMAT == kCacheFloat32) return *reinterpret_cast<const float*>(p);
  if constexpr (FORMAT == kCacheFloat16) return half_to_float(*reinterpret_cast<const uint16_t*>(p));
  return *reinterpret_cast<const int8_t*>(p);
}
// Scales of a block of codes, (groups, 16), which lie behind them.
inline const uint16_t* scales_of(const char* block, int head_dim) {
  return reinterpret_cast<const uint16_t*>(block + head_dim * kBlock);
}

// What COUNT queries see in one span of positions, and where results and scores in between go.
struct Span {
  const AttentionItem& item;
  const int32_t* blocks;
  int longest;      // positions of the span that any query sees
  float* scores;    // (COUNT, kSpan)
  float* partials;  // (COUNT, head_dim + 2): largest score, sum of exp(score - largest), values weighted so

  const char* keys(int block) const { return item.k_cache + blocks[block] * item.key_stride; }
  const char* values(int block) const { return item.v_cache + blocks[block] * item.value_stride; }
  float* partial(int q) const { return partials + q * (item.head_dim + 2); }
};

// Scores of COUNT queries against WIDE blocks of keys. Several blocks at once keep enough sums in flight.
template <int COUNT, int FORMAT, int WIDE>
inline void score_blocks(const Span& span, int block, int last) {
  const AttentionItem& item = span.item;
  const char *keys[WIDE], *next[WIDE];
  for (int w = 0; w < WIDE; ++w) {
    keys[w] = span.keys(block + w);
    next[w] = span.keys(std::min(block + w + WIDE, last));
  }
  for (int start = 0, end; start < item.head_dim; start = end) {
    end = FORMAT == kCacheInt8 ? std::min(start + kKeyGroup, item.head_dim) : item.head_dim;
    Floats total[COUNT][WIDE * kVectors] = {};
    for (int e = start; e < end; ++e) {
      Floats key[WIDE * kVectors];
      for (int w = 0; w < WIDE; ++w) prefetch(next[w] + e * kBlock * element_bytes(FORMAT));
#pragma GCC unroll 4
      for (int v = 0; v < WIDE * kVectors; ++v)
        key[v] = load_cached<FORMAT>(keys[v / kVectors], e * kBlock + v % kVectors * kLanes);
#pragma GCC unroll 8
      for (int q = 0; q < COUNT; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE * kVectors; ++v) total[q][v] += key[v] * splat(item.query[q][e]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < WIDE * kVectors; ++v) {
      Floats scale = {};
      if constexpr (FORMAT == kCacheInt8)
        scale = load_bfloat(scales_of(keys[v / kVectors], item.head_dim) + start / kKeyGroup * kBlock + v % kVectors * kLanes);
#pragma GCC unroll 8
      for (int q = 0; q < COUNT; ++q) {
        float* scores = span.scores + q * kSpan + block * kBlock + v * kLanes;
        Floats score = total[q][v];
        if constexpr (FORMAT == kCacheInt8) score = start ? load(scores) + score * scale : score * scale;
        store(scores, score);
      }
    }
  }
}

// Channels e .. e + 16 * WIDE of what COUNT queries attend to; scores hold unnormalised weights.
template <int COUNT, int FORMAT, int WIDE>
inline void mix_values(const Span& span, int e) {
  const int dim = span.item.head_dim, last = (span.longest - 1) / kBlock;
  Floats total[COUNT][WIDE * kVectors] = {};
  for (int block = 0; block <= last; ++block) {
    const char *values = span.values(block), *next = span.values(std::min(block + 1, last));
    const int count = std::min(kBlock, span.longest - block * kBlock);
    const float* weights = span.scores + block * kBlock;
    for (int p = 0; p < count; ++p) {
      prefetch(next + (p * dim + e) * element_bytes(FORMAT));
      Floats value[WIDE * kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < WIDE * kVectors; ++v) value[v] = load_cached<FORMAT>(values, p * dim + e + v * kLanes);
#pragma GCC unroll 8
      for (int q = 0; q < COUNT; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE * kVectors; ++v) total[q][v] += value[v] * splat(weights[q * kSpan + p]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < COUNT; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE * kVectors; ++v) store(span.partial(q) + 2 + e + v * kLanes, total[q][v]);
}

// Channels e .. e + WIDE - 1 of what COUNT queries attend to, from values stored like keys.
template <int COUNT, int FORMAT, int WIDE>
inline void mix_transposed(const Span& span, int e) {
  Floats total[COUNT][WIDE] = {};
  const auto add = [&](const float* weights, const auto& load_value) {
#pragma GCC unroll 2
    for (int v = 0; v < kBlock; v += kLanes) {
      Floats value[WIDE];
#pragma GCC unroll 2
      for (int w = 0; w < WIDE; ++w) value[w] = load_value(w, v);
#pragma GCC unroll 8
      for (int q = 0; q < COUNT; ++q) {
        const Floats weight = load(weights + q * kSpan + v);
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; ++w) total[q][w] += value[w] * weight;
      }
    }
  };
  int block = 0;
  for (; (block + 1) * kBlock <= span.longest; ++block) {
    const char* values = span.values(block);
    add(span.scores + block * kBlock, [&](int w, int v) { return load_cached<FORMAT>(values, (e + w) * kBlock + v); });
  }
  if (block * kBlock < span.longest) {
    // What lies behind the last position may be anything, even not a number.
    float padded[WIDE][kBlock] = {};
    const char* values = span.values(block);
    for (int w = 0; w < WIDE; ++w)
      for (int p = 0; p < span.longest - block * kBlock; ++p)
        padded[w][p] = load_cached_one<FORMAT>(values, (e + w) * kBlock + p);
    add(span.scores + block * kBlock, [&](int w, int v) { return load(&padded[w][v]); });
  }
  for (int q = 0; q < COUNT; ++q)
    for (int w = 0; w < WIDE; ++w) span.partial(q)[2 + e + w] = sum(total[q][w]);
}

// Turn scores into weights exp(score - largest), 0 beyond the limit; give the largest score and the weights' sum.
inline void softmax(float* scores, int limit, int padded, float* largest, float* total) {
  std::fill(scores + std::clamp(limit, 0, padded), scores + padded, -std::numeric_limits<float>::infinity());
  Floats most = load(scores);
  for (int i = kLanes; i < padded; i += kLanes) {
    const Floats x = load(scores + i);
    most = x > most ? x : most;
  }
  float max = most[0];
  for (int i = 1; i < kLanes; ++i) max = std::max(max, most[i]);
  *largest = max;
  if (limit <= 0) max = 0.f;  // of nothing, weights are 0
  Floats sums = {};
  for (int i = 0; i < padded; i += kLanes) {
    const Floats weight = exponential(load(scores + i) - splat(max));
    store(scores + i, weight);
    sums += weight;
  }
  *total = sum(sums);
}

// Let weights carry the scales of the values that they are multiplied with.
template <int COUNT>
inline void scale_weights(const Span& span) {
  for (int block = 0; block * kBlock < span.longest; ++block) {
    const uint16_t* scales = scales_of(span.values(block), span.item.head_dim);
    float* weights = span.scores + block * kBlock;
    for (int v = 0; v < kBlock; v += kLanes)
      for (int q = 0; q < COUNT; ++q)
        store(weights + q * kSpan + v, load(weights + q * kSpan + v) * load_bfloat(scales + v));
  }
  // As above, what lies behind the last position may be anything.
  for (int q = 0; q < COUNT; ++q)
    for (int p = span.longest; p % kBlock; ++p) span.scores[q * kSpan + p] = 0.f;
}

template <int COUNT, int FORMAT>
void attend_queries(const AttentionItem& item, int index, float* partials) {
  constexpr int kWide = COUNT <= 3 ? 2 : 1;
  const int start = index * kSpan, longest = std::min(longest_limit(item) - start, kSpan);
  const Span span{item, item.blocks + start / kBlock, longest, item.scratch, partials};
  const int blocks = (longest + kBlock - 1) / kBlock, dim = item.head_dim;
  int block = 0;
  for (; block + kWide <= blocks; block += kWide) score_blocks<COUNT, FORMAT, kWide>(span, block, blocks - 1);
  if (block < blocks) score_blocks<COUNT, FORMAT, 1>(span, block, blocks - 1);
  for (int q = 0; q < COUNT; ++q)
    softmax(span.scores + q * kSpan, item.limit[q] - start, blocks * kBlock, span.partial(q), span.partial(q) + 1);
  if constexpr (FORMAT == kCacheInt8) scale_weights<COUNT>(span);
  int e = 0;
  if (is_transposed(dim)) {
    for (; e + 2 <= dim; e += 2) mix_transposed<COUNT, FORMAT, 2>(span, e);
    if (e < dim) mix_transposed<COUNT, FORMAT, 1>(span, e);
    return;
  }
  for (; e + kWide * kPanel <= dim; e += kWide * kPanel) mix_values<COUNT, FORMAT, kWide>(span, e);
  for (; e + kPanel <= dim; e += kPanel) mix_values<COUNT, FORMAT, 1>(span, e);
}

template <int COUNT>
void attend_count(const AttentionItem& item, int span, float* partials) {
  if (item.count != COUNT) {
    if constexpr (COUNT > 1) attend_count<COUNT - 1>(item, span, partials);
  } else if (item.cache_format == kCacheFloat16) {
    attend_queries<COUNT, kCacheFloat16>(item, span, partials);
  } else if (item.cache_format == kCacheInt8) {
    attend_queries<COUNT, kCacheInt8>(item, span, partials);
  } else {
    attend_queries<COUNT, kCacheFloat32>(item, span, partials);
  }
}

void attend_span(const AttentionItem& item, int span, float* partials) { attend_count<kMaxQueries>(item, span, partials); }

void merge_spans(const AttentionItem& item, float* partials) {
  const int dim = item.head_dim;
  const ptrdiff_t stride = ptrdiff_t(item.count) * (dim + 2);
  for (int q = 0; q < item.count; ++q) {
    const int spans = num_spans(item.limit[q]);
    float* first = partials + q * (dim + 2);
    float largest = first[0];
    for (int s = 1; s < spans; ++s) largest = std::max(largest, first[s * stride]);
    float total = 0;
    for (int s = 0; s < spans; ++s) {
      float* partial = first + s * stride;
      partial[0] = spans == 1 ? 1.f : exponential(splat(partial[0] - largest))[0];
      total += partial[0] * partial[1];
    }
    const float inverse = 1.f / total;
    int e = 0;
    for (; e + kLanes <= dim; e += kLanes) {
      Floats value = {};
      for (int s = 0; s < spans; ++s) value += load(first + s * stride + 2 + e) * splat(first[s * stride]);
      store(item.out[q] + e, value * splat(inverse));
    }
    for (; e < dim; ++e) {
      float value = 0;
      for (int s = 0; s < spans; ++s) value += first[s * stride + 2 + e] * first[s * stride];
      item.out[q][e] = value * inverse;
    }
  }
}

void attend(const AttentionItem& item) {
  float* partials = item.scratch + kMaxQueries * kSpan;
  const int spans = num_spans(longest_limit(item));
  for (int span = 0; span < spans; ++span)
    attend_span(item, span, partials + ptrdiff_t(span) * item.count * (item.head_dim + 2));
  merge_spans(item, partials);
}

void rotate(float* head, int head_dim, int rotary_dim, const float* cos_sin, const float* weight, float eps, float scale) {
  if (weight) {
    const float factor = 1.f / std::sqrt(sum_of_squares(head, head_dim, 0.f) / head_dim + eps);
    for (int i = 0; i < head_dim; ++i) head[i] = head[i] * factor * weight[i];
  }
  const int half = rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float cosine = cos_sin[i], sine = cos_sin[half + i], a = head[i], b = head[half + i];
    head[i] = a * cosine - b * sine;
    head[half + i] = b * cosine + a * sine;
  }
  if (scale != 1.f)
    for (int i = 0; i < head_dim; ++i) head[i] *= scale;
}

// Round channels to codes, `step` elements apart, and return the bits of their scale: the bfloat16 next above largest / 127.
uint16_t quantize(const float* x, int count, int step, int8_t* codes) {
  Floats most = {};
  int e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    const Floats value = load(x + e), size = value < Floats{} ? -value : value;
    most = size > most ? size : most;
  }
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  for (; e < count; ++e) largest = std::max(largest, std::fabs(x[e]));
  const float exact = std::min(largest, std::numeric_limits<float>::max()) / 127.f;
  uint32_t bits;
  std::memcpy(&bits, &exact, 4);
  const uint16_t scale = uint16_t((bits + 0xffff) >> 16);
  const float inverse = scale ? 1.f / bfloat_to_float(scale) : 0.f;
  for (e = 0; e < count; ++e)
    codes[e * step] = int8_t(_mm_cvtss_si32(_mm_set_ss(std::min(127.f, std::max(-127.f, x[e] * inverse)))));
  return scale;
}

void write_kv(const float* k, const float* v, int head_dim, int slot, int format, void* k_block, void* v_block) {
  const bool turned = is_transposed(head_dim);
  const ptrdiff_t start = turned ? slot : ptrdiff_t(slot) * head_dim, step = turned ? kBlock : 1;
  if (format == kCacheInt8) {
    int8_t *keys = static_cast<int8_t*>(k_block), *values = static_cast<int8_t*>(v_block);
    const auto place = [&](int8_t* block, int group, uint16_t scale) {
      std::memcpy(block + (head_dim + group * 2) * kBlock + slot * 2, &scale, 2);
    };
    for (int e = 0; e < head_dim; e += kKeyGroup)
      place(keys, e / kKeyGroup,
            quantize(k + e, std::min(kKeyGroup, head_dim - e), kBlock, keys + e * kBlock + slot));
    place(values, 0, quantize(v, head_dim, int(step), values + start));
  } else if (format == kCacheFloat16) {
    uint16_t* keys = static_cast<uint16_t*>(k_block) + slot;
    uint16_t* values = static_cast<uint16_t*>(v_block) + start;
    for (int e = 0; e < head_dim; ++e) {
      keys[e * kBlock] = float_to_half(k[e]);
      values[e * step] = float_to_half(v[e]);
    }
  } else {
    float* keys = static_cast<float*>(k_block) + slot;
    float* values = static_cast<float*>(v_block) + start;
    for (int e = 0; e < head_dim; ++e) {
      keys[e * kBlock] = k[e];
      values[e * step] = v[e];
    }
  }
}

}  // namespace
}  // namespace proa
