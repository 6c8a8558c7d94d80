"""What the tests of views share: a small random model and a padded batch."""

from __future__ import annotations

import pytest
import zoo

from tl_jets import ResidualNetwork


@pytest.fixture(scope="session")
def model():
    return zoo.build(next(spec for spec in zoo.available(zoo.CORE) if spec.name == "llama"))


@pytest.fixture(scope="session")
def network(model):
    return ResidualNetwork(model, "sublayer")


@pytest.fixture(scope="session")
def trace(network):
    return network.trace(["a b c d", "a b"])
