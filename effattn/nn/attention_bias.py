"""Biases on pairs of tokens, from a table over their distances."""

from __future__ import annotations

import torch
from torch.nn import functional

Size = tuple[int, int]


def gather_attention_bias(
    table: torch.Tensor, resolution: Size, size: Size, stride: int = 1, index: torch.Tensor | None = None
) -> torch.Tensor:
    """A bias for every query and key of an image: the table's entry at their distances down and across.

    Args:
        table: (heads, rh * rw), row by row, for distances (0, 0) to (rh - 1, rw - 1).
        resolution: (rh, rw).
        size: (H, W) of the image. A table of another resolution is resized.
        stride: every so manieth row and column has a query; keys are all tokens.
        index: what :func:`attention_bias_index` says for ``resolution``, if it is at hand: a constant to compilers.

    Returns:
        (heads, queries, H * W), differentiable in the table.
    """
    if resolution == size and index is not None:
        return table[:, index]
    return resize_attention_biases(table, resolution, size)[:, attention_bias_index(size, stride, table.device)]


def gather_attention_map(table: torch.Tensor, index: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """A bias of as many queries and keys as there are: gathered for the table's own, then resized as an image is.

    The authors of EfficientFormer do so for detection and segmentation, whatever the shape of the image.

    Args:
        table: (heads, entries).
        index: which entry a pair of tokens has, of the queries and keys that the table was made for.
        queries, keys: those of the image.

    Returns:
        (heads, queries, keys), differentiable in the table.
    """
    return _resized(table[:, index], (queries, keys))


def attention_bias_index(size: Size, stride: int = 1, device: torch.device | None = None) -> torch.Tensor:
    """(queries, H * W): where in a table of ``size`` the bias of a pair stands."""
    y, x = (torch.arange(n, device=device) for n in size)
    down = (y[::stride, None] - y).abs()  # (rows of queries, H)
    across = (x[::stride, None] - x).abs()
    index = down[:, None, :, None] * size[1] + across[None, :, None, :]
    return index.reshape(-1, size[0] * size[1])


def resize_attention_biases(
    table: torch.Tensor, resolution: Size, size: Size, *, antialias: bool = False
) -> torch.Tensor:
    """(heads, rh * rw) -> (heads, H * W), bicubically, as the authors of EfficientViT do for detection."""
    return _resized(table.unflatten(1, resolution), size, antialias).flatten(1)


def _resized(images: torch.Tensor, size: Size, antialias: bool = False) -> torch.Tensor:
    """(heads, H, W) -> (heads, *size); narrow types are resized in float32."""
    if images.shape[1:] == size:
        return images
    wide = images.unsqueeze(0).to(torch.promote_types(images.dtype, torch.float32))
    return functional.interpolate(wide, size=size, mode="bicubic", antialias=antialias).to(images.dtype)[0]
