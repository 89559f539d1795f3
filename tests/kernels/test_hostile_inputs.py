"""On unusual tensors, modes and defaults, every operator gives the right values or raises a clear error."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tadperf.kernels.ops.per_sample import loss_gradient

from .operator_cases import CASES, assert_close, results_of, same_bits

every_operator = pytest.mark.parametrize("name", CASES)
PLAIN = (
    "norm_relu_pool_dual",
    "norm_relu_pool_dual_gradient",
    "conv3x3",
    "conv3x3_input",
    "conv3x3_kernel",
    "differentiable_augment",
    "differentiable_augment_adjoint",
)
WITHOUT_DERIVATIVE = ("mixture", "reliability", "diverse_pick")


# (operator, argument, number of the change) that give valid inputs: other maps, or another batch shape.
ALLOWED = {
    ("norm_relu_pool", "x", 3),
    ("norm_relu_pool_moments", "x", 3),
    ("conv3x3", "x", 3),
    ("conv3x3_input", "grad", 3),
    ("differentiable_augment", "x", 3),
    ("differentiable_augment_adjoint", "grad", 3),
    ("reliability", "features", 4),
    *(("trajectory_distance", x, 4) for x in ("student", "target", "start")),
}


def with_changed(name: str, argument: str, value: Any) -> list[Any]:
    return [value if key == argument else x for key, x in CASES[name].inputs.items()]


@every_operator
def test_values_are_those_of_the_reference(name):
    case = CASES[name]
    inputs = case.inputs.values()
    assert_close(results_of(case.operator, *inputs)[:1], results_of(case.reference, *inputs)[:1])


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_do_not_matter(name, dtype, device):
    """An operator that relied on the defaults could return uninitialised memory."""
    case = CASES[name]
    expected = results_of(case.operator, *case.inputs.values())
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = results_of(case.operator, *case.inputs.values())
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(found, expected)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_freed_storage_is_refused(name, dtype):
    """Also by operators that run plain PyTorch on float64 maps, which could crash."""
    inputs = {argument: x.to(dtype) if x.is_floating_point() else x for argument, x in CASES[name].inputs.items()}
    for argument, x in inputs.items():
        for size in (0, x.untyped_storage().nbytes() - 1):
            freed = x.clone()
            freed.untyped_storage().resize_(size)
            with pytest.raises(ValueError, match="it was freed or resized"):
                CASES[name].operator(*(inputs | {argument: freed}).values())


@every_operator
def test_tensors_that_are_not_dense_are_refused(name):
    for argument, x in CASES[name].inputs.items():
        for other in (x.to_sparse(), x.numpy()):
            with pytest.raises(ValueError, match=r"expected a (dense tensor|torch.Tensor)"):
                CASES[name].operator(*with_changed(name, argument, other))


@every_operator
def test_scalars_other_devices_and_integers_are_refused(name):
    for argument, x in CASES[name].inputs.items():
        others = [x.reshape(-1)[0], x.to("meta"), x.to(torch.complex64), x[..., :-1], x.unsqueeze(0)]
        for place, other in enumerate(others):
            if (name, argument, place) in ALLOWED:
                continue
            with pytest.raises(ValueError, match=r": "):
                CASES[name].operator(*with_changed(name, argument, other))


@every_operator
def test_expanded_negated_and_strided_tensors(name):
    case = CASES[name]
    for argument, x in case.inputs.items():
        if not x.is_floating_point():
            continue
        expanded = x[:1].expand(x.shape)
        negated = torch.complex(x, -x).conj().imag
        strided = torch.stack([x, x], -1)[..., 0]
        assert negated.is_neg()
        if argument != "cholesky" and "moments" not in case.inputs:  # moments belong to one x
            inputs = with_changed(name, argument, expanded)
            assert_close(results_of(case.operator, *inputs)[:1], results_of(case.reference, *inputs)[:1])
        expected = results_of(case.operator, *case.inputs.values())
        for other in (negated, strided):
            assert_close(results_of(case.operator, *with_changed(name, argument, other)), expected, 1e-5)


@every_operator
def test_requires_grad(name):
    """The first result has a gradient, or the results are detached."""
    case = CASES[name]
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in case.inputs.values()]
    found = results_of(case.operator, *inputs)
    if not case.differentiable:
        assert name in PLAIN or not any(x.requires_grad for x in found)
        return
    if name in PLAIN and not found[0].requires_grad:
        return
    upstream = torch.linspace(-1, 1, found[0].numel()).view(found[0].shape)
    leaves = [x for x in inputs if x.requires_grad]
    expected = results_of(case.reference, *inputs)[0]
    ours = torch.autograd.grad(found[0], leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None or not a.any()) if b is None else a is not None
        if a is not None and b is not None:
            assert_close([a], [b])


@every_operator
def test_forward_mode_tangents_are_never_dropped(name):
    case = CASES[name]
    first, *others = case.inputs.values()
    tangent = torch.ones_like(first)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, tangent)
        if name not in PLAIN:
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                case.operator(dual, *others)
            return
        try:
            found = results_of(case.operator, dual, *others)
        except NotImplementedError as error:
            reason = str(error)
            assert name == "differentiable_augment"
            assert "forward AD" in reason  # PyTorch 2.13 has no forward-mode derivative of grid_sample, 2.15 has one
            return
        pairs = [forward_ad.unpack_dual(x) for x in found]
    assert pairs[0].tangent is not None
    changed = [first + 1e-3 * sign * tangent for sign in (-1, 1)]
    below, above = (results_of(case.operator, x.contiguous(), *others)[0] for x in changed)
    slope = (above - below) / 2e-3
    scale = float(slope.abs().max())
    assert float((slope - pairs[0].tangent).abs().median()) <= 1e-2 * scale


@every_operator
def test_func_grad_and_vmap(name):
    case = CASES[name]
    first, *others = case.inputs.values()

    def total(function: Callable[..., Any], x: Tensor) -> Tensor:
        return results_of(function, x, *others)[0].float().sum() + 0 * x.sum()

    found = torch.func.grad(lambda x: total(case.operator, x))(first)
    expected = torch.zeros_like(first)
    if case.differentiable:
        leaf = first.clone().requires_grad_()
        (expected,) = torch.autograd.grad(total(case.reference, leaf), leaf)
    if case.differentiable or name in WITHOUT_DERIVATIVE:
        assert_close([found], [expected])
    pair = torch.stack([first, 2 * first])
    if name in PLAIN:
        stacked = torch.vmap(lambda x: results_of(case.operator, x, *others)[0])(pair)
        alone = [results_of(case.reference, x, *others)[0] for x in pair]
        assert_close([stacked], [torch.stack(alone)])
    else:
        with pytest.raises(NotImplementedError, match=r"does not support torch\.vmap: pass the whole batch"):
            torch.vmap(lambda x: results_of(case.operator, x, *others)[0])(pair)


@every_operator
def test_fake_tensors(name):
    case = CASES[name]
    expected = results_of(case.operator, *case.inputs.values())
    with FakeTensorMode() as mode:
        found = results_of(case.operator, *(mode.from_tensor(x) for x in case.inputs.values()))
    assert [(x.shape, x.dtype, x.device) for x in found] == [(x.shape, x.dtype, x.device) for x in expected]
    if name not in PLAIN:
        meta = results_of(case.operator, *(x.to("meta") for x in case.inputs.values()))
        assert [(x.shape, x.dtype) for x in meta] == [(x.shape, x.dtype) for x in expected]


@every_operator
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracer", ["make_fx", "jit.trace", "compile"])
def test_a_traced_operator_uses_its_inputs(name, tracer):
    """The trace must hold the operator, not its results for the first inputs."""
    case = CASES[name]
    inputs = tuple(case.inputs.values())

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(results_of(case.operator, *inputs))

    if tracer == "make_fx":
        traced = make_fx(function)(*inputs)
        calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
        assert any(call.startswith("tadperf") for call in calls) != (name in PLAIN)
    elif tracer == "jit.trace":
        if name in ("conv3x3_input", "conv3x3_kernel"):
            with pytest.raises(RuntimeError, match="unsupported argument type in the JIT tracer"):
                torch.jit.trace(function, inputs, check_trace=False)
            return
        traced: Any = torch.jit.trace(function, inputs, check_trace=False)
    else:
        torch.compiler.reset()
        traced = torch.compile(function, fullgraph=True, backend="eager")
    first, *others = inputs
    changed = first.flip(0) * 2, *others
    assert_close(list(traced(*changed)), results_of(case.operator, *changed))


class Recorder(TorchDispatchMode):
    """Records the operators that PyTorch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@every_operator
def test_a_dispatch_mode_and_the_profiler_see_the_operator(name):
    case = CASES[name]
    expected = results_of(case.operator, *case.inputs.values())
    with Recorder() as recorder:
        found = results_of(case.operator, *case.inputs.values())
    assert_close(found, expected)
    if name in PLAIN:
        assert any(seen.startswith("aten") for seen in recorder.names)
        return
    assert any(seen.startswith("tadperf.") for seen in recorder.names)
    with torch.profiler.profile() as profile:
        assert same_bits(results_of(case.operator, *case.inputs.values()), expected)
    assert any(event.key.startswith("tadperf::") for event in profile.key_averages())


class Tagged(Tensor):
    """A subclass without behaviour of its own."""


@every_operator
def test_subclasses_and_parameters(name):
    case = CASES[name]
    expected = results_of(case.operator, *case.inputs.values())
    first, *others = case.inputs.values()
    found = results_of(case.operator, first.as_subclass(Tagged), *others)
    assert_close([x.as_subclass(Tensor) for x in found], expected)
    with torch.no_grad():
        assert same_bits(results_of(case.operator, torch.nn.Parameter(first), *others), expected)


@every_operator
def test_inference_mode(name):
    case = CASES[name]
    expected = results_of(case.operator, *case.inputs.values())
    with torch.inference_mode():
        assert same_bits(results_of(case.operator, *case.inputs.values()), expected)
    assert same_bits(results_of(case.operator, *case.inputs.values()), expected)


@every_operator
def test_several_threads(name):
    case = CASES[name]
    expected = results_of(case.operator, *case.inputs.values())
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(results_of, case.operator, *case.inputs.values()) for _ in range(40)]
        assert all(same_bits(call.result(), expected) for call in calls)


def run_all(expected: dict[str, list[Tensor]]) -> None:
    torch.set_num_threads(1)  # OpenMP can hang after a fork with more, also without our operators
    for name, case in CASES.items():
        if not same_bits(results_of(case.operator, *case.inputs.values()), expected[name]):
            sys.exit(1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork():
    expected = {name: results_of(case.operator, *case.inputs.values()) for name, case in CASES.items()}
    child = multiprocessing.get_context("fork").Process(target=run_all, args=(expected,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@every_operator
def test_no_samples(name):
    case = CASES[name]
    per_class = ("weight", "bias", "weight_dot", "bias_dot", "kernel", "anchors", "cholesky", "qualified")
    empty = [
        x if key in per_class or key == "qualified_classes" else x[:, :0] if key == "moments" else x[:0]
        for key, x in case.inputs.items()
    ]
    found, full = results_of(case.operator, *empty), results_of(case.operator, *case.inputs.values())
    assert [x.dtype for x in found] == [x.dtype for x in full]
    assert found[0].numel() == 0 or name == "conv3x3_kernel"


def test_the_gradient_of_per_sample_checks_its_arguments():
    right: dict[str, Any] = {
        "logits": torch.zeros(3, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
        "top": torch.zeros(3),
        "confidence": torch.zeros(3),
        "scale": torch.zeros(3),
        "out": torch.zeros(3, 4),
    }
    loss_gradient(**right)
    for name, x in right.items():
        for other in (x[:2], x.to("meta"), x.to(torch.complex64), x.unsqueeze(0)):
            with pytest.raises(ValueError, match=r": "):
                loss_gradient(**{**right, name: other})
    with pytest.raises(ValueError, match="out: strides"):
        loss_gradient(**{**right, "out": torch.zeros(4, 3).T})


REGISTERED = {
    "per_sample": (),
    "per_sample_linear": (),
    "mixture": (2, 100, 1e-7, 1e-6, False),
    "trajectory_distance": ([20, 30],),
    "reliability": (),
    "diverse_pick": (2, None),
    "norm_relu_pool": (1e-5, True),
    "norm_relu_pool_gradient": (True,),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name):
    operator = getattr(torch.ops.tadperf, name)
    torch.library.opcheck(operator, (*CASES[name].inputs.values(), *REGISTERED[name]))


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_operators_check_their_arguments(name):
    """They can be called without the Python function."""
    operator = getattr(torch.ops.tadperf, name)
    for argument, x in CASES[name].inputs.items():
        for place, other in {0: x.reshape(-1)[0], 2: x.to(torch.complex64), 3: x[..., :-1]}.items():
            if (name, argument, place) in ALLOWED:
                continue
            with pytest.raises((ValueError, RuntimeError), match=r": "):
                operator(*with_changed(name, argument, other), *REGISTERED[name])
