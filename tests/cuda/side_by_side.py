"""Networks side by side on the twin, with one stream and with several: python tests/cuda/run_twin.py side_by_side.py

Prints the events of two streams, whether the results depend on the number of streams, and what nothing orders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

import stream_order
import torch
from counters import counters
from stream_order import Stream
from torch import Tensor
from training_steps import LABELS, NET, RECIPE, case
from trust_rounds import problem

from tadperf.compute import streams
from tadperf.config import TrustConfig
from tadperf.nets import students
from tadperf.nets.flat import FlatNet
from tadperf.nets.students import Examples, Student, StudentScorer
from tadperf.progress import silent
from tadperf.trust.proxies import train_proxies
from tadperf.trust.state import as_given

DEVICE = torch.device("cuda", 0)


def events_of_two_streams() -> dict[str, Any]:
    """Three tasks of two parts on two streams. The values are made by the caller, the tasks and then the caller."""
    values = torch.arange(3.0).cuda()
    events = stream_order.events = []

    def start(item: int) -> Generator[object, None, Tensor]:
        total = values[item] * 10
        events.append(("part", item, Stream.current.cuda_stream))
        yield
        events.append(("part", item, Stream.current.cuda_stream))
        return total + item

    def finish(total: Tensor) -> float:
        events.append(("finish", Stream.current.cuda_stream))
        return float(total)

    found = dict(streams.run_side_by_side(start, range(3), DEVICE, 2, finish))
    return {"results": [found[item] for item in range(3)], "events": [list(event) for event in events]}


def proxy_outputs() -> list[Tensor]:
    p = problem("plain", "cuda")
    config = TrustConfig.model_validate({"proxies": 3, "epochs": 3, "batch": 36})
    outputs = train_proxies(p, as_given(p.labels, p.class_names).view(), config, silent)
    assert isinstance(outputs.probabilities, Tensor)
    return [outputs.losses, outputs.probabilities, outputs.features]


def student_weights() -> list[Tensor]:
    """Returns the weights of four students by their number, three of which are trained at a time."""
    weights: dict[float, Tensor] = {}
    images, few = case("plain", "cuda")["images"], RECIPE._replace(epochs=10, decay=True)

    def keep(module: torch.nn.Module, *_: Any) -> Tensor:
        number = len(order) and order.pop(0)
        weights[number] = FlatNet(module).flatten()
        return torch.zeros((), device=DEVICE)

    order: list[int] = []
    original, students.count_correct = students.count_correct, keep
    try:
        rows = [Student("row", repeat, NET, few, lambda: Examples(images, LABELS)) for repeat in range(4)]
        scorer, order = StudentScorer(images, LABELS, 3, 0, DEVICE), list(range(4))
        students.score_students(scorer, rows, lambda *_: None)
    finally:
        students.count_correct = original
    return [weights[number] for number in range(4)]


def same_with_one_stream(run: Callable[[], list[Tensor]]) -> dict[str, Any]:
    """Returns whether the results are those of one stream, and how many streams ran graphs."""
    events = stream_order.events = []
    streams.STREAMS = 3
    several = [tensor.cpu() for tensor in run()]
    used = {event[1] for event in events if event[0] == "replay"}
    streams.STREAMS = 1
    one = [tensor.cpu() for tensor in run()]
    return {"same": all(torch.equal(a, b) for a, b in zip(several, one, strict=True)), "streams": len(used)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"events": events_of_two_streams()}
    found |= {"proxies": same_with_one_stream(proxy_outputs), "students": same_with_one_stream(student_weights)}
    print(json.dumps(found | {"problems": counters.problems}))
