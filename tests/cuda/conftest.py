"""The device of this tier, and settings of precision that every test begins with."""

from __future__ import annotations

import os

import pytest
import torch

from tests.helpers.cuda import precision_of_products

NAME = os.environ.get("LORA_LIGHTNING_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test; a CPU stands in where LORA_LIGHTNING_TEST_DEVICE says so."""
    if NAME.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device (LORA_LIGHTNING_TEST_DEVICE=cpu tries the tier without one)")
    return torch.device(NAME)


@pytest.fixture
def cuda(device) -> torch.device:
    """The device, where nothing else than CUDA will do."""
    if device.type != "cuda":
        pytest.skip("this test needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def _settings(device):
    """IEEE products of float32, and torch's defaults afterwards, of synchronisations too."""
    with precision_of_products("ieee"):
        yield
    if device.type == "cuda":  # a test that failed may have left it on
        torch.cuda.set_sync_debug_mode("default")
