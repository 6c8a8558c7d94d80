"""Norms of rows and columns of a detached map, against every token's own embedding and logit row, one by one."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import zoo

import tl_jets
from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
from tl_jets.detached_map import detached_jacobian

# Gemma 2 scales its embeddings, and its unembedding is tied to them; LayerNorms center.
RAW = [spec for spec in zoo.available(["gpt2", "llama", "gemma2"]) if spec.processing == "raw"]


@pytest.fixture(params=RAW, ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.build(request.param)


@pytest.mark.parametrize("centered", [True, False])
def test_written_is_the_length_of_every_row_of_the_logits_map(model, centered):
    """The rows of another map: logits through the final norm, frozen by autograd."""
    tokens = zoo.tokens(model, batch=2, pos=5)
    network = ResidualNetwork(model)
    trace = network.trace(tokens)
    logits = detached_jacobian(network, trace, output="logits", positions=[2, 4], ordinary=False)
    rows = logits.materialize()[1, 1, :, 3]  # [d_vocab, d_model]
    expected = (rows - rows.mean(0) if centered else rows).norm(dim=1)
    for output in ("final_post", "ln_final", "logits"):
        J = detached_jacobian(network, trace, output=output, positions=[2, 4], ordinary=False)
        norms = J.block_norms(pos=3, out_pos=4, prompt=1, centered=centered)
        assert oracles.relative_error(norms.written, expected) < 1e-12
        assert (norms.pos, norms.out_pos, norms.output) == (3, 4, output)


@pytest.mark.parametrize("output", ["final_post", "1_mlp_out", "logits"])
def test_read_is_what_every_token_would_put_in(model, output):
    tokens = zoo.tokens(model, batch=1, pos=4)
    network = ResidualNetwork(model)
    J = detached_jacobian(network, tokens, output=output, ordinary=False)
    for centered in (True, False):
        norms = J.block_norms(pos=-2, centered=centered)
        assert norms.read is not None
        for token in (0, 17, 60):
            # What the model itself puts into the stream for this token, positions apart.
            alone = network.trace(torch.full_like(tokens, token))["embed"]
            change = torch.zeros_like(alone)
            change[0, 2] = alone[0, 2]
            image = J.apply(change)[0, 0]
            image = image - image.mean() if output == "logits" and centered else image
            assert abs(float(norms.read[token] - image.norm())) < 1e-10


def test_coordinates_and_their_tokens(model):
    tokens = zoo.tokens(model, batch=1, pos=4)
    network = ResidualNetwork(model)
    J = detached_jacobian(network, tokens, output="final_post", ordinary=False)
    block, own = J.materialize()[0, 0, :, 1], J.map.point.detach()[0, 1]
    norms = J.block_norms(pos=1)
    rows = torch.stack([row.square().sum().sqrt() for row in block])
    columns = torch.stack([column.square().sum().sqrt() for column in block.T])
    assert oracles.relative_error(norms.row_norms, rows) < 1e-12
    assert oracles.relative_error(norms.column_norms, columns) < 1e-12
    units, nearest = norms.top_rows(n=2, k=3)
    assert torch.equal(units, rows.topk(2).indices)
    for i, unit in enumerate(units.tolist()):
        row = block[unit] if float(block[unit] @ own) >= 0 else -block[unit]
        assert torch.equal(nearest.indices[i], torch.cosine_similarity(row, model.W_E, dim=-1).topk(3).indices)
    units, raised = norms.top_columns(n=2, k=3)
    assert torch.equal(units, columns.topk(2).indices)
    decoder = network.decoder
    for i, unit in enumerate(units.tolist()):
        column = block[:, unit] if float(own[unit]) >= 0 else -block[:, unit]
        logits = decoder.norm.scale(decoder.norm.center(column)) @ decoder.W_U
        assert torch.equal(raised.indices[i], logits.topk(3).indices)


def test_tables(model):
    J = detached_jacobian(model, "w5 w6 w7", output="final_post", ordinary=False)
    norms = J.block_norms()
    assert repr(norms).startswith("BlockNorms(embed at 3 -> final_post at 3")
    table = norms.to_dataframe(k=4)
    assert list(table.columns) == ["side", "rank", "token_index", "token_string", "norm", "relative"]
    assert list(table.side) == ["written"] * 4 + ["read"] * 4
    best = int(norms.written.argmax())
    assert table.token_index[0] == best and table.norm[0] == float(norms.written[best])
    assert table.relative[0] == pytest.approx(float(norms.written.max() / norms.written.median()))
    coordinates = norms.coordinates(n=2, k=3)
    assert list(coordinates.columns) == ["side", "rank", "coordinate", "norm", "top_tokens"]
    assert len(coordinates) == 4 and len(coordinates.top_tokens[0]) == 3
    for options in ({"pos": 4}, {"out_pos": 1}, {"prompt": 1}):
        with pytest.raises(ValueError, match="pos must lie in"):
            J.block_norms(**options)


def test_plain_callables_are_written_only():
    decoder = Decoder(Norm("LN"), torch.randn(4, 7), torch.randn(7))
    model = CallableModel(torch.nn.Embedding(5, 4), [{"0_mlp": torch.nn.functional.silu}], decoder)
    J = detached_jacobian(model, torch.tensor([[0, 3, 1]]))
    norms = J.block_norms()
    assert norms.read is None and set(norms.top_tokens(2)) == {"written"} and len(norms.to_dataframe(k=2)) == 2
    with pytest.raises(ValueError, match="W_E"):
        norms.top_rows(2, 2)


def test_block_norms_save_and_load(model, tmp_path):
    network, tokens = ResidualNetwork(model), zoo.tokens(model, batch=1, pos=4)
    J = detached_jacobian(network, tokens, ordinary=False)
    norms = J.block_norms(pos=1)
    found = tl_jets.load(norms.save(tmp_path / "norms.safetensors"))
    assert torch.equal(found.matrix, norms.matrix) and torch.equal(found.read, norms.read)
    assert (
        found.to_dataframe(k=3)
        .drop(columns="token_string")
        .equals(norms.to_dataframe(k=3).drop(columns="token_string"))
    )
    with pytest.raises(ValueError, match="Rows as tokens need the model"):
        found.top_rows(2, 2)


def test_an_embedding_that_is_edited_is_refused(model):
    with model.hooks([("hook_embed", lambda embed, hook: embed + embed.flip(-1))]):
        J = detached_jacobian(model, zoo.tokens(model, batch=1), ordinary=False)
    with pytest.raises(ValueError, match="multiple of its row of W_E"):
        J.block_norms()
