"""The report of a run or an audit as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tadperf.files import has_write_access, write_bytes
from tadperf.report.page_images import distilled_rows, pair_uris, suspect_groups
from tadperf.report.page_values import audit_values, percent, run_values, shown_name, shown_path
from tadperf.report.words import VERDICTS

if TYPE_CHECKING:
    from torch import Tensor

    from tadperf.artifact import DistilledSet
    from tadperf.trust.state import TrustState

TEMPLATE = "page.html"


class ShownPairs(NamedTuple):
    """Pairs of near duplicates: the rows of the list by column, their samples, and the images of the test split."""

    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[tuple[int, int]]
    test_images: Tensor | None


def save_run_page(
    path: Path | str,
    result: Mapping[str, Any],
    distilled: DistilledSet,
    images: Tensor | None = None,
    file_names: Sequence[str] | None = None,
    state: TrustState | None = None,
) -> None:
    """Writes the page of a run, atomically. Does nothing in a process without write access.

    result: the content of result.json. images: uint8 [N, C, H, W], the training images. file_names: of these images.
    state: the verdicts on their labels, if trust was on.
    """
    if has_write_access():
        values = run_values(result, distilled.class_names)
        values["distilled"] = _distilled_values(distilled)
        if state is not None:
            values["suspects"] = _suspect_values(state, images, file_names)
        write_bytes(path, render(values))


def save_audit_page(
    path: Path | str,
    result: Mapping[str, Any],
    state: TrustState,
    images: Tensor | None = None,
    file_names: Sequence[str] | None = None,
    duplicates: ShownPairs | None = None,
) -> None:
    """Writes the page of an audit, atomically. result: as `pipeline.audit.audit_result` returns it.

    duplicates: near duplicates, if the audit looked for them.
    """
    if has_write_access():
        values = audit_values(result, state.class_names, images is not None)
        values["suspects"] = _suspect_values(state, images, file_names)
        if duplicates is not None:
            values["duplicates"] = _duplicate_values(duplicates, images, result["near_duplicates"])
        write_bytes(path, render(values))


def render(values: Mapping[str, Any]) -> bytes:
    """Fills the template. Escapes every value; text that cannot be encoded becomes question marks."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"name": shown_name, "path": shown_path, "percent": percent}
    return environment.get_template(TEMPLATE).render(values).encode(errors="replace")


def _distilled_values(distilled: DistilledSet) -> dict[str, Any]:
    """Returns the distilled images as data URIs by class, and how many images the page leaves out."""
    rows = distilled_rows(distilled.pixels(), distilled.hard_labels, distilled.num_classes)
    names = distilled.class_names
    return {
        "rows": [{"name": names[c], "count": count, "uris": uris} for c, count, uris in rows],
        "hidden": len(distilled.images) - sum(len(uris) for _, _, uris in rows),
        "total": len(distilled.images),
    }


def _suspect_values(state: TrustState, images: Tensor | None, file_names: Sequence[str] | None) -> dict[str, Any]:
    """Returns the suspected errors by confusion, and how many of them the page leaves out."""
    groups, verdicts, names = suspect_groups(state, images), tuple(VERDICTS), state.class_names
    total = int(state.issues.sum())
    return {
        "total": total,
        "hidden": total - sum(len(group.samples) for group in groups),
        "with_images": images is not None,
        "no_room": images is not None and any(not sample.uri for group in groups for sample in group.samples),
        "groups": [
            {
                "given": names[group.given],
                "suggested": None if group.given == group.suggested else names[group.suggested],
                "count": group.total,
                "samples": [
                    {
                        "place": f"row {index}" if file_names is None else file_names[index],
                        "score": f"{score:.3f}",
                        "verdict": verdicts[verdict],
                        "uri": uri,
                    }
                    for index, score, verdict, uri in group.samples
                ],
            }
            for group in groups
        ],
    }


def _duplicate_values(duplicates: ShownPairs, images: Tensor | None, counts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the first pairs with their images, and the counts of all pairs."""
    rows = duplicates.rows
    places = [(a, b, row["kind"] == "leak") for (a, b), row in zip(duplicates.samples, rows, strict=True)]
    uris = pair_uris(places, images, duplicates.test_images)
    return {
        "counts": counts,
        "hidden": len(rows) - len(uris),
        "with_images": images is not None,
        "pairs": [dict(row) | {"uris": pair} for row, pair in zip(rows, uris, strict=False)],
    }
