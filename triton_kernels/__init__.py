"""The GPU kernels in Triton, one op (or pair) a file: kernel, launcher, PyTorch reference and byte model together.

Read them in this order: `ring_push` (a copy, and a difference), `ring_blend` (a weighted sum), `prediction_blend` (the
same of more tensors), `cfg_reconstruct` (the same, writing two halves) and `cfg_split` (small matrix products).
`coefficients` names the fields of the vector that every kernel but `cfg_split` reads its numbers from, and `_triton`
holds what the kernels share. Every module imports without Triton; only launching a kernel needs it.
"""
