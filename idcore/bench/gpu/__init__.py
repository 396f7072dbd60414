"""`python -m idcore.bench gpu --out DIR`: build, test, sanitize and time the GPU kernels, in under nine minutes.

Needs torch, triton, numpy and pytest, and nvcc with cmake, ninja and pybind11 for the CUDA part; no network, no
diffusers. Each part runs in a process of its own, so that a fault in one leaves the others standing, and writes
DIR/PART.json; the summary is DIR/gpu.json and DIR/gpu.md. `--parts` runs some of them; a later run with the same DIR
adds to what is there.
"""
