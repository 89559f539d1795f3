"""Reads a network as a chain of layers, each of which takes the output of the one before."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from tadperf.nets.fused import has_hooks


class NamedLayer(NamedTuple):
    """A layer and its name in the network, such as "features.0"."""

    name: str
    layer: nn.Module


def layer_chain(module: nn.Module) -> list[NamedLayer] | None:
    """Returns the layers of a network that applies them one after the other, or None for any other network (tadperf).

    A plain Sequential is read directly. The `forward` of another class is traced with torch.fx, which calls it once
    without data. It may call layers and Sequentials, and flatten its maps by `flatten`, `view` or `reshape`, as the
    published ConvNets do. Returns None if a layer has hooks, is used twice, or runs without gradients or in autocast.
    """
    if any(has_hooks(layer) for layer in module.modules()) or type(module).__call__ is not nn.Module.__call__:
        return None
    if type(module) is nn.Sequential:
        chain = [NamedLayer(*item) for item in module.named_children()]
        return chain if len(chain) == len(module) else None  # named_children lists a layer only once
    try:
        with torch.enable_grad():
            graph = _Tracer().trace(module)
        return _read_chain(graph, module)
    except Exception:  # code of the user's: any error means that the network is no chain
        return None


class _Tracer(fx.Tracer):
    """Refuses what a graph does not show: layers that run without gradients or in autocast."""

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise ValueError("the graph does not show this context")
        return super().call_module(m, forward, args, kwargs)


def _read_chain(graph: fx.Graph, module: nn.Module) -> list[NamedLayer] | None:
    """Returns the layers of a traced graph whose nodes form a chain from its only input to its output."""
    nodes = [node for node in graph.nodes if not _is_batch_size(node)]
    first, *steps, last = nodes
    if len(inspect.signature(module.forward).parameters) != 1 or first.op != "placeholder":
        return None
    chain: list[NamedLayer] = []
    for before, node in zip(nodes, steps, strict=False):
        if node.op == "call_module" and (node.args, node.kwargs) == ((before,), {}):
            chain.append(NamedLayer(str(node.target), module.get_submodule(str(node.target))))
        elif _flattens(node, before):
            chain.append(NamedLayer(node.name, nn.Flatten()))
        else:
            return None
    ends_with_last_step = last.op == "output" and last.args == (nodes[-2],)
    names = {layer.name for layer in chain}
    return chain if ends_with_last_step and len(names) == len(chain) else None


def _is_batch_size(node: fx.Node) -> bool:
    """Returns whether a node is `x.size(0)`, `x.shape[0]`, or a part of it. `_flattens` looks at its use."""
    if node.op == "call_method":
        return node.target == "size"
    return node.op == "call_function" and getattr(node.target, "__name__", "") in ("getattr", "getitem")


def _flattens(node: fx.Node, before: fx.Node) -> bool:
    """Returns whether a node flattens the output of `before` from dimension 1 on."""
    if node.op == "call_method" and node.target in ("view", "reshape"):
        return len(node.args) == 3 and node.args[::2] == (before, -1) and _counts(node.args[1], before)
    is_flatten = (node.op, node.target) in (("call_method", "flatten"), ("call_function", torch.flatten))
    return is_flatten and (node.args, node.kwargs) in (((before, 1), {}), ((before,), {"start_dim": 1}))


def _counts(size: Any, maps: fx.Node) -> bool:
    """Returns whether `size` is the batch size of `maps`: maps.size(0), maps.size()[0] or maps.shape[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.op == "call_method" and size.target == "size":
        return size.args == (maps, 0) and not size.kwargs
    shape = size.args[0] if len(size.args) == 2 and size.args[1] == 0 else None
    if not isinstance(shape, fx.Node):
        return False
    return shape.args in ((maps,), (maps, "shape")) and getattr(size.target, "__name__", "") == "getitem"
