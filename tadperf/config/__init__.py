"""The configuration of a run: its schema, its presets, and how its sources are merged."""

from __future__ import annotations

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
