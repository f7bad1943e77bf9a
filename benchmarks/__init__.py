"""Measures the operators of effattn against their peers: ``python -m benchmarks --help``."""
