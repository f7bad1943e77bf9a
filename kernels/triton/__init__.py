"""Triton kernels and what launches them: tensors in, tensors out, which the caller allocates, but for what is between.

The files of the operators import triton. Nothing of effattn outside of this folder is imported.
"""
