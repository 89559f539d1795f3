"""A CUDA device without a GPU: tensors that say cuda:0 and hold real numbers in CPU memory.

`start` makes it the device of this process, after `stub.load`. C++ and Python then both see cuda:0. Each call of
an operator, in autograd too, is checked as CUDA would check it:
- no CPU tensor beside a CUDA tensor, except 0-dimensional ones and indices;
- nothing that waits for the device, and no copy of pageable memory, while a CUDA graph is recorded.
CUDA graphs are recorded, and a replay carries out their operators one by one. Triton launchers run as they are, up to
the launch, and the operator's CPU form computes the values. `counters` counts launches, copies and waits by line.

stream_order finds memory that two streams use without a wait between them.

What it cannot see: the allocator, cuDNN, Inductor (torch.compile returns the function), speed.
"""

from __future__ import annotations

from typing import Any

import costs
import torch
from counters import ASYNC, LAUNCH, TO_DEVICE, TO_HOST, WAIT, counters
from graphs import Graph, refuse_while_recording
from stream_order import accessed, host_waits_for_current_stream, owned
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from trees import map_leaves, tensors_of

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COPIES = _names("copy_ _to_copy copy _copy_from")
# Operators that launch nothing: views, questions about shapes, memory without values, and the read of one value.
NO_LAUNCH = _names(
    "_indices _local_scalar_dense _nnz _reshape_alias _unsafe_view _values alias as_strided as_strided_ chunk "
    "col_indices crow_indices detach detach_ diagonal dim empty empty_like empty_strided expand indices is_contiguous "
    "is_pinned layout lift_fresh movedim narrow new_empty new_empty_strided permute real record_stream resize_ select "
    "set_ size slice split split_with_sizes squeeze squeeze_ stride swapdims_ sym_numel sym_size sym_storage_offset "
    "sym_stride t t_ transpose transpose_ unbind unfold unsafe_split unsqueeze unsqueeze_ values view view_as_real"
)
# Operators whose result depends on values on the device, so the CPU waits for them.
WAITS = _names(
    "_coalesce _linalg_check_errors _local_scalar_dense _unique _unique2 bincount equal is_nonzero masked_select "
    "nonzero unique_consecutive unique_dim"
)
INDEXED = _names("_index_put_impl_ _unsafe_index _unsafe_index_put index index_put index_put_")
NO_SCALAR = _names("addmm bmm cat gather index_add_ index_select lerp_ mm scatter_ searchsorted stack")


class Twin(Tensor):
    """A tensor on cuda:0 whose values lie in the CPU tensor `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Twin:
        assert not isinstance(values, Twin)
        twin = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride() if values.layout is torch.strided else None,
            storage_offset=values.storage_offset() if values.layout is torch.strided else None,
            dtype=values.dtype,
            layout=values.layout,
            device=CUDA,
        )
        twin.held = values
        return twin

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Twin({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Twin:
        return Twin(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operator(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]


class TwinMode(TorchDispatchMode):
    """Sees every operator, so that memory which is made on the device is a Twin, too."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, which takes 2 s; nothing is compiled here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operator(func, args, kwargs or {})


def start() -> None:
    """Makes the twin the CUDA device of this process."""
    import launchers
    from cuda_api import replace_tensor_functions, replace_torch_cuda

    replace_torch_cuda()
    replace_tensor_functions()
    torch.compile = lambda function=None, **_: function if function is not None else lambda function: function
    launchers.install()
    TwinMode().__enter__()


def run_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Checks, counts and carries out one operator."""
    tensors = tensors_of((args, kwargs))
    twins = [tensor for tensor in tensors if isinstance(tensor, Twin)]
    device = kwargs.get("device")
    on_device = bool(twins) if device is None else torch.device(device).type == "cuda"
    if not twins and not on_device:
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    moved = _check_copy(name, args, kwargs, on_device) if name in COPIES else None
    if name not in COPIES:
        _check_devices(func, name, args, kwargs, [tensor for tensor in tensors if not isinstance(tensor, Twin)])
    waits = _check_wait(name, args, kwargs, twins)
    values, options = unwrap((args, kwargs))
    if options.get("pin_memory"):
        options["pin_memory"] = False
    graph, launches = Graph.recording, not moved and name not in NO_LAUNCH
    written = [tensor.held for tensor in _written(func, args, kwargs) if isinstance(tensor, Twin)]
    if graph is not None:
        graph.keep(written)
    result = func(*values, **options)
    made = tensors_of(result) if on_device and name != "copy_" else []
    if launches or moved or waits:
        note_access([twin.held for twin in twins], [*written, *made] if launches or moved else [])
    elif graph is None:
        owned(made)
    if waits or moved in (TO_DEVICE, TO_HOST):
        host_waits_for_current_stream()
    if launches:
        counters.add(LAUNCH, name)
        if costs.counting:
            costs.operator(func, values, options, result, graph)
    if graph is not None and (launches or moved or "empty" in name):
        graph.add(func, values, options, result)
    if name == "copy_":
        return args[0]
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)  # changes the shape of the Twin itself
    return wrap(result, tensors, on_device)


def unwrap(tree: Any) -> Any:
    """Replaces each Twin by the CPU tensor that it holds, and the CUDA device by the CPU."""

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Twin):
            return leaf.held
        return CPU if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf

    return map_leaves(value, tree)


def wrap(result: Any, inputs: list[Tensor], on_device: bool = True) -> Any:
    """Makes each tensor of a result a Twin. A tensor that is one of the inputs stays that input."""
    known = {id(unwrap(tensor)): tensor for tensor in inputs}

    def twin(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not on_device:
            return known.get(id(leaf), leaf)
        return known[id(leaf)] if id(leaf) in known else Twin(leaf)

    return map_leaves(twin, result)


def _check_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool) -> str | None:
    """Counts a copy between the devices; returns its kind, or None if it stays on one."""
    source: Tensor = args[0] if name == "_to_copy" else args[1]
    target = on_device if name == "_to_copy" else isinstance(args[0], Twin)
    if isinstance(source, Twin) == target or not source.numel():
        return None
    wanted = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
    host = source if target else (args[0] if name == "copy_" else None)
    pinned = host is not None and host.is_pinned()
    kind = ASYNC if wanted and (target or pinned) else TO_DEVICE if target else TO_HOST
    counters.add(kind, name)
    if not (wanted and pinned):
        refuse_while_recording(f"a copy of pageable memory ({name} of {list(source.shape)})")
    return kind


def _check_devices(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_cpu: list[Tensor]) -> None:
    """Refuses CPU tensors beside CUDA tensors where CUDA would."""
    if not on_cpu:
        return
    if name in INDEXED:
        if not isinstance(args[0], Twin):
            counters.fail(f"{name}: a CPU tensor is indexed by a CUDA tensor")
        if len(args) > 2 and not isinstance(args[2], Twin) and args[2].ndim:
            counters.fail(f"{name}: CPU values are written into a CUDA tensor")
        if any(tensor.ndim for tensor in on_cpu):
            counters.add(TO_DEVICE, f"{name} by a CPU index")
            refuse_while_recording(f"{name} by a CPU index")
        return
    large = [tensor for tensor in on_cpu if tensor.ndim]
    if large:
        counters.fail(f"{name}: a CPU tensor of shape {list(large[0].shape)} beside a CUDA tensor")
    if name in NO_SCALAR:
        counters.fail(f"{name}: does not take a CPU tensor beside a CUDA tensor, even without dimensions")
    if any(not isinstance(tensor, Twin) for tensor in _written(func, args, kwargs)):
        counters.fail(f"{name}: a CPU tensor is written by an operator on CUDA tensors")


def _check_wait(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], twins: list[Twin]) -> bool:
    """Counts an operator that waits for the device; returns whether it is one."""
    waits = bool(twins) and name in WAITS
    if name in INDEXED and any(tensor.dtype is torch.bool for tensor in tensors_of(args[1])):
        waits = "put" not in name or bool(args[2].ndim)  # a mask and one value: masked_fill, which does not wait
    if name == "repeat_interleave":
        waits = kwargs.get("output_size") is None
    if waits:
        counters.add(WAIT, name)
        refuse_while_recording(f"{name} waits for the device")
    return waits


def note_access(used: list[Any], written: list[Any]) -> None:
    """Notes what an operator reads and writes, now or at each replay of the graph that is recorded."""
    if Graph.recording is not None:
        Graph.recording.access(used, written)
    else:
        accessed(used, written)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the arguments that the operator writes to."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += tensors_of(value)
    return written
