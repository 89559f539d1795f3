"""Copies to a device and back. On a CPU; tests/cuda runs the same functions on the twin of a CUDA device."""

from __future__ import annotations

import torch

from tadperf.compute.transfer import ALIGNMENT, Download, PackedCopies, _aligned_size, _split, upload, upload_all

CPU = torch.device("cpu")
TENSORS = (
    torch.arange(5),
    torch.randn(3, 2, 3),
    torch.tensor(7.5),
    torch.zeros(0, 4),
    torch.randn(4, 3, dtype=torch.float64)[:, ::2],
    torch.tensor([True, False, True]),
)


def test_packed_memory_is_divided_into_aligned_views():
    sizes = [_aligned_size(tensor) for tensor in TENSORS]
    assert sizes == [48, 80, 16, 0, 64, 16]
    memory = torch.zeros(sum(sizes), dtype=torch.uint8)
    parts = _split(memory, sizes, TENSORS)
    for part, tensor in zip(parts, TENSORS, strict=True):
        assert (part.shape, part.dtype) == (tensor.shape, tensor.dtype)
        assert part.storage_offset() * part.element_size() % ALIGNMENT == 0
        part.copy_(tensor)
    for part, tensor in zip(parts, TENSORS, strict=True):  # no part overwrote another one
        assert torch.equal(part, tensor)


def test_copies_use_the_same_memory():
    copies = PackedCopies(TENSORS, CPU)
    addresses = [tensor.data_ptr() for tensor in copies.tensors]
    for values in (TENSORS, [torch.ones_like(tensor) for tensor in TENSORS]):
        copies.copy(values)
        for copy, value in zip(copies.tensors, values, strict=True):
            assert torch.equal(copy, value)
            assert not copy.numel() or copy.data_ptr() != value.data_ptr()
    assert [tensor.data_ptr() for tensor in copies.tensors] == addresses


def test_tensors_that_are_on_the_device_are_not_copied():
    assert all(one is other for one, other in zip(upload_all(TENSORS, CPU), TENSORS, strict=True))
    on_meta = upload_all(TENSORS, torch.device("meta"))
    assert [(t.shape, t.dtype, t.is_meta) for t in on_meta] == [(t.shape, t.dtype, True) for t in TENSORS]
    assert upload_all(on_meta, torch.device("meta")) == on_meta


def test_a_structure_keeps_what_is_no_tensor():
    values = {"a": (TENSORS[0], None), "b": [3, TENSORS[1]]}
    meta = torch.device("meta")
    moved = upload(values, meta)
    assert (moved["a"][0].is_meta, moved["a"][1], moved["b"][0], moved["b"][1].shape) == (True, None, 3, (3, 2, 3))
    assert upload(values, CPU) is values
    assert upload((None, 2), meta) == (None, 2)


def test_a_download_from_the_cpu_needs_no_copy():
    values = torch.randn(3, requires_grad=True)
    read = Download(values).read()
    assert torch.equal(read, values)
    assert not read.requires_grad
