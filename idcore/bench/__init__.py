"""Benchmarks: `python -m idcore.bench COMMAND`. Parity first, interleaved medians, one JSON object."""
