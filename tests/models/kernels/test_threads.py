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


def test_barrier_passes_the_largest_phase_of_a_signed_count(tmp_path: Path, compiler: str) -> None:
    source, program = tmp_path / "barrier.cpp", tmp_path / "barrier"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-pthread", "-fsanitize=signed-integer-overflow"]
    flags += ["-fsanitize-undefined-trap-on-error", "-o", str(program)]
    subprocess.run([*compiler.split(), *flags, str(source)], check=True)
    subprocess.run([program], check=True, timeout=60)
