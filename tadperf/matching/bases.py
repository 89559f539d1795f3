"""The bases that match.method can name."""

from __future__ import annotations

from tadperf.matching.base import Base
from tadperf.matching.trajectories import TrajectoryMatching

BASES: dict[str, type[Base]] = {
    "mtt": TrajectoryMatching,
    "ftd": TrajectoryMatching,
    "datm": TrajectoryMatching,
}
