"""The Triton kernels under `thinktwice_kernels.backends.triton_backend`."""
