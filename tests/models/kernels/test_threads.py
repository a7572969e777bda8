"""Barriers of the native kernels' threads, compiled from their header alone."""

import subprocess
from pathlib import Path

from models.kernels.native import library

HEADER = Path(library.__file__).with_name("cpp") / "threads.h"
PROGRAM = f"""
#include <climits>
#include <thread>
#define private public
#include "{HEADER}"

int main() {{
  proa::Barrier barrier(2);
  barrier.phase_ = INT_MAX - 1;
  const auto meet = [&] {{ for (int i = 0; i < 4; ++i) barrier.wait(); }};
  std::thread other(meet);
  meet();
  other.join();
}}
"""


SLEEPERS = f"""
#include <chrono>
#include <thread>
#include <vector>
#include "{HEADER}"

int main() {{
  const int count = 5, rounds = 300;
  proa::Barrier barrier(count);
  std::atomic<int> arrived{{0}}, early{{0}};
  const auto meet = [&](int thread) {{
    for (int i = 1; i <= rounds; ++i) {{
      // One comes after the others sleep, another one each time.
      if (i % count == thread) std::this_thread::sleep_for(std::chrono::microseconds(i % 7 * 50));
      ++arrived;
      barrier.wait();
      if (arrived < i * count) ++early;
      barrier.wait();
    }}
  }};
  std::vector<std::thread> others;
  for (int t = 1; t < count; ++t) others.emplace_back(meet, t);
  meet(0);
  for (auto& other : others) other.join();
  return early;
}}
"""


def test_barrier_holds_and_wakes_threads_that_sleep(tmp_path: Path, compiler: str) -> None:
    source, program = tmp_path / "barrier.cpp", tmp_path / "barrier"
    source.write_text(SLEEPERS)
    flags = ["-std=c++17", "-O2", "-pthread", "-o", str(program)]
    subprocess.run([*compiler.split(), *flags, str(source)], check=True)
    subprocess.run([program], check=True, timeout=60)


def test_barrier_passes_the_largest_phase_of_a_signed_count(tmp_path: Path, compiler: str) -> None:
    source, program = tmp_path / "barrier.cpp", tmp_path / "barrier"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-pthread", "-fsanitize=signed-integer-overflow"]
    flags += ["-fsanitize-undefined-trap-on-error", "-o", str(program)]
    subprocess.run([*compiler.split(), *flags, str(source)], check=True)
    subprocess.run([program], check=True, timeout=60)
