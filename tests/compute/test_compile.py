"""Compiled calls return the results of eager calls, use fixed shapes, and fall back with a warning."""

from __future__ import annotations

import copy
import logging
import os
import stat
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config

from tadperf.compute import compile as compile_module
from tadperf.compute.compile import (
    _mostly_repeated,
    choose_backend,
    compile_for_inference,
    load_compile_cache,
    save_compile_cache,
    with_fallback,
)
from tadperf.config import NetConfig
from tadperf.errors import UserError
from tadperf.nets.architectures import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs():
    """Collects the graphs that a test compiles. A fast backend runs each graph without compiling it."""
    compiled: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.compiler.set_stance(force_backend=record), torch.no_grad():
        yield compiled
    torch.compiler.reset()


class Rows(nn.Module):
    """Records the number of rows of each call. The result of a row depends on that row and the time alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(3, 2), []

    def forward(self, x: Tensor, time: Tensor | float, *, shift: Tensor | None = None) -> dict[str, Tensor]:
        self.rows.append(len(x))
        offset = 0.0 if shift is None else shift[:, None]
        return {"a": self.linear(x) * time + offset, "b": x.sum(1)}


def unet(**more: Any) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=11,
        **more,
    ).eval()


def dit(layers: int = 3) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
    ).eval()


def detector() -> nn.Module:
    return build(NetConfig(width=4, depth=1), (1, 8, 8), 10, 0).eval()


def inputs(net: nn.Module, rows: int = 3) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator, labels = torch.Generator().manual_seed(1), torch.arange(rows) % 10
    if isinstance(net, nn.Sequential):
        return (torch.randn(rows, 1, 8, 8, generator=generator),), {}
    shape = (4, 4, 4) if type(net).__name__.startswith("DiT") else (1, 8, 8)
    x, time = torch.randn(rows, *shape, generator=generator), torch.full((rows,), 7)
    return (x, time), {"class_labels": labels, "return_dict": False}


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    ("make", "backend", "compiled"),  # "auto" is eager: the number of calls is not known
    [(unet, "inductor", 1), (unet, "eager", 0), (dit, "inductor", 2), (dit, "auto", 0), (detector, "inductor", 1)],
)
def test_the_module_keeps_its_type_its_weights_and_its_results(graphs, make, backend, compiled):
    net = make()
    args, named = inputs(net)
    names, kind, expected = list(net.state_dict()), type(net), first(net(*args, **named))
    assert compile_for_inference(net, backend) is net
    torch.testing.assert_close(first(net(*args, **named)), expected)
    assert (list(net.state_dict()), type(net)) == (names, kind)
    assert len(graphs) == compiled
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(0.5)
    fresh = make()
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(first(net(*args, **named)), first(fresh(*args, **named)))


def test_a_dit_is_compiled_by_block_and_a_unet_as_one_graph(graphs):
    net = compile_for_inference(dit(5), "inductor", batch=4)
    for rows in (4, 1, 6):
        args, named = inputs(net, rows)
        net(*args, **named)
    assert len(graphs) == 2  # the first block's input has other strides than that of later blocks
    assert not any("proj_out" in str(node.target) for node in graphs[0].graph.nodes)
    assert _mostly_repeated(dit())
    assert not _mostly_repeated(unet())
    assert not _mostly_repeated(detector())


def test_time_steps_are_not_compiled_as_constants(graphs):
    net, eager = compile_for_inference(unet(), "inductor", batch=3), unet()
    (x, _), named = inputs(eager)
    for step in (1, 500, 999):
        torch.testing.assert_close(net(x, step, **named)[0], eager(x, step, **named)[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8])
def test_every_call_has_the_rows_of_a_batch(rows):
    eager = Rows()
    net = compile_for_inference(copy.deepcopy(eager), "eager", batch=4)
    x, shift = torch.randn(rows, 3), torch.randn(rows)
    with torch.no_grad():
        expected, result = eager(x, 2.0, shift=shift), net(x, 2.0, shift=shift)
    assert net.rows == [4] * max(1, -(-rows // 4))
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)


def test_the_result_of_a_row_does_not_depend_on_other_rows():
    net = compile_for_inference(detector(), "eager", batch=8)
    (x,), _ = inputs(net, 19)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(torch.cat([net(part) for part in x.split(3)]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_are_cast_and_time_steps_are_not(dtype):
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            assert (x.dtype, time.dtype) == (dtype, torch.float32)
            return self.linear(x), time

    net = compile_for_inference(Denoiser(), "eager", dtype=dtype)
    assert net.linear.weight.dtype == dtype
    with torch.no_grad():
        for input_dtype in (torch.float32, torch.float64, dtype):
            y, time = net(torch.ones(4, 3, dtype=input_dtype), 999.0)
            assert (y.dtype, time.dtype, float(time)) == (input_dtype, torch.float32, 999.0)


def test_unknown_backends_and_cuda_graphs_on_a_cpu_are_refused():
    with pytest.raises(UserError, match="backend: onnx: must be one of auto, eager, inductor, cudagraphs, tensorrt"):
        compile_for_inference(detector(), "onnx")
    with pytest.raises(UserError, match="backend: cudagraphs: needs a CUDA device, the network is on cpu"):
        compile_for_inference(detector(), "cudagraphs")


def test_tensorrt_falls_back_to_inductor_and_warns_once(graphs):
    net = compile_for_inference(detector(), "tensorrt")
    (x,), _ = inputs(net)
    with pytest.warns(RuntimeWarning, match="TensorRT failed, Inductor is used instead: .* CUDA device, .* on cpu"):
        result = net(x)
    torch.testing.assert_close(result, detector()(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "wrong", [lambda y: 1.2 * y, lambda y: y[:-1], lambda y: y * float("nan"), lambda y: y.flip(1)]
)
def test_a_wrong_engine_of_tensorrt_is_not_used(graphs, monkeypatch, wrong):
    """The engine is fake: it runs the network and changes the result."""
    net = detector()
    (x,), _ = inputs(net)
    expected = net(x)
    monkeypatch.setattr(compile_module, "_tensorrt", lambda inner, _: lambda x: wrong(inner.forward(x)))
    compile_for_inference(net, "tensorrt")
    message = r"TensorRT failed, Inductor is used instead: .* relative error of (0.2|inf|nan|\d\.\d+) against PyTorch"
    with pytest.warns(RuntimeWarning, match=message):
        torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net(x), expected)
    assert len(graphs) == 1


def test_without_a_compiler_calls_run_eagerly():
    """Uses the real Inductor with a C++ compiler that does not exist."""
    torch.compiler.reset()
    net = compile_for_inference(detector(), "inductor")
    (x,), _ = inputs(net)
    missing = config.patch({"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True})
    with missing, torch.no_grad(), pytest.warns(RuntimeWarning, match="Inductor failed, eager is used instead: "):
        result = net(x)
    assert torch.equal(result, detector()(x))


def test_a_mistake_of_the_caller_causes_no_fallback(graphs):
    net = compile_for_inference(detector(), "inductor")
    (x,), _ = inputs(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="channels"):
            net(torch.zeros(2, 3, 8, 8))
        torch.testing.assert_close(net(x), detector()(x))
    assert len(graphs) >= 1


def test_a_later_failure_falls_back_too():
    calls: list[str] = []

    def engine(x: int) -> int:
        calls.append("engine")
        if len(calls) > 1:
            raise OSError("the engine\nis gone")
        return x

    call = with_fallback("TensorRT", lambda: engine, "eager", lambda: lambda x: -x)
    assert call(1) == 1
    with pytest.warns(RuntimeWarning, match=r"TensorRT failed, eager is used instead: OSError: the engine$"):
        assert call(2) == -2
    assert (call(3), calls) == (-3, ["engine", "engine"])


@pytest.mark.parametrize("make", [unet, dit, detector])
def test_modules_for_tensorrt_can_be_exported(make):
    """MutableTorchTensorRTModule calls torch.export when the module's forward is already replaced."""
    net = make()
    args, named = inputs(net, 2)
    expected = first(net(*args, **named))
    inner = copy.copy(net)
    net.forward = None
    program = torch.export.export(inner, args, kwargs=named, strict=False)
    torch.testing.assert_close(first(program.module()(*args, **named)), expected)


@pytest.mark.parametrize(
    ("kind", "flops", "calls", "backend"),
    [
        ("cpu", 1e9, None, "eager"),
        ("cuda", 1e3, None, "inductor"),
        ("cpu", 1e8, 100, "eager"),
        ("cpu", 1e11, 10_000, "inductor"),
        ("cuda", 1e6, 10, "eager"),
        ("cuda", 1e6, 100_000, "inductor"),
    ],
)
def test_auto_compares_saved_time_with_compile_time(kind, flops, calls, backend):
    choice, reason = choose_backend(kind, flops, 50, calls)
    assert choice == backend
    assert reason


@pytest.mark.parametrize("calls", [1, 10**9])
def test_auto_logs_its_choice(graphs, caplog, calls):
    caplog.set_level(logging.INFO, "tadperf")
    net = compile_for_inference(detector(), "auto", calls=calls)
    (x,), _ = inputs(net)
    torch.testing.assert_close(net(x), detector()(x))
    net(x)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"Sequential runs {'eager' if calls == 1 else 'inductor'}: {calls} calls ")
    assert len(graphs) == (calls > 1)


COMPILED = """
import os
import torch
from tadperf.compute.compile import load_compile_cache, save_compile_cache, with_fallback
load_compile_cache("test")
compiled = torch.compile(lambda x: x.sin() + x)
with_fallback("Inductor", lambda: compiled, "eager", lambda: None)(torch.ones(3))
save_compile_cache("test")
assert "tadperf" not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""), os.environ["TORCHINDUCTOR_CACHE_DIR"]
"""


def test_a_second_process_builds_no_cpp_object_again(tmp_path):
    """Also checks that each process leaves Inductor's folder in the environment as it was."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    built = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True)
        built.append({(file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*.so")})
    assert built[0] == built[1] != set()


def test_compiled_code_is_saved_and_loaded(tmp_path, monkeypatch):
    """Uses the real Inductor: compiles, saves, and loads into a compiler whose own caches are empty."""
    from torch._inductor.utils import fresh_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # otherwise the folder of the user
    assert not load_compile_cache("refine digits/8")

    def misses() -> int:
        torch.compiler.reset()
        counters.clear()
        net = compile_for_inference(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), "inductor")
        with torch.no_grad(), fresh_cache():
            loaded = load_compile_cache("refine digits/8")
            net(torch.ones(2, 4))
            assert loaded or save_compile_cache("refine digits/8")
        assert counters["inductor"]["fxgraph_cache_hit"] + counters["inductor"]["fxgraph_cache_miss"] > 0 or loaded
        return counters["inductor"]["fxgraph_cache_miss"]

    assert misses() == 1
    assert misses() == 0
    (file,) = (tmp_path / "tadperf" / "compiled").iterdir()
    assert file.name.startswith("refine-digits-8-")
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["inductor", "cudagraphs"])
def test_on_cuda_results_outlive_the_next_call(backend):
    net, eager = compile_for_inference(unet().cuda(), backend, batch=4), unet().cuda()
    with torch.no_grad():
        pairs = [tuple(torch.randn(3, 1, 8, 8, device="cuda") for _ in range(2)) for _ in range(4)]
        results = [net(x, 5, class_labels=torch.arange(3, device="cuda"), return_dict=False)[0] for x, _ in pairs]
        for (x, _), y in zip(pairs, results, strict=True):
            expected = eager(x, 5, class_labels=torch.arange(3, device="cuda"), return_dict=False)[0]
            torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_a_cache_folder_that_cannot_be_made_costs_the_cache_only(tmp_path, monkeypatch, caplog):
    """A file stands where the folder would be."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert load_compile_cache("key") is False
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    assert save_compile_cache("key") is False
    assert "compiled code is not kept for the next process" in caplog.text
