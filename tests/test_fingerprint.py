"""What a fingerprint remembers of tensors: a sample of elements, and a checksum (csrc/python/fingerprint.cpp)."""

from __future__ import annotations

import pytest
import torch

from effattn.nn import fold_cache

pytestmark = pytest.mark.arguments


def contents(*tensors, max_elements=100, with_checksum=False):
    return fold_cache._C.Contents([fold_cache._in_memory(t) for t in tensors], max_elements, with_checksum)


def test_wrong_descriptions_are_refused():
    with pytest.raises(ValueError, match="width: expected"):
        fold_cache._C.Contents([(0, (1,), (1,), 3)], 10, False)
    with pytest.raises(ValueError, match="sizes and strides"):
        fold_cache._C.Contents([(0, (1, 2), (1,), 4)], 10, False)


def test_the_sample_is_a_diagonal():
    t = torch.arange(12.0).reshape(3, 4)
    assert contents(t).sample_size == 4
    assert contents(t, max_elements=2).sample_size == 1  # every fifth: the next that no size divides
    assert contents(torch.empty(0, 4), torch.tensor(1.0)).sample_size == 1


@pytest.mark.parametrize("shape", [(4, 6), (8, 16, 3, 3), (64, 1, 5, 5), (5, 5), (96, 64)], ids=str)
def test_thinned_out_samples_leave_no_rows_out_by_a_pattern(shape):
    t = torch.zeros(shape)
    looked_at = set()
    for row in range(shape[0]):
        sample = contents(t, max_elements=max(shape) // 2)
        t[row] = 1
        if not sample.sample_holds():
            looked_at.add(row)
    rows = sorted(looked_at)
    assert len(rows) >= shape[0] // 8
    assert {row % 2 for row in rows} == {0, 1} or len(rows) == 1


def test_every_change_of_an_element_of_a_diagonal_is_seen():
    """In every width, and for numbers that compare equal or to nothing."""
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.float64, torch.complex128):
        t = torch.zeros(3, 5, dtype=dtype)
        sample = contents(t)
        assert sample.sample_holds() and sample.sample_size == 5
        t[1, 4] = 1
        assert not sample.sample_holds()
    assert contents(torch.tensor([float("nan")])).sample_holds()
    zero = torch.tensor([0.0])
    sample = contents(zero)
    zero.neg_()
    assert not sample.sample_holds()


@pytest.mark.parametrize("size", [1, 7, 32, 33, 100])
def test_every_change_changes_the_checksum(size):
    t = torch.zeros(size, dtype=torch.uint8)
    whole = contents(t, with_checksum=True)
    assert whole.hold() and not contents(t).hold(), "without a checksum nothing is known"
    for i in range(size):
        t[i] = 1
        assert not whole.hold()
        t[i] = 0
    assert whole.hold()
    strided = torch.zeros(size, 2)[:, 0]
    whole = contents(strided, with_checksum=True)
    strided[-1] = 1
    assert not whole.hold()
