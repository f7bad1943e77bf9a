"""effattn's nodes in onnxruntime and OpenVINO: the kernels' own bits, whatever the sizes, and the engines' errors."""

from __future__ import annotations

import ctypes
import random
import threading

import onnx
import onnxruntime
import openvino
import pytest
import torch
from engines import ENGINES, ERRORS, in_openvino, node_model
from nodes import NODES
from specified import first_of, flattened, free_sizes, of_other_sizes
from wrong_calls import WRONG_CALLS

import effattn
from effattn import _library
from effattn.testing import make_arguments

by_engine = pytest.mark.parametrize("engine", ENGINES)
CASES = [pytest.param(op, case, id=f"{op.name}-{i}") for op in NODES for i, case in enumerate(op.cases)]
FIRST = [pytest.param(op, op.cases[0], id=op.name) for op in NODES]


def expected(operator, arguments):
    with torch.no_grad():
        return first_of(operator(*arguments))


def activations(operator, arguments):
    return arguments[: operator.signature.num_activations]


def of_request(request):
    def run(*tensors):
        return torch.from_numpy(request.infer({f"x{i}": t.numpy() for i, t in enumerate(tensors)})[0].copy())

    return run


def run_of(engine, operator, arguments, **settings):
    return ENGINES[engine](node_model(operator, arguments), **settings)


@by_engine
@pytest.mark.parametrize(("operator", "case"), CASES)
def test_the_same_bits_as_in_pytorch(engine, operator, case):
    """At the sizes of the case and at others, in one session."""
    arguments = make_arguments(operator, case)
    run = run_of(engine, operator, arguments)
    for sizes in (case, *of_other_sizes(operator, case, 3, few=False)):
        given = make_arguments(operator, sizes, seed=3)
        given[operator.signature.num_activations :] = arguments[operator.signature.num_activations :]
        if free_sizes(operator, case) or sizes is case:
            assert torch.equal(run(*activations(operator, given)), expected(operator, given))


@by_engine
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_the_same_bits_for_every_number_of_threads(engine, operator, case):
    larger = {**case, **{name: 40 for name in free_sizes(operator, case)}}
    arguments = make_arguments(operator, larger)
    model = node_model(operator, arguments)
    for threads in (1, 2, 3, 7):
        out = ENGINES[engine](model, threads=threads)(*activations(operator, arguments))
        assert torch.equal(out, expected(operator, arguments))


@by_engine
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_weights_that_change(engine, operator, case):
    """Weights that are inputs are read at every call."""
    arguments = make_arguments(operator, case)
    run = ENGINES[engine](node_model(operator, arguments, constant=False))
    for seed in (0, 1):
        given = make_arguments(operator, case, seed=seed)
        assert torch.equal(run(*flattened(given)), expected(operator, given))


@by_engine
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_calls_at_once(engine, operator, case):
    """One session, several threads of the caller's."""
    arguments = make_arguments(operator, case)
    model, right = node_model(operator, arguments), expected(operator, arguments)
    wrong: list[object] = []
    if engine == "onnxruntime":
        runs = [ENGINES[engine](model, threads=2)] * 4
    else:  # a request is for one caller
        config = {"NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 4, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = effattn.openvino.compile(model, config=config)
        runs = [of_request(compiled.create_infer_request()) for _ in range(4)]

    def call(run):
        try:
            for _ in range(20):
                if not torch.equal(run(*activations(operator, arguments)), right):
                    wrong.append("other bits")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_inputs_of_unknown_rank(operator, case):
    """Of onnxruntime: OpenVINO's CPU plugin takes none."""
    arguments = make_arguments(operator, case)
    given = activations(operator, arguments)
    run = ENGINES["onnxruntime"](node_model(operator, arguments, sizes=[None] * len(given)))
    assert torch.equal(run(*given), expected(operator, arguments))


@by_engine
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_without_optimization(engine, operator, case):
    arguments = make_arguments(operator, case)
    if engine == "onnxruntime":
        level = {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL}
        run = run_of(engine, operator, arguments, **level)
    else:
        run = run_of(engine, operator, arguments)
    assert torch.equal(run(*activations(operator, arguments)), expected(operator, arguments))


SHAPES_IN_SHORT = 50


def random_case(operator, rng):
    """Sizes from one to a few, of everything that is a size."""
    case = dict(rng.choice(operator.cases))
    for name, value in case.items():
        if name in ("k",):
            case[name] = tuple(rng.choice((1, 3, 5, 7)) for _ in value)
        elif type(value) is int:
            case[name] = rng.randint(1, 9)
    if "S" in case:
        case["S"] = rng.randint(0, 3)
        case["k"] = tuple(rng.choice((1, 3, 5)) for _ in range(case["S"]))
    elif "k" in case:
        case["k"] = tuple(rng.choice((1, 3, 5)) for _ in range(case["heads"]))
    if "..." in case:
        case["..."] = tuple(rng.randint(1, 3) for _ in range(rng.randint(0, 3)))
    if "window_height" in case:
        case["window_height"], case["window_width"] = rng.randint(1, 5), rng.randint(1, 5)
    return case


@by_engine
@pytest.mark.parametrize("operator", NODES, ids=lambda op: op.name)
def test_random_shapes(engine, operator, request):
    """The same bits, or an error of the engine's kind; in the full tier 10,000 of each engine and operator."""
    rng = random.Random(operator.name)
    count = 10_000 if request.config.getoption("--full") else SHAPES_IN_SHORT
    done = 0
    while done < count:
        case = random_case(operator, rng)
        arguments = make_arguments(operator, case)
        run = run_of(engine, operator, arguments)
        for sizes in of_random_free_sizes(operator, case, rng, 20):
            given = make_arguments(operator, sizes, seed=done)
            given[operator.signature.num_activations :] = arguments[operator.signature.num_activations :]
            assert torch.equal(run(*activations(operator, given)), expected(operator, given)), sizes
            done += 1
            wrong = [one_size_changed(t, rng) for t in activations(operator, given)]
            if operator.signature.error((*wrong, *given[operator.signature.num_activations :])) is not None:
                with pytest.raises(ERRORS[engine]):
                    run(*wrong)
                done += 1


def of_random_free_sizes(operator, case, rng, count):
    names = free_sizes(operator, case)
    largest = 40 if len(names) < 4 else 12
    return [{**case, **{name: rng.randint(1, largest) for name in names}} for _ in range(count)]


def one_size_changed(t, rng):
    dim = rng.randrange(t.dim())
    return t.narrow(dim, 0, t.shape[dim] - 1) if rng.random() < 0.5 else torch.cat([t, t], dim)


# --- errors ---------------------------------------------------------------------------------------------------------


def wrong_shapes():
    """Calls with one tensor of another shape, which an engine can be given."""
    return [
        pytest.param(*call.values[:2], id=call.id)
        for call in WRONG_CALLS
        if call.values[0] in NODES and call.values[2] is ValueError and fits_a_graph(*call.values[:2])
    ]


def fits_a_graph(operator, arguments):
    tensors = flattened(arguments)
    lists_fit = all(
        isinstance(given, list) and all(isinstance(t, torch.Tensor) for t in given)
        for argument, given in zip(operator.signature.arguments, arguments, strict=True)
        if argument.is_list
    )
    plain = all(t.dtype == torch.float32 and t.layout == torch.strided and t.device.type == "cpu" for t in tensors)
    options = [given for a, given in zip(operator.signature.arguments, arguments, strict=True) if a.is_option]
    return lists_fit and plain and all(isinstance(option, (int, float)) for option in options)


@by_engine
@pytest.mark.parametrize(("operator", "arguments"), wrong_shapes())
def test_wrong_calls_are_errors_of_the_engine(engine, operator, arguments):
    """When a session is created, if the model says it, or in a call; the text names the operator."""
    with pytest.raises(ERRORS[engine], match=operator.name):
        run = ENGINES[engine](node_model(operator, arguments))
        run(*activations(operator, arguments))


@by_engine
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_wrong_attributes(engine, operator, case):
    """One that is missing, or has no number that the operator takes."""
    arguments = make_arguments(operator, case)
    for argument in operator.signature.arguments:
        wrong = {"integer": (None, -1, 2**40), "number": (None, float("nan"), float("inf"))}.get(argument.kind, ())
        for value in wrong if argument.is_option else (-1,) * argument.is_list:
            model = node_model(operator, arguments, changed={argument.name: value})
            with pytest.raises(ERRORS[engine], match=f"{operator.name}: .*{argument.name}"):
                ENGINES[engine](model)(*activations(operator, arguments))


@by_engine
def test_another_format_is_refused_by_name(engine):
    operator, case = FIRST[0].values
    arguments = make_arguments(operator, case)
    known = _library.node_format()
    text = f"effattn {effattn.__version__}: .*reads models of format {known}, this one is of format {known + 1}"
    with pytest.raises(ERRORS[engine], match=text):
        ENGINES[engine](node_model(operator, arguments, changed={"format": known + 1}))
    with pytest.raises(ERRORS[engine], match="format"):
        ENGINES[engine](node_model(operator, arguments, changed={"format": None}))


def test_without_the_library():
    """The engines' own errors, which the guide quotes."""
    operator, case = FIRST[0].values
    model = node_model(operator, make_arguments(operator, case))
    with pytest.raises(ERRORS["onnxruntime"], match=f"effattn:{operator.name}.* is not a registered function/op"):
        onnxruntime.InferenceSession(model)
    with pytest.raises(RuntimeError, match=rf"No conversion rule found for operations: effattn\.{operator.name}"):
        openvino.Core().compile_model(openvino.Core().read_model(model), "CPU")


def test_sessions_share_options():
    operator, case = FIRST[0].values
    arguments = make_arguments(operator, case)
    options = onnxruntime.SessionOptions()
    for _ in range(2):
        session = effattn.onnxruntime.session(node_model(operator, arguments), options)
        feed = {f"x{i}": t.numpy() for i, t in enumerate(activations(operator, arguments))}
        assert torch.equal(torch.from_numpy(session.run(None, feed)[0]), expected(operator, arguments))


def test_an_openvino_model_outlives_its_core():
    """On HETERO, whose parts are models of their own; and an operation that nothing else holds."""
    operator, case = FIRST[0].values
    arguments = make_arguments(operator, case)
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = effattn.openvino.compile(node_model(operator, arguments), "HETERO:CPU", config)
    out = compiled([t.numpy() for t in activations(operator, arguments)])[0]
    assert torch.equal(torch.from_numpy(out.copy()), expected(operator, arguments))
    core = openvino.Core()
    core.add_extension(str(effattn.openvino.library()))
    model = core.read_model(node_model(operator, arguments))
    (node,) = (op for op in model.get_ops() if op.get_type_name() == operator.name)
    del core, model
    assert node.get_type_name() == operator.name


class ApiBase(ctypes.Structure):
    _fields_ = [
        ("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
        ("version", ctypes.CFUNCTYPE(ctypes.c_void_p)),
    ]


def test_an_onnxruntime_that_is_too_old():
    """Of which only the first version of the interface is used, to make an error."""
    told = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, text):
        told.append(text.decode())
        return 1

    version = ctypes.create_string_buffer(b"1.16.3")
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)
    base = ApiBase(
        ApiBase._fields_[0][1](lambda version: ctypes.addressof(table) if version == 1 else None),
        ApiBase._fields_[1][1](lambda: ctypes.addressof(version)),
    )
    register = ctypes.CDLL(str(effattn.onnxruntime.library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base))
    assert told == [f"effattn {effattn.__version__} needs onnxruntime 1.17 or later, this is 1.16.3"]


# --- what one engine has alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_shapes_are_inferred(operator, case):
    """With the names of sizes, which onnxruntime plans memory by and shows to its users."""
    arguments = make_arguments(operator, case)
    names = [[f"d{i}{j}" for j in range(t.dim())] for i, t in enumerate(activations(operator, arguments))]
    session = effattn.onnxruntime.session(node_model(operator, arguments, sizes=names))
    (out,) = session.get_outputs()
    right = expected(operator, arguments).shape
    assert len(out.shape) == len(right)
    free = free_sizes(operator, case)
    for size, found in zip(right, out.shape, strict=True):
        assert found == size or (isinstance(found, str) and (found[:2] == "d0" or free)), out.shape


@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_openvino_infers_shapes(operator, case):
    arguments = make_arguments(operator, case)
    given = activations(operator, arguments)
    sizes = [[None, *t.shape[1:]] for t in given]
    core = openvino.Core()
    core.add_extension(str(effattn.openvino.library()))
    model = core.read_model(node_model(operator, arguments, sizes=sizes))
    assert model.output(0).partial_shape[1:] == openvino.PartialShape(list(expected(operator, arguments).shape[1:]))
    assert model.output(0).partial_shape[0].is_dynamic
    model.reshape({f"x{i}": list(t.shape) for i, t in enumerate(given)})
    assert model.output(0).shape == openvino.Shape(list(expected(operator, arguments).shape))
    assert torch.equal(in_openvino(model)(*given), expected(operator, arguments))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_openvino_ir(operator, case, compress, tmp_path):
    """Saved and read again, with weights as they are or in float16."""
    arguments = make_arguments(operator, case)
    core = openvino.Core()
    core.add_extension(str(effattn.openvino.library()))
    model = core.read_model(node_model(operator, arguments))
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=compress)
    if compress:
        halves = [t.half().float() for t in flattened(arguments)[operator.signature.num_activations :]]
        arguments = regrouped(operator, arguments, halves)
    run = in_openvino(tmp_path / "model.xml")
    assert torch.equal(run(*activations(operator, arguments)), expected(operator, arguments))


def regrouped(operator, arguments, weights):
    """The arguments with these for their weights."""
    weights, made = list(weights), list(activations(operator, arguments))
    for argument, given in list(zip(operator.signature.arguments, arguments, strict=True))[len(made) :]:
        if argument.is_option:
            made.append(given)
        else:
            made.append([weights.pop(0) for _ in given] if argument.is_list else weights.pop(0))
    return made


@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_openvino_in_bfloat16(operator, case):
    """The hint is for OpenVINO's own operations: a node computes in float32, of inputs that may have been rounded."""
    arguments = make_arguments(operator, case)
    out = in_openvino(node_model(operator, arguments), precision="bf16")(*activations(operator, arguments))
    right = expected(operator, arguments)
    assert (out - right).abs().max() <= 2e-2 * right.abs().max()


def test_openvino_extension_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFATTN_CACHE", str(tmp_path))
    effattn.openvino.library.cache_clear()
    try:
        path = effattn.openvino.library()
        made = path.stat().st_mtime_ns
        assert path.is_relative_to(tmp_path)
        effattn.openvino.library.cache_clear()
        monkeypatch.setenv("CXX", "no-such-compiler")  # and none is needed
        assert effattn.openvino.library() == path and path.stat().st_mtime_ns == made
        for cache, compiler, text in (
            (tmp_path / "other", "no-such-compiler", "no compiler"),
            (tmp_path / "other", "g++ --no-such-option", "cannot compile the extension:\n.*--no-such-option"),
            (path, "g++", "EFFATTN_CACHE names another folder"),
        ):
            effattn.openvino.library.cache_clear()
            monkeypatch.setenv("EFFATTN_CACHE", str(cache))
            monkeypatch.setenv("CXX", compiler)
            with pytest.raises(RuntimeError, match=text):
                effattn.openvino.library()
    finally:
        effattn.openvino.library.cache_clear()


def test_of_several_models_in_one_core():
    core = openvino.Core()
    for operator in NODES[:2]:
        arguments = make_arguments(operator, operator.cases[0])
        run = in_openvino(node_model(operator, arguments), core=core)
        assert torch.equal(run(*activations(operator, arguments)), expected(operator, arguments))


def test_models_are_taken_in_every_form(tmp_path):
    operator, case = FIRST[0].values
    arguments = make_arguments(operator, case)
    model = node_model(operator, arguments)
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    for form in (path, str(path), model, onnx.load_from_string(model)):
        for run in (ENGINES["onnxruntime"](form), ENGINES["OpenVINO"](form)):
            assert torch.equal(run(*activations(operator, arguments)), expected(operator, arguments))
