"""What all tests share."""

from __future__ import annotations

import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jaxtyping
import pytest
from browser import browser, show  # noqa: F401 (fixtures)

# The same examples every time: a red run is then about the change, not about luck.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def as_users_run_it():
    """Without the run-time type checks of the tests: a wrong type then meets the library's own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Files whose tests take more than half a second each, and what needs other programs: not in the fast tier.
SLOW = {
    "test_attribution",
    "test_browser",
    "test_changes",
    "test_circuitsvis",
    "test_cli",
    "test_cli_corners",
    "test_cli_jacobian",
    "test_cli_ngrams",
    "test_cli_paths",
    "test_cli_paths_prompts",
    "test_demos",
    "test_detached_chain",
    "test_device_work",
    "test_devices",
    "test_docs",
    "test_explorer",
    "test_families",
    "test_figures",
    "test_front_door",
    "test_head_scores",
    "test_memory",
    "test_ngrams",
    "test_notebooks",
    "test_pretrained",
    "test_readme",
    "test_scores",
    "test_shards",
    "test_studies",
    "test_sweep_states",
    "test_trigram_sweeps",
    "test_trigrams",
    "test_views",
}
# Of the tests of every family the fast tier runs these.
FAST_FAMILIES = ("bridge-gpt2-raw", "bridge-llama-raw")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the fast tier: `pytest -m fast`."""
    for item in items:
        family = re.search(r"(?:bridge|hooked)-\w+-(?:raw|processed)", item.nodeid)
        slow = item.path.stem in SLOW or item.get_closest_marker("real") is not None
        if not slow and (family is None or family[0] in FAST_FAMILIES):
            item.add_marker("fast")
