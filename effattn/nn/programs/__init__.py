"""What blocks of networks are as programs of :mod:`effattn.ops.block`, by the names of their classes."""

from effattn.nn.programs import convolutions, efficientformer, efficientvit_mit, efficientvit_msra
from effattn.nn.programs.convolutions import one_of, parts_in_order
from effattn.nn.programs.emit import Unknown, is_trusted, make_program

_EFFICIENTVIT_BLOCK = one_of(
    ("context_module", parts_in_order("context_module", "local_module")),
    ("mixer", parts_in_order("dw0", "ffn0", "mixer", "dw1", "ffn1")),
)

#: Of modules with the name of a class; of two networks some have the same.
EMITTERS = {
    **convolutions.EMITTERS,
    **efficientvit_mit.EMITTERS,
    **efficientvit_msra.EMITTERS,
    **efficientformer.EMITTERS,
    "EfficientVitBlock": _EFFICIENTVIT_BLOCK,
    "EfficientViTBlock": _EFFICIENTVIT_BLOCK,
    "EfficientVitStage": parts_in_order("downsample", "blocks"),
    "EfficientVitLargeStage": parts_in_order("blocks"),
    "EfficientFormerStage": parts_in_order("downsample", "blocks"),
    "EfficientFormerV2Stage": parts_in_order("downsample", "blocks"),
}

#: Of these, those that are no blocks by themselves: their tensors are (B, N, C).
OF_TOKENS = ("Attention", "Flat", "MetaBlock1d", "Mlp")

__all__ = ["EMITTERS", "OF_TOKENS", "Unknown", "is_trusted", "make_program"]
