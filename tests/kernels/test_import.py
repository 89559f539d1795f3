from __future__ import annotations

import json
import subprocess
import sys


def test_operators_import_no_heavy_package_and_no_other_part_of_tadperf():
    script = (
        "import sys, json; import torch; before = set(sys.modules); import tadperf.kernels;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(json.dumps([sorted(sys.modules), sorted(new)]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    loaded, new = json.loads(run.stdout)
    heavy = {"typer", "rich", "diffusers", "sklearn", "scipy", "pydantic", "kornia", "pyarrow", "matplotlib", "triton"}
    assert not heavy & set(loaded)
    ours = {name for name in loaded if name.startswith("tadperf.")}
    assert all(name.startswith("tadperf.kernels") for name in ours)
    assert not any(name.startswith("tadperf.kernels.gpu.") for name in ours)
    assert "tadperf.kernels.ops.per_sample" in ours
    assert "tadperf" in new
