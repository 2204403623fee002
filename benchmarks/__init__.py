"""Benchmarks: every figure of the project comes from one of these scripts. `gpo-fast bench` runs them."""
