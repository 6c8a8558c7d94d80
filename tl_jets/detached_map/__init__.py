"""The detached map: a language model as an exact linear map of its input embeddings, at one input.

- `detached(model)`: context in which norm scales, patterns and gates are constants for derivatives;
- `detached_jacobian(model, text)`: the map and its bias, applied, decomposed and decoded;
- `detached_spectra(model, text)`: singular values, stable ranks and leading subspaces by layer.

Source: Golden, *Equivalent Linear Mappings of Large Language Models* (arXiv 2505.24293).
"""

from tl_jets.detached_map.block_norms import BlockNorms
from tl_jets.detached_map.context import detached
from tl_jets.detached_map.jacobian import DetachedJacobian, detached_jacobian
from tl_jets.detached_map.spectra import DetachedSpectra, detached_spectra

__all__ = [
    "BlockNorms",
    "DetachedJacobian",
    "DetachedSpectra",
    "detached",
    "detached_jacobian",
    "detached_spectra",
]
