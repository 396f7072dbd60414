"""Benchmarks: `python -m idcore.bench --help`. Parity first, interleaved medians, one JSON object."""
