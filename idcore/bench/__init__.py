"""Benchmarks: `python -m idcore.bench id_attention | peak`. Parity first, interleaved medians, one JSON object."""
