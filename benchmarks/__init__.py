"""Benchmarks that people run; `benchmarks/README.md` says how. Results are kept in `results/`."""
