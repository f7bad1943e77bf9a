"""What blocks of networks are as programs of :mod:`effattn.ops.block`, by the names of their classes."""

from effattn.nn.programs import convolutions, efficientvit_mit
from effattn.nn.programs.emit import Unknown, is_trusted, make_program

EMITTERS = {**convolutions.EMITTERS, **efficientvit_mit.EMITTERS}

__all__ = ["EMITTERS", "Unknown", "is_trusted", "make_program"]
