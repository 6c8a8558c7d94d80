"""Truncated Taylor arithmetic: series through PyTorch code, jets of functions and norms, computation modes.

This package does not depend on any model. Source: Chen et al., arXiv 2410.06024, eq. 6-7; Griewank & Walther 2008,
*Evaluating Derivatives*, ch. 13.

Example:
    >>> import torch
    >>> from tl_jets.calculus import jet
    >>> jet(torch.sin, torch.zeros(1), torch.ones(1), order=3).coefficients.flatten()
    tensor([ 0.0000,  1.0000,  0.0000, -0.1667])
"""

# Importing the rule modules fills the table.
import tl_jets.calculus.rules_arithmetic
import tl_jets.calculus.rules_layers
import tl_jets.calculus.rules_matrices
import tl_jets.calculus.rules_nonlinear
import tl_jets.calculus.rules_piecewise
import tl_jets.calculus.rules_structure  # noqa: F401
from tl_jets.calculus.frozen import frozen
from tl_jets.calculus.jet import Jet, jet
from tl_jets.calculus.modes import full_precision
from tl_jets.calculus.norms import CENTER_SCALES, CenterScale, Norm, NormJet, center_scale, norm_jet, rescaled
from tl_jets.calculus.series import Series

__all__ = [
    "CENTER_SCALES",
    "CenterScale",
    "Jet",
    "Norm",
    "NormJet",
    "Series",
    "center_scale",
    "frozen",
    "full_precision",
    "jet",
    "norm_jet",
    "rescaled",
]
