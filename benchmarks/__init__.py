"""Benchmarks of a source tree: whole models, host overhead, and the report of a GPU."""
