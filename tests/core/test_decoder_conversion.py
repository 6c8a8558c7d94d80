"""Columns of a half-precision `W_U`: converted once where a device has room, else in slices as large as it allows."""

from __future__ import annotations

import pytest
import torch
from two_devices import DEVICES, TwoDevices

from tl_jets.calculus import Norm
from tl_jets.core import decoder as module
from tl_jets.core.decoder import Decoder
from tl_jets.core.logit_reader import Reader, top_tokens


def made(device: torch.device | str) -> Decoder:
    W_U = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    return Decoder(norm=Norm("none"), W_U=W_U.to(device), b_U=torch.zeros(100, device=device).bfloat16())


@pytest.mark.parametrize(("free", "slices"), [(8 * 4 * 800, 1), (8 * 4 * 400, 2), (0, 25), (None, 25)])
def test_slices_fill_what_a_device_has_left(monkeypatch, free, slices):
    monkeypatch.setattr(module, "CONVERTED_ELEMENTS", 32)
    monkeypatch.setattr(module, "free_bytes", lambda device: free)
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    wanted = top_tokens(made("cpu"), states, k=3)
    with TwoDevices():
        decoder = made(DEVICES[0])
        assert len(list(decoder.columns(torch.float32))) == slices
        reader = Reader(decoder, torch.float32, DEVICES[0])
        assert (reader.decoder.W_U.dtype is torch.float32) == (slices == 1)
        found = top_tokens(decoder, states.to(DEVICES[0]), k=3)
    assert torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close(found.values, wanted.values)


def test_a_cpu_converts_what_stays_in_cache(monkeypatch):
    monkeypatch.setattr(module, "CONVERTED_ELEMENTS", 32)
    monkeypatch.setattr(module, "free_bytes", lambda device: pytest.fail("the free memory of a CPU is not asked for"))
    decoder = made("cpu")
    assert len(list(decoder.columns(torch.float32))) == 25
    assert decoder.converted(torch.float32) is decoder
