"""`tl-jets jacobian`: what it prints and writes is what the detached map is."""

from __future__ import annotations

import pytest
from commands import cells, numbers, run, tinydocs

import tl_jets as tj
from tl_jets.core.tokens import token_text, visible

COLUMNS = 80

PROMPT = "The value of the option must be"
ASKED = ("jacobian", "--prompt", PROMPT)


@pytest.fixture(scope="module")
def J(network):  # noqa: N802
    return tj.detached_jacobian(network, PROMPT, output="logits")


def text_of(token: int) -> str:
    return visible(token_text(tinydocs().tokenizer, token))


def test_the_numbers_are_those_of_the_map(capsys, J):
    found = numbers(capsys, *ASKED)
    assert (
        found["reconstruction_error"] == pytest.approx(J.reconstruction_error, rel=0.5)
        and J.reconstruction_error < 1e-5
    )
    assert found["ordinary_error"] == pytest.approx(J.ordinary_error, rel=1e-5) and J.ordinary_error > 0.1
    assert [row["id"] for row in found["tokens"]] == J.tokens[0].tolist()
    frame = J.to_dataframe()
    assert [row["share"] for row in found["tokens"]] == pytest.approx(frame["share"][:-1].tolist(), rel=1e-3, abs=1e-6)
    assert [row["norm"] for row in found["tokens"]] == pytest.approx(frame["norm"][:-1].tolist(), rel=1e-4)
    best = J.top_tokens(3).indices[0, :, 0].tolist()
    assert [[token["id"] for token in row["top"]] for row in found["tokens"]] == best
    # Against the model itself: parts and bias sum to the answer's logit, centered, and shares to 1.
    logits = tinydocs()(PROMPT)[0, -1].double()
    answer = int(logits.argmax())
    assert found["answer"]["id"] == found["target"]["id"] == answer
    total = sum(row["effect"] for row in found["tokens"]) + found["bias"]["effect"]
    assert total == pytest.approx((logits[answer] - logits.mean()).item(), rel=1e-4)
    assert found["sum"]["effect"] == pytest.approx(total, rel=1e-9)
    assert sum(row["share"] for row in found["tokens"]) + found["bias"]["share"] == pytest.approx(1, abs=1e-5)


def test_singular_values_are_read(capsys, J):
    found = numbers(capsys, *ASKED, "--svd", "3", "--top-k", "2")["svd"]
    vectors = J.svd(3)
    assert [row["value"] for row in found] == pytest.approx(vectors.values.tolist(), rel=1e-4)
    assert [row["relative"] for row in found] == pytest.approx((vectors.values / vectors.values[0]).tolist(), rel=1e-4)
    raised, near = J.decode_left(vectors, 2).indices, J.decode_right(vectors, 2).indices
    for i, row in enumerate(found):
        lengths = vectors.right[i].norm(dim=-1)
        assert row["pos"] == int(lengths.argmax())
        assert row["part_at_pos"] == pytest.approx((lengths.max() ** 2 / lengths.square().sum()).item(), rel=1e-3)
        assert [token["id"] for token in row["raises"]] == raised[i, 0].tolist()
        assert [token["id"] for token in row["reads"]] == near[i, row["pos"]].tolist()
    assert numbers(capsys, *ASKED, "--svd", "0")["svd"] is None
    assert "times as long" not in run(capsys, *ASKED, "--svd", "0")


def test_the_table_shows_the_numbers(capsys):
    text, found = run(capsys, *ASKED), numbers(capsys, *ASKED)
    assert max(map(len, text.splitlines())) <= 80
    assert f"answer  {found['answer']['token']}, what the model says after {text_of(found['tokens'][-1]['id'])}" in text
    assert f"What each token gives to the centered logit of {found['target']['token']}" in text
    assert f"ordinary Jacobian: {found['ordinary_error']:.2f}" in text
    for row in found["tokens"]:
        shown = cells(text, str(row["pos"]), "What each token")
        assert shown[1:4] == [row["token"], f"{row['effect']:+.2f}", f"{row['share']:.1%}"]
    assert cells(text, "sum", "What each token")[1] == f"{found['sum']['effect']:+.1f}"
    assert cells(text, "1.00", "The 4 largest singular values")[0] == f"{found['svd'][0]['value']:.3g}"


def test_other_targets_outputs_and_inputs(capsys, network, J):
    other = numbers(capsys, *ASKED, "--target", " a", "--svd", "0")
    (token,) = network.tokenizer(" a", add_special_tokens=False)["input_ids"]
    parts = J.contributions[0, :, 0].double()
    expected = (parts[:, token] - parts.mean(1)).tolist()
    assert [row["effect"] for row in other["tokens"]] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    mlp = numbers(capsys, *ASKED, "--wrt", "3_mid", "--output", "3_mlp_out", "--svd", "2", "--position", "2")
    own = tj.detached_jacobian(network, PROMPT, wrt="3_mid", output="3_mlp_out", positions=2)
    assert [row["value"] for row in mlp["svd"]] == pytest.approx(own.svd(2).values.tolist(), rel=1e-4)
    assert mlp["target"] is None and mlp["tokens"][2]["effect"] is None and mlp["svd"][0]["reads"] is None
    # An MLP reads its own position only: there is nothing of others to decode.
    assert [bool(row["top"]) for row in mlp["tokens"]] == [pos == 2 for pos in range(len(mlp["tokens"]))]
    text = run(capsys, *ASKED, "--wrt", "3_mid", "--output", "3_mlp_out", "--svd", "2")
    assert "input directions are not read as tokens" in text and "effect" not in text


def test_a_long_prompt_is_summed_up(capsys):
    prompt = "The value of the option must be a number. " * 6
    text = run(capsys, "jacobian", "--prompt", prompt, "--svd", "0")
    found = numbers(capsys, "jacobian", "--prompt", prompt, "--svd", "0")
    largest, others = (
        sorted(found["tokens"], key=lambda row: -abs(row["effect"]))[i] for i in (slice(1), slice(12, None))
    )
    assert f"{largest[0]['token']} (position {largest[0]['pos']}) gives most" in text and len(text.splitlines()) <= 45
    assert "others" not in run(capsys, "jacobian", "--prompt", prompt, "--svd", "0", "--all")
    row = cells(text, f"{len(others)} others", "What each token")
    assert float(row[1]) == pytest.approx(sum(row["effect"] for row in others), abs=0.006)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "9_pre"), "wrt must be a source or stream and output a stream"),
        (("--output", "final_post", "--target", " a"), "--target is a logit; it needs --output logits"),
        (("--svd", "99999"), "k must lie in 1.."),
        (("--top-k", "4097"), "--top-k must be at most 4096, the vocabulary"),
        (("--position", "-9"), "--position must lie in"),
    ],
)
def test_what_is_refused(capsys, options, message):
    assert message in run(capsys, *ASKED, *options, status=2)


def test_a_page_holds_the_same(capsys, tmp_path):
    file = tmp_path / "jacobian.html"
    run(capsys, *ASKED, "--html", str(file))
    page = file.read_text()
    for part in ("Detached map embed &gt; logits", "What each token gives", "singular values", "ordinary Jacobian"):
        assert part in page
    assert "://" not in page
