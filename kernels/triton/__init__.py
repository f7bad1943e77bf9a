"""Triton kernels and what launches them: tensors in, tensors out, all of them allocated by the caller.

Importing this package imports triton. It imports nothing of effattn beside itself.
"""
