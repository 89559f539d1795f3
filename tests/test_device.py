"""Which device a name means."""

from __future__ import annotations

import pytest
import torch

from tadperf.device import describe, resolve
from tadperf.errors import UserError

COUNT = torch.cuda.device_count()


def test_names():
    assert resolve("cpu") == torch.device("cpu")
    assert resolve("auto") == torch.device("cuda:0" if COUNT else "cpu")
    assert describe(resolve("cpu"))


@pytest.mark.parametrize("name", [f"cuda:{COUNT}", "cpu:0", "cuda:x", "cuda:-1", "mps", ""])
def test_what_is_not_there_is_refused(name):
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert caught.value.field == "--device"
    assert caught.value.value == name
