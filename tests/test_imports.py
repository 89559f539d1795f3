"""Which third-party packages each entry point imports: only those that it uses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PRINT_PACKAGES = "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
AUDIT = f"""
import json, sys
from tadperf.cli.app import main

code = 0
try:
    main()
except SystemExit as end:
    code = end.code
{PRINT_PACKAGES}
sys.exit(code)
"""
SMALL_AUDIT = [
    "--noise=symmetric:0.2",
    "--device=cpu",
    "--quiet",
    *(f"--set={s}" for s in ("trust.rounds=1", "trust.proxies=2", "trust.epochs=1", "net.width=4", "net.depth=1")),
]


def imported_packages(script: str, folder: Path, *arguments: str) -> set[str]:
    """Top-level names in sys.modules after `script` has run in a process of its own; it prints them last."""
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_kernels_import_torch_and_numpy_only(tmp_path: Path) -> None:
    packages = imported_packages(f"import json, sys, tadperf.kernels; {PRINT_PACKAGES}", tmp_path)
    assert {"tadperf", "torch", "numpy"} <= packages
    assert not packages & {
        "diffusers",
        "matplotlib",
        "pyarrow",
        "pydantic",
        "rich",
        "scipy",
        "sklearn",
        "transformers",
        "typer",
    }


@pytest.mark.parametrize("data", ["digits", "small.npz"])
def test_audit_imports_no_package_for_diffusion_parquet_or_plots(tmp_path: Path, data: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", images=images, labels=np.arange(120) % 3)
    packages = imported_packages(AUDIT, tmp_path, "audit", data, *SMALL_AUDIT)
    assert {"tadperf", "torch", "pydantic", "typer"} <= packages
    assert not packages & {"diffusers", "matplotlib", "pyarrow", "transformers"}
