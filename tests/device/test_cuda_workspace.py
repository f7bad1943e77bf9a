"""What a call of the CUDA kernels allocates: its results, and the workspace that its sizes ask for."""

from __future__ import annotations

import math

import pytest
from cuda_only import SCALARS, cuda_only, workspace_of_inference
from specified import mapped

from effattn.backends.triton import LAUNCHERS
from effattn.ops import OPERATORS
from effattn.testing import make_arguments

#: Parts whose sums over tokens are added up, at most: tokens are split into no more (kMaxParts of reduction.cu).
PARTS = 64


@cuda_only
@pytest.mark.parametrize("name", LAUNCHERS)
def test_inference_allocates_no_more_than_planned(device, backend, name):
    """Sums are of the size of what a backward would be given; other operators take no workspace."""
    operator = OPERATORS[name]
    for case in operator.cases:
        arguments = mapped(lambda t: t.to(device), make_arguments(operator, case))
        sizes = operator.signature.sizes(arguments)
        sums = sum(4 * math.prod(kept.shape.sizes(sizes)) for kept in operator.signature.kept)
        assert 0 <= workspace_of_inference(operator, arguments, device) <= (1 + PARTS) * sums + SCALARS, case
