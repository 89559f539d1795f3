"""The configuration of a run: its schema, its presets, and how its sources are merged.

Names are imported when first used (PEP 562): the command line reads `tadperf.config.options` without pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tadperf.config.schema import (
        Backend,
        Config,
        DataConfig,
        DetectorConfig,
        DiffusionConfig,
        EvalConfig,
        ExpertConfig,
        MatchConfig,
        NetConfig,
        RefineConfig,
        Section,
        TrustConfig,
        flatten_sections,
    )

__all__ = [
    "Backend",
    "Config",
    "DataConfig",
    "DetectorConfig",
    "DiffusionConfig",
    "EvalConfig",
    "ExpertConfig",
    "MatchConfig",
    "NetConfig",
    "RefineConfig",
    "Section",
    "TrustConfig",
    "flatten_sections",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'tadperf.config' has no attribute {name!r}")
    from tadperf.config import schema

    return getattr(schema, name)
