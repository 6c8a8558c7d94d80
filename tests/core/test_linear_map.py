"""Linear maps held as graphs, against Jacobians of torch.func and numpy's SVD."""

from __future__ import annotations

import oracles
import pytest
import torch
from torch import Tensor

from tl_jets.core.linear_map import GraphMap, LinearMap, SingularVectors
from tl_jets.core.numerals import size_text

BATCH, POS, D_IN, OUT_POS, ROWS, WIDTH = 2, 3, 5, 2, 4, 6


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def function(x: Tensor) -> Tensor:
    """A nonlinear function of every prompt alone, positions mixed."""
    mix, weight = randn(OUT_POS, POS, seed=1).to(x), randn(D_IN, ROWS, seed=2).to(x)
    return torch.einsum("op,bpd->bod", mix, torch.tanh(x) * x) @ weight + 3.0


@pytest.fixture(params=[False, True], ids=["plain", "readout"])
def case(request: pytest.FixtureRequest) -> tuple[GraphMap, Tensor]:
    """A map and its matrix [batch, out_pos, width, pos, d_model], by torch.func."""
    point = randn(BATCH, POS, D_IN, seed=3).requires_grad_()
    readout = randn(ROWS, WIDTH, seed=4) if request.param else None

    def whole(x: Tensor) -> Tensor:
        return function(x) if readout is None else function(x) @ readout

    with torch.no_grad():
        every = torch.func.jacrev(whole)(point.detach())  # [batch, out_pos, width, batch, pos, d_model]
        matrix = torch.stack([every[b, :, :, b] for b in range(BATCH)])
    return GraphMap(point, function(point), readout), matrix


def test_matrix_products_and_blocks(case):
    linear, matrix = case
    assert oracles.relative_error(linear.materialize(chunk_size=3), matrix) < 1e-14
    assert linear.n_bytes == matrix.numel() * 8
    assert tuple(matrix.shape) == (BATCH, *linear.out_shape[1:], *linear.in_shape[1:])
    u, v = randn(2, 7, BATCH, POS, D_IN, seed=5), randn(2, 7, *linear.out_shape, seed=6)
    for chunk_size in (1, 4, 32):
        found = linear.apply(u, chunk_size=chunk_size)
        assert oracles.relative_error(found, torch.einsum("bovpd,kmbpd->kmbov", matrix, u)) < 1e-13
        back = linear.apply_transpose(v, chunk_size=chunk_size)
        assert oracles.relative_error(back, torch.einsum("bovpd,kmbov->kmbpd", matrix, v)) < 1e-13
    for prompt in range(BATCH):
        whole = linear.block(out_pos=1, prompt=prompt, chunk_size=3)
        one = linear.block(out_pos=1, pos=2, prompt=prompt)
        assert whole.shape == (ROWS, POS, D_IN) and one.shape == (ROWS, 1, D_IN)
        seen = torch.einsum("rpd,rw->wpd", whole, linear.readout) if linear.readout is not None else whole
        assert oracles.relative_error(seen, matrix[prompt, 1]) < 1e-13
        assert torch.equal(one[:, 0], whole[:, 2])


@pytest.mark.parametrize("pos", [None, 1, -1])
def test_svd_is_the_full_one(case, pos):
    linear, matrix = case
    rows = matrix[1] if pos is None else matrix[1][:, :, pos][:, :, None]
    left, values, right = torch.linalg.svd(rows.flatten(2).flatten(0, 1), full_matrices=False)
    found = linear.svd(3, prompt=1, pos=pos)
    assert oracles.relative_error(found.values, values[:3]) < 1e-13
    assert found.right.shape == (3, POS if pos is None else 1, D_IN)
    overlap = torch.stack([(found.left.flatten(1) * left.T[:3]).sum(1), (found.right.flatten(1) * right[:3]).sum(1)])
    assert float((overlap.abs() - 1).abs().max()) < 1e-12
    assert float((overlap[0] - overlap[1]).abs().max()) < 1e-12, "left and right in the same sign"
    own = linear.point.detach()[1] if pos is None else linear.point.detach()[1, pos][None]
    assert bool(((found.right * own).sum((1, 2)) > 0).all())
    assert torch.equal(found.values, linear.svd(3, prompt=1, pos=pos).values)


def test_svd_of_a_float32_map_is_as_good_as_its_products():
    """The iteration itself is in float64; a value is off by the rounding of the products, relative to the largest."""
    gap = torch.logspace(0, -3, D_IN * POS, dtype=torch.float64)
    q = torch.linalg.qr(randn(D_IN * POS, D_IN * POS, seed=7)).Q
    weight = (q * gap @ q.T).float()
    point = randn(1, POS, D_IN, dtype=torch.float32).requires_grad_()
    linear = GraphMap(point, (point.flatten() @ weight.T).view(1, POS, D_IN))
    found = linear.svd(8)
    expected = torch.linalg.svdvals(weight.double())[:8]
    assert float(((found.values.double() - expected).abs() / expected[0]).max()) < 1e-6
    assert found.values.dtype is torch.float32


def test_what_it_prints_and_refuses(case, as_users_run_it):
    linear, _ = case
    assert isinstance(linear, LinearMap) and repr(linear).startswith("GraphMap([2, 3, 5] -> [2, 2,")
    table = linear.svd(2).to_dataframe()
    assert list(table.columns) == ["vector", "value", "relative"] and table.relative[0] == 1.0
    assert repr(SingularVectors(torch.arange(8.0, 0, -1), torch.zeros(8, 1, 2), torch.zeros(8, 1, 2))).endswith("...)")
    with pytest.raises(ValueError, match="shape"):
        linear.apply(randn(BATCH, POS))
    with pytest.raises(ValueError, match="shape"):
        linear.apply_transpose(randn(BATCH, POS, D_IN))
    with pytest.raises(ValueError, match=r"max_bytes = 8 B; it takes"):
        linear.materialize(max_bytes=8)
    for options, message in (
        ({"k": 99}, "k must lie"),
        ({"k": 2, "prompt": 2}, "prompt"),
        ({"k": 2, "pos": 3}, "pos must"),
    ):
        with pytest.raises(ValueError, match=message):
            linear.svd(**options)
    assert [size_text(n) for n in (10, 2048, 3 * 2**30)] == ["10 B", "2 KiB", "3 GiB"]
