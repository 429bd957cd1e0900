"""The backends: one module each behind the protocol of llmpq/kernels/registry.py, and what the GPU ones share."""
