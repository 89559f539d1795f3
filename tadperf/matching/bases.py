"""The bases that match.method can name."""

from __future__ import annotations

from tadperf.config import MatchConfig
from tadperf.errors import UserError
from tadperf.matching.base import Base
from tadperf.matching.features import FeatureMatching
from tadperf.matching.influence import InfluenceMatching
from tadperf.matching.trajectories import TrajectoryMatching

BASES: dict[str, type[Base]] = {
    "mtt": TrajectoryMatching,
    "ftd": TrajectoryMatching,
    "datm": TrajectoryMatching,
    "tgdd": FeatureMatching,
    "infmatch": InfluenceMatching,
}


def check_match_config(config: MatchConfig, num_classes: int) -> None:
    """Raises UserError for settings that the method cannot use."""
    if BASES[config.method] not in (FeatureMatching, InfluenceMatching):
        return
    if config.gradient != "adjoint":
        remedy = f"{config.method} has no inner steps to differentiate; leave match.gradient out"
        raise UserError("match.gradient", config.gradient, remedy)
    if config.batch is not None and config.batch < num_classes:
        remedy = f"{config.method} needs an image of each class in every iteration; use at least {num_classes}"
        raise UserError("match.batch", config.batch, remedy)
