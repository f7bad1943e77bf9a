"""In onnxruntime and OpenVINO, with effattn's nodes and without: whole models, sessions, single nodes."""

from __future__ import annotations

from benchmarks import engines
from benchmarks.modules import model_case
from benchmarks.nodes import SIZES
from benchmarks.runner import Case
from benchmarks.suites.base import TimedSuite

#: Every model of timm with attention that effattn knows.
NAMES = (
    *(f"efficientvit_{name}" for name in ("b0", "b1", "b2", "b3", "l1", "l2", "l3")),
    *(f"efficientvit_m{i}" for i in range(6)),
    *(f"efficientformer_{name}" for name in ("l1", "l3", "l7")),
    *(f"efficientformerv2_{name}" for name in ("s0", "s1", "s2", "l")),
)
MODELS = tuple(model_case(f"{name} @224", name, 1, 224, 224) for name in NAMES)
LARGE = (
    model_case("efficientvit_b1 @1024x2048", "efficientvit_b1", 1, 1024, 2048),
    engines.segmentation_case("segmentation, b1 @1024x2048", "efficientvit_b1", 1024, 2048),
)
NARROW = ("efficientvit_b1 @224", "efficientvit_l1 @224", "efficientvit_m4 @224", "efficientvit_b1 @1024x2048")
SHORT = ("efficientvit_b1 @224", "efficientvit_m4 @224")
SESSIONS = ("efficientvit_b1", "efficientvit_l2", "efficientvit_m0", "efficientvit_m4", "efficientformerv2_s1")


def _model_cases(short: bool) -> list[Case]:
    if short:
        return [engines.make_model_case(case) for case in MODELS if case.name in SHORT]
    return [engines.make_model_case(case, one) for case in (*MODELS, *LARGE) for one in (False, True)]


def _narrow_cases(short: bool) -> list[Case]:
    return [] if short else [engines.make_narrow_case(case) for case in (*MODELS, *LARGE) if case.name in NARROW]


def _session_cases(short: bool) -> list[Case]:
    return [] if short else [engines.make_session_case(name, engine) for name in SESSIONS for engine in engines.ENGINES]


def _node_cases(short: bool) -> list[Case]:
    if short:
        return []
    return [
        engines.make_operator_case(engine, operator, text, sizes)
        for operator, cases in SIZES.items()
        for text, sizes in cases.items()
        for engine in engines.ENGINES
    ]


ENGINE_MODELS = TimedSuite("engines", "Whole models in onnxruntime and OpenVINO, inference, float32", _model_cases)
ENGINE_NARROW = TimedSuite("engine-narrow", "Whole models in OpenVINO in bfloat16, inference", _narrow_cases)
ENGINE_SESSIONS = TimedSuite("engine-sessions", "What creating a session takes", _session_cases)
ENGINE_NODES = TimedSuite("engine-nodes", "Single nodes against standard operators, float32", _node_cases)
