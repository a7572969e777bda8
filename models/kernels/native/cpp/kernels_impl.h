// The kernels, written once over vectors of PROA_LANES floats. Included by one file for each instruction set.
//
// Every result for a row depends on that row alone and is summed in one fixed order, so a batch gives the same bits as its
// rows one by one.
#include "attention.h"
#include "linear.h"
#include "vectors.h"

namespace proa {
namespace {

// ---- side networks -----------------------------------------------------------------------------------------------------

void pool(const float* x, int inputs, int outputs, int kind, float* out) {
  const int run = inputs / outputs;
  for (int o = 0; o < outputs; ++o, x += run) {
    float value = x[0];
    for (int i = 1; i < run; ++i) value = kind == kMaxPool ? std::max(value, x[i]) : value + x[i];
    out[o] = kind == kMaxPool ? value : value / run;
  }
}

void mix(const float* x, const float* gates, int width, float* stream) {
  for (int i = 0; i < width; ++i) stream[i] = x[i] + gates[i] * (stream[i] - x[i]);
}

void blend(const float* base_share, const float* up, float scale, int width, float* base) {
  for (int i = 0; i < width; ++i) {
    const float share = base_share[i] + (1.f - scale) * (1.f - base_share[i]);
    base[i] = share * base[i] + (1.f - share) * up[i];
  }
}

void embed(const void* table, int format, int64_t row, int width, float* out, bool add) {
  if (is_blocks(format))
    return with_format(format, [&](auto known) { read_output<decltype(known)::value>(table, row, width, out, add); });
  for (int i = 0; i < width; ++i) {
    float value;
    if (format == kFloat32)
      value = static_cast<const float*>(table)[row * width + i];
    else if (format == kFloat16)
      value = half_to_float(static_cast<const uint16_t*>(table)[row * width + i]);
    else
      value = bfloat_to_float(static_cast<const uint16_t*>(table)[row * width + i]);
    out[i] = add ? out[i] + value : value;
  }
}

constexpr Kernels kTable = {PROA_NAME, panel, panel, write_rows, prepare_row, attend, attend_span, merge_spans, rotate, write_kv, pool, mix, blend, embed};

}  // namespace
}  // namespace proa
