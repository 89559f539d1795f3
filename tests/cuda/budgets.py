"""How much one unit of work may ask of a CUDA device. tests/cuda/test_budgets.py compares it with work_units.py.

Lower a number when the code gets better; a larger number needs a reason. The ConvNet has depth 3, as for CIFAR. Nodes
are the kernels inside the CUDA graph of a unit, launches are those outside. A blocking copy and a wait each stop the
CPU until the device is done with everything before. A fraction is something that happens once in several units.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    """The most that one unit may need. replays: of CUDA graphs."""

    nodes: float
    replays: float = 1
    launches: float = 0
    async_copies: float = 0
    blocking_copies: float = 0
    waits: float = 0


BUDGETS = {
    # 8 steps are one graph.
    "expert step": Budget(nodes=30, replays=1 / 8),
    "flat expert step": Budget(nodes=83, replays=1 / 8),  # experts.rho > 0: two passes
    "student step": Budget(nodes=30, replays=1 / 8),  # soft labels
    # An epoch is 4 steps here: one graph, one upload of its draws, and one launch that sets the position back to 0.
    "proxy step": Budget(nodes=44, replays=1 / 4, launches=1 / 4, async_copies=1 / 4),
    # nodes: those of one inner step and its adjoint.
    "matching iteration": Budget(nodes=116, launches=37, async_copies=2, waits=1),
}
