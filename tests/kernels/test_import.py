from __future__ import annotations

import json
import subprocess
import sys


def test_operators_need_torch_and_numpy_only():
    script = (
        "import sys, json; import torch; before = set(sys.modules); import tadperf.kernels;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(json.dumps([sorted(sys.modules), sorted(new)]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    loaded, new = json.loads(run.stdout)
    assert not {"typer", "rich", "diffusers", "sklearn", "pydantic", "kornia", "pyarrow", "matplotlib"} & set(loaded)
    assert {name for name in loaded if name.startswith("tadperf.")} == {
        "tadperf.kernels",
        "tadperf.kernels.native",
        "tadperf.kernels.per_sample",
    } | {name for name in loaded if name == "tadperf.kernels._native"}
    assert "tadperf" in new
