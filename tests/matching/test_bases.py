"""Every method has a base; settings that a base cannot use are refused; the loop runs a base of other people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.config import Config, MatchConfig
from tadperf.config.presets import BASES as DEFAULTS
from tadperf.errors import UserError
from tadperf.matching.base import Base, MatchProblem, draw_generator, image_gradient
from tadperf.matching.bases import BASES, check_match_config
from tadperf.matching.gradient import Gradient
from tadperf.matching.loop import match_trajectories
from tadperf.matching.multi_formation import open_base
from tadperf.matching.state import MatchState, initial_state
from tadperf.run.folder import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_method_has_a_base_and_defaults():
    methods = set(get_args(MatchConfig.model_fields["method"].annotation))
    assert set(BASES) == methods
    assert set(DEFAULTS) == methods
    assert [name for name, base in BASES.items() if not base.learns_lr] == ["tgdd", "infmatch"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient": "unroll"}, "match.gradient: unroll: tgdd has no inner steps to differentiate; leave"),
        ({"gradient": "tesla"}, "match.gradient: tesla: tgdd has no inner steps to differentiate; leave"),
        ({"batch": 9}, "match.batch: 9: tgdd needs an image of each class in every iteration; use at least 10"),
    ],
)
@pytest.mark.parametrize("method", ["tgdd", "infmatch"])
def test_settings_that_bases_without_inner_steps_cannot_use_are_refused(values, message, method):
    with pytest.raises(UserError) as refused:
        check_match_config(MatchConfig.model_validate({"method": method, **values}), 10)
    assert str(refused.value).startswith(message.replace("tgdd", method))
    check_match_config(MatchConfig.model_validate(values), 10)  # trajectory matching can
    check_match_config(MatchConfig.model_validate({"method": method, "batch": 10}), 10)


class TowardsATarget(Base):
    """Pulls the images to random targets with the mean 1."""

    layers = ("distance",)

    def gradient(self, state: MatchState, number: int) -> Gradient:
        noise = torch.randn(state.images.shape, generator=draw_generator(self.problem, state, number))
        difference = state.images - 1 - 0.1 * noise
        loss = difference.square().mean()
        return image_gradient(loss, 2 * difference / difference.numel(), layers=loss[None])


def learn(place: Path, stop: int = 0) -> tuple[Tensor, list[dict[str, Any]]]:
    """Returns the learned images and the records of matching. stop: raises KeyboardInterrupt after this iteration."""
    config = MatchConfig(iterations=20, check_every=5, lr_img=2.0, trajectories=2)
    unused: Any = None
    problem = MatchProblem(unused, unused, config, "none", 0, make_base=TowardsATarget)

    def progress(stage: str, done: int, total: int, **_: object) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with Run.create(place, Config(match=config), resume=place.exists()) as run:
        (place / "checkpoints").mkdir(exist_ok=True)
        state = initial_state(torch.zeros(4, 1, 3, 3), torch.arange(4), config)
        best = match_trajectories(state, problem, lambda *_: 0.5, run, progress)
    return best.images, [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_the_loop_runs_a_base_of_other_people(tmp_path):
    images, records = learn(tmp_path / "whole")
    assert float((images - 1).abs().max()) < 0.3
    losses = [record for record in records if "loss" in record]
    assert [list(record["layers"]) for record in losses] == [["distance"]] * 20
    assert {record["lr"] for record in losses} == {losses[0]["lr"]}  # there is no gradient of the learning rate
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", stop=12)
    resumed, again = learn(tmp_path / "cut")
    assert torch.equal(resumed, images)
    assert again == records


def test_a_base_sees_small_images_enlarged_and_its_gradient_is_that_of_the_small_ones():
    target = torch.randn(4, 2, 7, 7, dtype=torch.float64)

    class Distance(Base):
        layers, learns_lr, exploded = ("a",), True, 7.0

        def gradient(self, state: MatchState, number: int) -> Gradient:
            difference = state.images - target - number
            return image_gradient(difference.square().sum(), 2 * difference)

    config = Config().match
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    state = initial_state(images, torch.arange(4), config)
    unused: Any = None
    problem = MatchProblem(unused, unused, config, "none", 0, side=7)
    base = open_base(Distance, state, problem)
    assert (base.layers, base.learns_lr, base.exploded) == (("a",), True, 7.0)
    wide = F.interpolate(images, size=(7, 7), mode="bilinear")
    for number, found in enumerate(base.gradients(state, [0, 1])):
        loss = (wide - target - number).square().sum()
        (wanted,) = torch.autograd.grad(loss, images, retain_graph=True)
        torch.testing.assert_close(found.loss, loss.detach(), check_dtype=False)
        torch.testing.assert_close(found.images, wanted)
    assert type(open_base(Distance, initial_state(target, torch.arange(4), config), problem)) is Distance
