// Take the next tokens of a batch: the rows are divided among the threads, and each row is worked on by one of them.
#include "sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "threads.h"

namespace proa {

void SamplerScratch::reserve(int width) {
  if (width <= capacity) return;
  const int num_blocks = (width + kWeightBlock - 1) / kWeightBlock, padded = num_blocks * kWeightBlock + kMaxLanes;
  for (auto* floats : {&logits, &weights, &candidates, &left[0], &left[1]}) floats->reset(new float[padded]);
  lane_max.reset(new float[num_blocks * kMaxLanes]);
  sums.reset(new double[num_blocks]);
  capacity = width;
}

// Of one row, as picker.py fills them.
struct RowOptions {
  double temperature, uniform, top_k, typical_p, top_p, min_p;
};
struct Penalties {
  float repetition, frequency, presence;
};
struct RowEdits {
  const int64_t* bias_ids;
  const float* biases;
  int64_t num_biases;
  const int64_t* count_ids;
  const float* counts;     // how often each was generated
  const float* in_prompt;  // 1 where the prompt has it
  int64_t num_counts;
  const int64_t* banned_ids;
  int64_t num_banned;
  bool any() const { return num_biases || num_counts || num_banned; }
};

namespace {

constexpr float kMaxLogit = 1e30f;

// Bias, penalties and bans, as decoding/penalties.py defines them.
void apply_edits(const Penalties& penalties, const RowEdits& edits, float* logits) {
  const auto [repetition, frequency, presence] = penalties;
  for (int64_t i = 0; i < edits.num_biases; ++i) logits[edits.bias_ids[i]] += edits.biases[i];
  for (int64_t i = 0; i < edits.num_counts; ++i) {
    float& logit = logits[edits.count_ids[i]];
    const float times = edits.counts[i];
    const float is_generated = times > 0.f ? 1.f : 0.f;
    if ((is_generated > 0.f || edits.in_prompt[i] > 0.f) && std::isfinite(logit)) {
      const float scaled = logit > 0.f ? logit / repetition : logit * repetition;
      logit = std::min(kMaxLogit, std::max(-kMaxLogit, scaled));
    }
    logit = (logit - frequency * times) - presence * is_generated;
  }
  for (int64_t i = 0; i < edits.num_banned; ++i) logits[edits.banned_ids[i]] = -std::numeric_limits<float>::infinity();
}

const SamplerKernels* find_sampler(const char* name) {
  const std::string kernels = name;
  return kernels == "avx512" || kernels == "amx" ? sampler_avx512() : sampler_avx2();
}

// Give each row of logits, after its edits if there are any, to job(row, logits, scratch); without a pool on this thread.
template <class Job>
void each_row(void* pool, const float* logits, int num_rows, int width, const Penalties* penalties, const RowEdits* edits,
              Job job) {
  std::atomic<int> next{0};
  const auto work = [&](int) {
    thread_local SamplerScratch scratch;
    scratch.reserve(width);
    for (int row; (row = next.fetch_add(1, std::memory_order_relaxed)) < num_rows;) {
      const float* taken = logits + int64_t(row) * width;
      if (edits && edits[row].any()) {
        std::memcpy(scratch.logits.get(), taken, size_t(width) * sizeof(float));
        apply_edits(penalties[row], edits[row], scratch.logits.get());
        taken = scratch.logits.get();
      }
      job(row, taken, scratch);
    }
  };
  if (num_rows == 1 || !pool) return work(0);
  auto* threads = static_cast<Pool*>(pool);
  const auto turn = threads->acquire();
  threads->run(work);
}

}  // namespace
}  // namespace proa

extern "C" {

// Write the token of each of the (num_rows, width) logits; -1 where they are not numbers. A temperature of 0 is greedy.
void proa_sample(void* pool, const char* kernels, const float* logits, int num_rows, int width,
                 const proa::Penalties* penalties, const proa::RowEdits* edits, const proa::RowOptions* options,
                 int64_t* token_ids) {
  using namespace proa;
  const SamplerKernels* table = find_sampler(kernels);
  // Greedy rows take less time than waking the threads.
  const bool is_greedy = std::all_of(options, options + num_rows, [](const RowOptions& o) { return o.temperature == 0.0; });
  if (is_greedy) pool = nullptr;
  each_row(pool, logits, num_rows, width, penalties, edits, [=](int row, const float* taken, SamplerScratch& scratch) {
    const RowOptions& o = options[row];
    if (o.temperature == 0.0) {
      token_ids[row] = table->take_largest(taken, width);
      return;
    }
    const DrawOptions of_row = {1.f / float(o.temperature), o.uniform, int64_t(o.top_k), o.typical_p, o.top_p, o.min_p};
    token_ids[row] = table->draw(taken, width, of_row, scratch);
  });
}

// Write what SamplerKernels::measure finds of each row.
void proa_measure(void* pool, const char* kernels, const float* logits, int num_rows, int width,
                  const proa::Penalties* penalties, const proa::RowEdits* edits, double* entropies, double* log_masses,
                  int64_t* num_possible) {
  using namespace proa;
  const SamplerKernels* table = find_sampler(kernels);
  each_row(pool, logits, num_rows, width, penalties, edits, [=](int row, const float* taken, SamplerScratch&) {
    table->measure(taken, width, &entropies[row], &log_masses[row], &num_possible[row]);
  });
}

}  // extern "C"
