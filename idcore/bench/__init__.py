"""Benchmarks: `python -m idcore.bench id_attention | peak | e2e`. Parity first, interleaved medians, one JSON object."""
