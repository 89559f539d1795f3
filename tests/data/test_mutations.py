"""Files with random damage: each opens or is refused in one line. bench/tools/mutate_files.py tries thousands."""

from __future__ import annotations

import pytest
from PIL import features

from tadperf.bench.tools.mutate_files import CASES, run_case


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_opens_or_is_refused(name):
    if name == "image-avif" and not features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    result = run_case(name, range(10**6, 10**6 + 25))
    assert result.faults == []
    assert result.opened + result.refused == 25
    assert result.refused > 0
