"""Triton kernels and the functions that launch them. Callers allocate the outputs, launchers the workspace.

The files of the operators import triton. Nothing of effattn outside of this folder is imported.
"""
