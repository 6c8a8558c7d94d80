"""The README's Python runs, in the order in which it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import zoo

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"PATH_OR_NAME": str(zoo.STORIES)}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["terms"].check().passed
    assert namespace["J"].reconstruction_error < 1e-5 < namespace["J"].ordinary_error
    assert namespace["lens"].kl.shape == (6, 3, 1, 21)
    assert not (namespace["ablated"].kl == namespace["lens"].kl[:, :2]).all()
