"""Arguments and results of operators: tuples, lists and dictionaries. Several times faster than PyTorch's pytree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def leaves(tree: Any) -> Iterator[Any]:
    """Yields everything in nested tuples, lists and dictionaries."""
    if isinstance(tree, (tuple, list)):
        for part in tree:
            yield from leaves(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from leaves(part)
    else:
        yield tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples, lists and dictionaries. The twin spends most of its time here."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    found: list[Tensor] = []
    for part in tree:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list, dict)) and part:
            found += tensors_of(part)
    return found


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns the same tree with the function of each leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, part) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [map_leaves(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree)
