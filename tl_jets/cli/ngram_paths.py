"""The paths that `tl-jets ngrams` sweeps without `--path`, and how long a sweep will take."""

from __future__ import annotations

import sys
import time

from tl_jets.cli.session import UsageError, together
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.processes import Processes
from tl_jets.ngrams import jet_bigrams_by_path
from tl_jets.ngrams.streams import DIRECT, MLPS, mlp_steps

# The default sweeps all paths if they are this few, and this many multiply-adds; else so many first tokens of one path.
EVERY, MOST_PATHS, SMALL, SAMPLED = "all", 8, 2e11, 4096
# First tokens, of all paths together, that are timed to foresee a sweep; one of more seconds is announced.
PROBED, LONG = 256, 10.0


def chosen_paths(
    given: list[str] | None, network: ResidualNetwork, rows: list[int] | None, whole: bool
) -> tuple[list[str], list[int] | None]:
    """The requested paths, and first tokens; None for all.

    By default all paths of a small model; of a large or deep one what all MLPs say after first tokens that are spread
    evenly over the vocabulary (all if `whole`), with `direct` after chosen ones.
    """
    mlps = mlp_steps(network)
    every = [DIRECT, *([MLPS, *mlps] if mlps else [])]
    if given and EVERY in given:
        if given != [EVERY]:
            raise UsageError(f"--path {EVERY} is all of them; leave the others out")
        return every, rows
    if given:
        return given, rows
    if len(every) <= MOST_PATHS and _work(network, len(every), rows) < SMALL:
        return every, rows
    if rows is not None:
        return every[:2], rows
    n_tokens = _vocabulary(network)
    sample = None if whole else list(range(0, n_tokens, max(1, n_tokens // SAMPLED)))[:SAMPLED]
    return [MLPS if mlps else DIRECT], sample


def _vocabulary(network: ResidualNetwork) -> int:
    return int(network.view.model.cfg.d_vocab)  # type: ignore[attr-defined]


def _work(network: ResidualNetwork, n_paths: int, rows: list[int] | None) -> float:
    """Multiply-adds of the products with W_U."""
    n_rows = _vocabulary(network) if rows is None else len(rows)
    return float(n_paths) * n_rows * network.decoder.d_vocab * network.decoder.d_model


def announce(network: ResidualNetwork, paths: list[str], rows: list[int] | None) -> None:
    """Say on standard error how long a long sweep will take, from the time of a few of its rows."""
    processes = Processes.of(together())
    if rows is not None or _work(network, len(paths), rows) < SMALL or processes.rank:
        return
    n_probed = max(8, PROBED // len(paths))
    jet_bigrams_by_path(network, paths, rows=[0], top_k=1, progress=False)  # what is kept with the model
    began = time.perf_counter()
    jet_bigrams_by_path(network, paths, rows=range(n_probed), top_k=1, progress=False)
    seconds = (time.perf_counter() - began) * _vocabulary(network) / n_probed / processes.size
    if seconds > LONG:
        what = paths[0] if len(paths) == 1 else f"{len(paths)} paths"
        minutes = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
        print(f"tl-jets: {what} after all {_vocabulary(network):,} tokens: about {minutes}", file=sys.stderr)
