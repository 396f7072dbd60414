"""Triton kernels. Importing this package imports no Triton; its modules do.

Each kernel runs on the CPU under TRITON_INTERPRET=1 (set before the module is imported) and compiles ahead
of time for sm_80, sm_90 and sm_100 without a GPU (`idcore.kernels.ahead`).
"""
