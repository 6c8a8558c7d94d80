"""The README's Python runs, in the order in which it stands there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["terms"].check().passed
    assert namespace["J"].reconstruction_error < 1e-5 < namespace["J"].ordinary_error
    assert namespace["lens"].kl.shape == (5, 3, 1, 11)
    assert not (namespace["ablated"].kl == namespace["lens"].kl[:, :2]).all()
