"""What jets go through: the table of the documentation is true, and every call in it is right.

A sample is compared with the fitted polynomial each time; all of them if TL_JETS_ALL_FUNCTIONS is set.
"""

from __future__ import annotations

import os
import random
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tl_jets.calculus import Series, jet

TABLE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "supported_functions.py"))
CALLS = list(TABLE["calls"]())
RESULTS = {call: TABLE["through"](call) for call in CALLS}
THROUGH = [call for call, found in RESULTS.items() if isinstance(found, Tensor)]
SAMPLE = THROUGH if os.environ.get("TL_JETS_ALL_FUNCTIONS") else random.Random(13).sample(THROUGH, 60)
# What the page is generated with; other versions may take other operations apart.
OF_THE_PAGE = torch.__version__.split("+")[0] == TABLE["TORCH"]


@pytest.mark.skipif(not OF_THE_PAGE, reason=f"the page is of torch {TABLE['TORCH']}")
def test_the_page_says_what_works():
    refused = {call: found for call, found in RESULTS.items() if isinstance(found, str)}
    assert TABLE["PAGE"].read_text(encoding="utf-8") == TABLE["page"](refused), "python docs/supported_functions.py"


def test_most_calls_go_through_and_the_others_say_why():
    assert len(CALLS) > 550
    assert len(THROUGH) > 0.9 * len(CALLS)


@pytest.mark.parametrize("call", SAMPLE)
def test_a_call_agrees_with_a_polynomial_through_its_values(call):
    assert TABLE["difference"](call, RESULTS[call]) < TABLE["TOLERANCE"]


def test_the_fit_sees_a_wrong_coefficient():
    for call in ("torch.atan(x)", "nn.GRU(4, 3, batch_first=True)(x)[0]", "torch.linalg.det(a)"):
        for order in range(TABLE["ORDER"] + 1):
            wrong = RESULTS[call].clone()
            wrong[order] *= 1.001
            wrong[order] += 1e-3
            assert TABLE["difference"](call, wrong) > TABLE["TOLERANCE"]


@pytest.mark.parametrize("point", [0.0, 1.0, -1.0, 0.5])
@pytest.mark.parametrize(
    "call",
    [
        *(
            "torch.sinc(x)",
            "torch.xlogy(x, P)",
            "torch.special.xlog1py(x, P)",
            "torch.pow(x, N)",
            "torch.float_power(x, 3)",
        ),
        *("torch.prod(x, 1)", "torch.cumprod(x, -1)", "torch.tan(x)", "torch.sinh(x)", "torch.logaddexp(x, Y)"),
        *("F.tanhshrink(x)", "F.mish(x)", "F.cross_entropy(m, CLASSES)", "torch.logcumsumexp(x, -1)"),
        *(
            "torch.linalg.matrix_exp(a)",
            "torch.atan2(x, P)",
            "torch.hypot(x, P)",
            "torch.pow(P, x)",
            "torch.lerp(Y, P, x)",
        ),
    ],
)
def test_points_where_a_formula_divides_by_nothing(call, point):
    """The calls are smooth there, whatever a formula of theirs does: all elements at one point."""
    f, center = TABLE["function_of"](call)
    center = torch.full_like(center, point)
    direction = TABLE["direction_at"](center)
    found = f(Series.line(center, direction, TABLE["ORDER"])).coefficients
    fits = (TABLE["fitted"](f, center, direction, width) for width in (0.5, 0.2, 0.08))
    assert min(TABLE["_error"](found, fit) for fit in fits) < TABLE["TOLERANCE"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "module",
    [
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        ),
    ],
)
def test_fused_layers_under_every_mode(module, mode):
    """The fused paths of evaluation mode, which a plain tensor takes, and what a series takes are one function."""
    module = module.double().eval()
    x, v = TABLE["INPUTS"]["x"], TABLE["drawn"](2, 3, 4, seed=3)
    with mode():
        found = jet(module, x, x + v, 2).coefficients
    step = 1e-4
    with torch.no_grad():
        ahead, here, behind = module(x + step * v), module(x), module(x - step * v)
    assert torch.allclose(found[0], here, rtol=1e-10)
    assert torch.allclose(found[1], (ahead - behind) / (2 * step), atol=1e-6)
    assert torch.allclose(found[2], (ahead - 2 * here + behind) / (2 * step**2), atol=1e-5)


def test_what_has_no_rule_and_what_writes_into_plain_tensors_is_refused():
    for call, found in RESULTS.items():
        if isinstance(found, str):
            f, center = TABLE["function_of"](call)
            with pytest.raises((NotImplementedError, TypeError, RuntimeError)):
                jet(f, center, center + 0.1, 1)
    norm = nn.BatchNorm1d(3).double().train()
    before = norm.running_mean.clone()
    with pytest.raises(TypeError, match="only be written into a Series"):
        norm(Series.line(TABLE["INPUTS"]["x"], TABLE["INPUTS"]["x"], 1))
    assert torch.equal(norm.running_mean, before)
