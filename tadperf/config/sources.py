"""The sources of a run's settings, as one value. Imports pydantic only when a config is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tadperf.config.schema import Config


@dataclass(frozen=True)
class ConfigSources:
    """The arguments of `tadperf.config.merge.merge`, except `base`."""

    preset: str | None = None
    toml_path: Path | None = None
    sets: Sequence[str] = ()  # "section.key=value" each
    options: Mapping[str, Any] = field(default_factory=dict)  # dotted field -> value

    def config(self, base: Config | None = None) -> Config:
        """Merges the sources over `base`, the config of a resumed run. Raises UserError, which names the field."""
        from tadperf.config.merge import merge

        return merge(self.preset, self.toml_path, self.sets, self.options, base)

    def preset_name(self) -> str:
        """Returns the named preset, or the default one for the data."""
        from tadperf.config.merge import default_preset

        return self.preset or default_preset(self.toml_path, self.sets, self.options)
