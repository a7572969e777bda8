// What each instruction set implements; runtime.cpp divides the work among threads and calls these.
#pragma once
#include "program.h"

namespace proa {

// Inputs of a linear, made ready by `prepare_row`: float32 rows, or 16-bit codes with a scale for each group.
struct Activations {
  float* values;    // (rows, stride)
  int16_t* codes;   // (rows, stride)
  float* scales;    // (rows, groups)
  int stride;       // inputs rounded up to whole groups
  int groups;       // 0: dense
};

constexpr int kMaxQueries = 6;  // that read the same keys and values at once
// Positions are cut into spans at fixed places, each with a softmax of its own; these are merged first to last. So bits depend
// neither on who computes which span nor on what else is in the batch.
constexpr int kSpan = 256;
constexpr int num_spans(int positions) { return (positions + kSpan - 1) / kSpan; }

struct AttentionItem {
  const float* query[kMaxQueries];  // rotated, scaled
  float* out[kMaxQueries];
  int limit[kMaxQueries];           // keys each query sees
  int count;
  int head_dim;
  const int32_t* blocks;
  const char* k_cache;    // of this layer, at the head
  const char* v_cache;
  ptrdiff_t key_stride;   // bytes between blocks
  ptrdiff_t value_stride;
  int cache_format;
  float* scratch;         // attention_scratch floats
};

// Not shared between files, each of which is compiled for its own instruction set.
static inline int longest_limit(const AttentionItem& item) {
  int longest = 0;
  for (int q = 0; q < item.count; ++q) longest = item.limit[q] > longest ? item.limit[q] : longest;
  return longest;
}

// Floats of what a span leaves to be merged.
constexpr size_t span_floats(int head_dim) { return size_t(kMaxQueries) * (head_dim + 2); }
constexpr size_t attention_scratch(int head_dim, int spans) {
  return size_t(kMaxQueries) * kSpan + spans * span_floats(head_dim);
}

struct Kernels {
  const char* name;
  // Run an op's prologue on one row of `src` and store it as row `row` of `act`. `scratch` holds norm_width floats.
  void (*prepare_row)(const Op& op, const float* src, int row, const Activations& act, float* scratch);
  // out(rows, 16) = activations x panel of `piece`; `tile` is scratch of `tile_floats`.
  void (*panel)(const Piece& piece, int panel, int group, int inputs, const Activations& act, int rows, float* out,
                float* tile);
  void (*attend)(const AttentionItem& item);
  // The same in parts: each span into (count, head_dim + 2) floats; once all are there, one after the other, their merger.
  void (*attend_span)(const AttentionItem& item, int span, float* partials);
  void (*merge_spans)(const AttentionItem& item, float* partials);
  // Normalise (if weight), rotate and scale one head in place.
  void (*rotate)(float* head, int head_dim, int rotary_dim, const float* cos_sin, const float* weight, float eps,
                 float scale);
  void (*write_kv)(const float* k, const float* v, int head_dim, int slot, int format, void* k_block, void* v_block);
  // Narrow `inputs` values to `outputs` runs' largest or mean.
  void (*pool)(const float* x, int inputs, int outputs, int kind, float* out);
  // out = x + amount * (y - x), each of them `width` values; y is at `stream`, which becomes the result.
  void (*mix)(const float* x, const float* gates, int width, float* stream);
  // base = share * base + (1 - share) * up with share = base_share + (1 - scale) * (1 - base_share).
  void (*blend)(const float* base_share, const float* up, float scale, int width, float* base);
  void (*embed)(const void* table, int format, int64_t row, int width, float* out, bool add);
};

constexpr int kTileFloats = 16 * 1024;  // 64 KiB

#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#endif

}  // namespace proa
