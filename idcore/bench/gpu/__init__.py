"""`python -m idcore.bench gpu --out DIR`: build, test, sanitize and time the GPU kernels, in under nine minutes.

Needs torch, triton, numpy and pytest, and nvcc with cmake, ninja and pybind11 for the CUDA part; no network, no
diffusers. Each part runs in a process of its own, so that a fault in one leaves the others standing, and saves what it
finds as it goes. Everything is in DIR/gpu.json and DIR/gpu.md, output in DIR/gpu.log. `--parts` runs some parts; a
later run with the same DIR adds to what is there. `--dry` runs a few small calls of every part on the CPU instead:
the flow without the figures.
"""
