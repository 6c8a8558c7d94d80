r"""A derivative at one input as a linear map: applied without its matrix, decomposed, or materialized on request.

======  ==========================================
symbol  name here
======  ==========================================
J u     `LinearMap.apply`
J' v    `LinearMap.apply_transpose`
J       `LinearMap.materialize`
======  ==========================================

`GraphMap` holds the graph of a forward pass; J u transposes its backward pass, J' v. `tl_jets.detached_map.composed_jacobian`
composes the maps of stages.

Example:
    >>> x = torch.ones(1, 2, 3, requires_grad=True)
    >>> J = GraphMap(point=x, value=x.cumsum(1) ** 2)
    >>> J.materialize()[0, 1, 0].tolist()
    [[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    >>> J.apply(torch.ones(1, 2, 3))[0, :, 0].tolist()
    [2.0, 8.0]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.eigenvectors import largest_eigenvectors
from tl_jets.core.measures import check_seed
from tl_jets.core.numerals import size_text
from tl_jets.core.options import check_integers
from tl_jets.core.results import Result

# Default number of vectors in one backward pass; of a matrix about a million numbers, if these are more vectors.
CHUNK_SIZE = 32
CHUNK_ELEMENTS = 2**20
MAX_CHUNK_SIZE = 256
MAX_BYTES = 2**30


@dataclass(frozen=True, eq=False, repr=False)
class LinearMap(ABC):
    """A derivative at one input, applied without its matrix.

    Attributes:
        point: The input [batch, pos, d_model].
        value: The function's output there [batch, out_pos, rows], before `readout`.
        readout: A matrix [rows, width] that multiplies the output (the unembedding), or None.
    """

    point: Float[Tensor, "batch pos d_model"]
    value: Float[Tensor, "batch out_pos rows"]
    readout: Float[Tensor, "rows width"] | None = None

    def __repr__(self) -> str:
        size = size_text(self.n_bytes)
        return f"{type(self).__name__}({list(self.in_shape)} -> {list(self.out_shape)}, {size} as a matrix)"

    @abstractmethod
    def apply_rows(
        self, vectors: Float[Tensor, "*many batch pos d_model"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch out_pos rows"]:
        """J u before the readout."""

    @abstractmethod
    def apply_transpose_rows(
        self, vectors: Float[Tensor, "*many batch out_pos rows"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch pos d_model"]:
        """J' v for v before the readout."""

    @property
    def in_shape(self) -> tuple[int, ...]:
        """[batch, pos, d_model]."""
        return tuple(self.point.shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[batch, out_pos, width]."""
        width = self.value.shape[-1] if self.readout is None else self.readout.shape[-1]
        return (*self.value.shape[:-1], width)

    @property
    def n_bytes(self) -> int:
        """Size of the matrix [batch, out_pos, width, pos, d_model]; there are no entries between prompts."""
        batch, pos, d_model = self.in_shape
        return batch * self.out_shape[1] * self.out_shape[2] * pos * d_model * self.value.element_size()

    def apply(
        self, vectors: Float[Tensor, "*many batch pos d_model"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch out_pos width"]:
        """J u: the change of the output for a change u of the input, `chunk_size` vectors at once.

        Raises:
            ValueError: The vectors do not have the input's shape.
        """
        check_integers(1, chunk_size=chunk_size)
        return self.read(self.apply_rows(vectors, chunk_size=chunk_size))

    def read(self, rows: Float[Tensor, "*many rows"]) -> Float[Tensor, "*many width"]:
        """Multiply rows by the readout."""
        return rows if self.readout is None else rows @ self.readout

    def apply_transpose(
        self, vectors: Float[Tensor, "*many batch out_pos width"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch pos d_model"]:
        """J' v: the input direction that an output direction v reads, `chunk_size` vectors at once.

        Raises:
            ValueError: The vectors do not have the output's shape.
        """
        check_integers(1, chunk_size=chunk_size)
        _check_shape(vectors, self.out_shape)
        vectors = vectors.to(self.value)
        rows = vectors if self.readout is None else vectors @ self.readout.T
        return self.apply_transpose_rows(rows, chunk_size=chunk_size)

    def materialize(
        self, *, max_bytes: int | None = MAX_BYTES, chunk_size: int | None = None
    ) -> Float[Tensor, "batch out_pos width pos d_model"]:
        """J as a matrix [batch, out_pos, width, pos, d_model].

        Args:
            max_bytes: Largest size allowed, else ValueError; None for no limit.
            chunk_size: Rows computed at once; None for about a million numbers, at least 32 rows.

        Cost: A backward pass per output position and row before the readout (d_model of them for logits).
        """
        if chunk_size is not None:
            check_integers(1, chunk_size=chunk_size)
        if max_bytes is not None and self.n_bytes > max_bytes:
            raise ValueError(
                f"The matrix {[self.out_shape[0], *self.out_shape[1:], *self.in_shape[1:]]} must take at most "
                f"max_bytes = {size_text(max_bytes)}; it takes {size_text(self.n_bytes)}. Use apply and apply_transpose, fewer "
                f"positions, or max_bytes=None."
            )
        batch, out_pos, rows = self.value.shape
        found = self._all_rows(chunk_size).view(batch, out_pos, rows, *self.in_shape[1:])
        return found if self.readout is None else torch.einsum("bortd,rv->bovtd", found, self.readout)

    def _all_rows(self, chunk_size: int | None) -> Float[Tensor, "batch row pos d_model"]:
        """The rows of J before the readout, those of an output position after the other."""
        chunk_size = self._chunk_size(chunk_size)
        batch, out_pos, rows = self.value.shape
        units = torch.eye(out_pos * rows, dtype=self.value.dtype, device=self.value.device)
        found = self.point.new_empty(batch, out_pos * rows, *self.in_shape[1:])
        for start in range(0, len(units), chunk_size):
            chunk = units[start : start + chunk_size].view(-1, 1, out_pos, rows).expand(-1, batch, -1, -1)
            here = self.apply_transpose_rows(chunk, chunk_size=chunk_size)
            found[:, start : start + chunk_size] = here.transpose(0, 1)
        return found

    def block(
        self, *, out_pos: int = -1, pos: int | None = None, prompt: int = 0, chunk_size: int | None = None
    ) -> Float[Tensor, "rows in_pos d_model"]:
        """One block of J from one or all input positions to one output position, before the readout.

        Args:
            out_pos: Index into the output positions.
            pos: Input position in the padded row, or None for all.
            prompt: Index of the prompt.
            chunk_size: Rows computed at once, each by a backward pass; None for about a million numbers.
        """
        chunk_size = self._chunk_size(chunk_size)
        rows = self.value.shape[-1]
        keep = slice(None) if pos is None else [pos]
        found = self.point.new_empty(rows, *self.point[prompt, keep].shape)
        for start in range(0, rows, chunk_size):
            wanted = torch.arange(start, min(start + chunk_size, rows), device=self.value.device)
            units = self.value.new_zeros(len(wanted), *self.value.shape)
            units[wanted - start, prompt, out_pos, wanted] = 1
            found[wanted] = self.apply_transpose_rows(units, chunk_size=chunk_size)[:, prompt, keep]
        return found

    def _chunk_size(self, chunk_size: int | None) -> int:
        """How many vectors run together: as many as were asked for, or about a million numbers."""
        if chunk_size is not None:
            check_integers(1, chunk_size=chunk_size)
            return chunk_size
        return max(CHUNK_SIZE, min(MAX_CHUNK_SIZE, CHUNK_ELEMENTS // max(1, self.point.numel())))

    def svd(self, k: int, *, prompt: int = 0, pos: int | None = None, seed: int = 0) -> SingularVectors:
        """The k largest singular values and vectors of one prompt's J, without the matrix (`largest_eigenvectors` of J J').

        With `pos`, of the matrix J_t of this position alone; with None, of all side by side. `seed` is that of the
        first 2 k vectors. Cost: some ten products of as many vectors with J and J', fewer where J is small.

        Raises:
            ValueError: k is not in 1..rank bound - 1, or the prompt or position does not exist.
        """
        (batch, *in_shape), (_, *out_shape) = self.in_shape, self.out_shape
        check_integers(1, k=k)
        check_integers(0, prompt=prompt)
        check_seed(seed)
        keep = slice(None)
        if pos is not None:
            check_integers(-in_shape[0], pos=pos)
            if pos >= in_shape[0]:
                raise ValueError(f"pos must lie in {-in_shape[0]}..{in_shape[0] - 1}; got {pos}.")
            keep, in_shape = slice(pos % in_shape[0], pos % in_shape[0] + 1), [1, in_shape[1]]
        shape = (math.prod(out_shape), math.prod(in_shape))
        if k >= min(shape):
            raise ValueError(
                f"k must lie in 1..{min(shape) - 1} here; got {k}. For all of them take the SVD of materialize()."
            )
        if prompt >= batch:
            raise ValueError(f"prompt must lie in 0..{batch - 1}; got {prompt}.")

        few = max(1, CHUNK_ELEMENTS // max(self.point.numel(), self.value.numel()))

        def product(apply: Callable[..., Tensor], full: tuple[int, ...], index: Any, out_index: Any) -> Any:
            def of(vectors: Tensor) -> Tensor:
                every = self.point.new_zeros(len(vectors), *full)
                every[index] = vectors.view(every[index].shape).to(every)
                return apply(every, chunk_size=few)[out_index].flatten(1)

            return of

        of_input, of_output = (slice(None), prompt, keep), (slice(None), prompt)
        J = product(self.apply, self.in_shape, of_input, of_output)
        transpose = product(self.apply_transpose, self.out_shape, of_output, of_input)
        # Iterate on the shorter side; compute the vectors of the longer side at the end.
        wide = shape[0] <= shape[1]
        across, back = (transpose, J) if wide else (J, transpose)
        start = torch.from_numpy(np.random.default_rng(seed).standard_normal((2 * k, min(shape))))
        short = largest_eigenvectors(lambda x: back(across(x)), start.to(self.point.device), k, self.point.dtype)
        short = short.to(self.point)
        long = across(short)
        values = torch.linalg.vector_norm(long, dim=1, dtype=torch.float64).to(long)
        # Orthonormal to rounding: what they are multiplied by is not, in float32.
        basis, scales = torch.linalg.qr(long.double().mT)
        long = (basis * scales.diagonal().sign()).mT.to(long)
        left, right = (short, long) if wide else (long, short)
        # Choose signs by the prompt's own input.
        own = self.point.detach()[prompt, keep].flatten()
        sign = torch.where(right @ own < 0, -1.0, 1.0).to(right)[:, None]
        return SingularVectors(values, left.mul_(sign).view(k, *out_shape), right.mul_(sign).view(k, *in_shape))


@dataclass(frozen=True, eq=False, repr=False)
class GraphMap(LinearMap):
    """A derivative held as the graph of a forward pass: `value` requires gradients of `point`.

    Cost: one backward pass for J' v, two for J u (the first is kept); many vectors run as one batch.
    """

    @cached_property
    def _transpose(self) -> tuple[Tensor, Tensor]:
        """J' v as a function of v, differentiable."""
        weights = torch.zeros_like(self.value, requires_grad=True)
        with torch.inference_mode(False), torch.enable_grad():
            return _gradient(self.value, self.point, weights, create_graph=True), weights

    def apply_rows(
        self, vectors: Float[Tensor, "*many batch pos d_model"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch out_pos rows"]:
        """J u before the readout, by transposing the backward pass."""
        return _batched(*self._transpose, vectors, chunk_size)

    def apply_transpose_rows(
        self, vectors: Float[Tensor, "*many batch out_pos rows"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch pos d_model"]:
        """J' v for v before the readout."""
        return _batched(self.value, self.point, vectors, chunk_size)


@dataclass(frozen=True, eq=False, repr=False)
class SingularVectors(Result):
    """The largest singular values and vectors of one prompt's map: J is close to sum_i values_i left_i right_i'.

    The sign of each right vector makes its product with the prompt's own input positive. The iteration runs in float64
    on the shorter side of J, but the products have the map's rounding: a value s is off by about eps s_1^2 / s, so
    values below sqrt(eps) s_1 are noise.

    Attributes:
        values: Singular values, largest first [k].
        left: Output directions [k, out_pos, width].
        right: Input directions [k, pos, d_model]; pos is 1 if one position was requested.
    """

    values: Float[Tensor, " k"]
    left: Float[Tensor, "k out_pos width"]
    right: Float[Tensor, "k pos d_model"]

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:.3g}" for value in self.values[:6].tolist())
        return f"SingularVectors({shown}{', ...' if len(self.values) > 6 else ''})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per vector. Columns: vector, value, relative (to the largest)."""
        values = self.values.tolist()
        rows = [{"vector": i, "value": value, "relative": value / values[0]} for i, value in enumerate(values)]
        return pd.DataFrame(rows)


def _batched(outputs: Tensor, inputs: Tensor, vectors: Tensor, chunk_size: int) -> Tensor:
    """Backward pass from `outputs` to `inputs` for vectors [*many, *outputs.shape]: [*many, *inputs.shape]."""
    shape = tuple(outputs.shape)
    _check_shape(vectors, shape)
    many = vectors.shape[: -len(shape)]
    flat = vectors.to(outputs).reshape(-1, *shape)
    found = flat.new_empty(len(flat), *inputs.shape)
    for start in range(0, len(flat), chunk_size):
        chunk = slice(start, start + chunk_size)
        if len(flat[chunk]) == 1:
            found[start] = _gradient(outputs, inputs, flat[start], retain_graph=True)
        else:
            found[chunk] = _gradient(outputs, inputs, flat[chunk], retain_graph=True, is_grads_batched=True)
    return found.reshape(*many, *inputs.shape)


def _gradient(outputs: Tensor, inputs: Tensor, vectors: Tensor, **options: bool) -> Tensor:
    """The backward pass; 0 where the outputs are constant."""
    found = None
    try:
        if outputs.requires_grad:
            (found,) = torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, **options)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ValueError(
            f"A hook must return a new tensor where derivatives are taken; one changed in place what the backward pass needs "
            f"({error}). Write `return pattern * 0.5` for `pattern *= 0.5`; the ordinary Jacobian is left out with "
            f"ordinary=False."
        ) from error
    return inputs.new_zeros(*vectors.shape[: vectors.ndim - outputs.ndim], *inputs.shape) if found is None else found


def _check_shape(vectors: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(vectors.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"Vectors must have the shape {list(shape)}, with any number of leading dimensions; got "
            f"{list(vectors.shape)}."
        )
