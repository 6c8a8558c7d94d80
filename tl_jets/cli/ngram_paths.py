"""The paths that `tl-jets ngrams` sweeps without `--path`."""

from __future__ import annotations

from tl_jets.cli.session import UsageError
from tl_jets.core.network import ResidualNetwork
from tl_jets.ngrams.streams import DIRECT, MLPS, mlp_steps

# The default sweeps all paths if they are this few, and this many multiply-adds; else so many first tokens of one path.
EVERY, MOST_PATHS, SMALL, SAMPLED = "all", 8, 2e11, 4096


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
