// Which kernels run here: those that the processor has, and of them those that prove fastest.
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "panels.h"

namespace proa {
namespace {

bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// The processor has tiles of 8-bit integers, and the system lets this process have their state.
bool has_amx() {
#ifdef __linux__
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kXsave = 1u << 27, kStates = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0, high = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kInt8)) != (kTile | kInt8)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsave)) return false;
  asm("xgetbv" : "=a"(a), "=d"(high) : "c"(0));
  return (a & kStates) == kStates && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Widest first.
std::vector<const Kernels*> find_supported() {
  std::vector<const Kernels*> found;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return found;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    if (has_amx()) found.push_back(kernels_amx());
    found.push_back(kernels_avx512());
  }
  if (has_avx_vnni()) found.push_back(kernels_avxvnni());
  found.push_back(kernels_avx2());
  return found;
}

// Times a product of a few panels: the fastest of several runs, in nanoseconds.
class Trial {
 public:
  Trial() {
    for (size_t i = 0; i < panels_.size(); ++i) panels_[i] = i * 37 % 61;  // no scale becomes infinite
    for (size_t i = 0; i < codes_.size(); ++i) codes_[i] = int(i * 73 % 255) - 127;
    for (size_t i = 0; i < row_groups_.size(); ++i) row_groups_[i] = {1.f + i % 7, i % 5 - 2.f, {}};
  }
  // What it came to the last time.
  const std::vector<float>& out() const { return out_; }
  double time(const Kernels& kernels, int rows) {
    const Piece piece = {panels_.data(), nullptr, nullptr, kQ41, kPanels * kPanel, 0, 0};
    const Activations act = {nullptr, nullptr, nullptr, kInputs, kInputs / kGroup, rows, codes_.data(), row_groups_.data(), kByte};
    float* tile = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(tile_.data()) + 63) / 64 * 64);
    double best = 1e30;
    for (int i = 0; i < kRuns; ++i) {
      const auto start = std::chrono::steady_clock::now();
      for (int p = 0; p < kPanels; ++p) kernels.panel(piece, p, kGroup, kInputs, act, rows, out_.data(), tile);
      best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
  }
  static constexpr int kManyRows = 24;

 private:
  static constexpr int kInputs = 1024, kPanels = 8, kRuns = 20;
  std::vector<uint8_t> panels_ = std::vector<uint8_t>(block_format(kQ41).panel_bytes(kInputs) * kPanels);
  std::vector<int8_t> codes_ = std::vector<int8_t>(kManyRows * kInputs);
  std::vector<RowGroup> row_groups_ = std::vector<RowGroup>(kManyRows * kInputs / kGroup);
  std::vector<float> out_ = std::vector<float>(kManyRows * kPanel), tile_ = std::vector<float>(kTileFloats + 16);
};

// A wider set must not be clearly slower, so that noise does not choose, and must come to the same bits.
const Kernels& fastest(const std::vector<const Kernels*>& supported, Trial& trial, int rows) {
  const Kernels* best = supported.back();
  double least = trial.time(*best, rows);
  const std::vector<float> expected = trial.out();
  for (auto it = supported.rbegin() + 1; it != supported.rend(); ++it) {
    const double time = trial.time(**it, rows);
    if (time < least * 1.1 && trial.out() == expected) best = *it, least = std::min(least, time);
  }
  return *best;
}

Kernels measure(const std::vector<const Kernels*>& supported) {
  Trial trial;
  const Kernels& few = fastest(supported, trial, 1);
  Kernels chosen = fastest(supported, trial, Trial::kManyRows);
  if (few.name != chosen.name) {
    static const std::string name = std::string(few.name) + "+" + chosen.name;
    chosen.name = name.c_str();
  }
  chosen.few = few.few;
  return chosen;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  static const std::vector<const Kernels*> supported = find_supported();
  if (supported.empty()) return nullptr;
  if (std::strcmp(name, "auto") == 0) {
    static const Kernels chosen = measure(supported);
    return &chosen;
  }
  for (const Kernels* kernels : supported)
    if (std::strcmp(name, kernels->name) == 0) return kernels;
  return std::strcmp(name, "tiles") == 0 ? kernels_tiles() : nullptr;
}

}  // namespace proa
