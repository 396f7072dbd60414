"""Backends of the ops. Each is a module with NAME, DIFFERENTIABLE, `why_not(call)` and `forward(args, out)`."""
