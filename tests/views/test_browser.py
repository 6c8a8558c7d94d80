"""Pages in headless Chromium: they render, a pointer brings up the right numbers, nothing is asked for, everything is legible.

Without a Chromium they are skipped, unless TL_JETS_BROWSER is "required".
"""

from __future__ import annotations

import re
from dataclasses import replace

import color_vision
import pytest
import zoo
from browser import skipped
from hostile import HOSTILE, HostileTokenizer

import tl_jets as tj
from tl_jets import ResidualNetwork, views
from tl_jets.core.numerals import precise
from tl_jets.core.tokens import visible
from tl_jets.views import View, page

SCHEMES = ("light", "dark")

pytestmark = skipped

# The smallest contrast of any text with what is behind it (WCAG 2, relative luminance), and that text.
WORST_CONTRAST = """() => {
  const canvas = document.createElement("canvas"); canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const over = (color, behind) => {
    context.globalAlpha = 1; context.fillStyle = `rgb(${behind.join(",")})`; context.fillRect(0, 0, 1, 1);
    context.globalAlpha = color.opacity; context.fillStyle = color.text; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const ground = element => {
    const behind = element.parentElement ? ground(element.parentElement)
      : matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    return over({text: getComputedStyle(element).backgroundColor, opacity: 1}, behind);
  };
  const opacity = element => element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1;
  const luminance = color => {
    const [r, g, b] = color.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = {contrast: 21, text: "", n: 0};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const behind = ground(element), ink = over({text: getComputedStyle(element).color, opacity: opacity(element)}, behind);
    const [low, high] = [luminance(ink), luminance(behind)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    worst.n += 1;
    if (contrast < worst.contrast) worst = {contrast, text, n: worst.n, ink, behind};
  }
  return worst;
}"""


# The color behind an element, as #1c66a8; a transparent one is on the ground of the page.
PAINTED = """element => {
  const canvas = document.createElement("canvas"); canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  for (const each of [element.closest(".tl-jets"), element]) {
    context.fillStyle = getComputedStyle(each).backgroundColor; context.fillRect(0, 0, 1, 1);
  }
  return "#" + [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(c => c.toString(16).padStart(2, "0")).join("");
}"""


@pytest.fixture(scope="module", params=["own", "hostile"])
def world(request):
    """Results of a small random model, its own tokens or hostile ones, and their views."""
    spec = next(spec for spec in zoo.available(zoo.CORE) if spec.name == "llama")
    network = ResidualNetwork(zoo.build(spec), "sublayer")
    trace = network.trace(["a b c d", "a b"])
    iterative, joint = tj.iterative_jet_lens(network, trace, order=1), tj.joint_jet_lens(network, trace)
    sums, table = tj.path_sums(network, trace), tj.jet_trigrams(network, 1, 0, top_k=20, progress=False)
    if request.param == "hostile":
        tokenizer = HostileTokenizer()
        iterative, joint, sums = (zoo.renamed_tokens(result, tokenizer) for result in (iterative, joint, sums))
        sums = replace(sums, target_names=[HOSTILE[1]])
        table = replace(table, names={token: HOSTILE[token % len(HOSTILE)] for token in table.names})
    made = {
        "lens table": views.lens_table(iterative),
        "joint table": views.lens_table(joint),
        "lens tokens": views.lens_tokens(iterative, measure="cosine"),
        "path tokens": views.path_tokens(sums),
        "detached tokens": views.detached_tokens(tj.detached_jacobian(network, trace, positions=1)),
        "top tokens": views.top_tokens(iterative),
        "top tokens of components": views.top_tokens(joint),
        "trigrams": views.trigram_heatmap(network, table, size=5),
    }
    found = {"iterative": iterative, "joint": joint, "trace": trace, "sums": sums, "table": table, "views": made}
    return found | {"hostile": request.param == "hostile"}


def hovered(page, place):
    """What a pointer brings up over an element; nothing before and nothing after."""
    assert page.locator(".tip").count() == 0
    place.hover()
    (tip,) = page.locator(".tip").all()
    text, box = tip.text_content(), tip.bounding_box()
    assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= 1200
    page.mouse.move(0, 0)
    return text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_views_are_legible_and_quiet(world, show, scheme):
    for name, view in world["views"].items():
        with show(view.page(), scheme) as opened:
            assert opened.locator("h1").text_content() == view.title, name
            worst = opened.evaluate(WORST_CONTRAST)
            assert worst["n"] > 10 and worst["contrast"] >= 4.5, (name, worst)
            dark = opened.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (dark == "rgb(255, 255, 255)") == (scheme == "light")


def test_full_colors_are_legible_and_differ(show):
    """The strongest and the weakest color of each kind, whatever a result holds."""
    kinds = [
        f'<td class="{kind}" style="--v:{v}"><bdi>x</bdi></td>'
        for kind in ("above", "below", "rising")
        for v in (0.01, 0.3, 1)
    ]
    for scheme in SCHEMES:
        with show(View("t", f"<table><tr>{''.join(kinds)}</tr></table>").page(), scheme) as opened:
            assert opened.evaluate(WORST_CONTRAST)["contrast"] >= 4.5
            colors = [cell.evaluate("e => getComputedStyle(e).backgroundColor") for cell in opened.locator("td").all()]
            assert len(set(colors)) == 6 and colors[3:6] == colors[6:]  # what only rises is blue


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_sides_of_zero_are_told_apart_by_every_kind_of_color_vision(show, scheme):
    """Cells of every strength, as they are painted; none on a cell without a value."""
    cell = lambda kind, v: f'<td class="{kind}" style="--v:{v}"><bdi>x</bdi></td>'  # noqa: E731
    cells = "".join(cell(kind, v) for v in (0.25, 0.5, 1) for kind in ("above", "below"))
    with show(View("t", f"<table><tr>{cells}<td>x</td></tr></table>").page(), scheme) as opened:
        *colors, ground = (cell.evaluate(PAINTED) for cell in opened.locator("td").all())
    for v, above, below in zip((0.25, 0.5, 1), colors[::2], colors[1::2], strict=True):
        assert color_vision.distance(above, below) > 60 * v
        assert min(color_vision.distance(color, ground) for color in (above, below)) > 20 * v


def test_a_pointer_brings_up_the_numbers(world, show):
    lens = world["iterative"]
    with show(world["views"]["lens table"].page()) as opened:
        for i, p in ((0, 0), (1, 2), (len(lens.labels) - 1, 1)):
            place = opened.locator("tbody tr").nth(i).locator("td").nth(p)
            best = visible(zoo.text_of(lens, int(lens.top_ids[i, 1, 0, p, 0])))
            assert place.locator("bdi").text_content() == best
            lines = hovered(opened, place).split("\n")
            assert lines[0] == f"{lens.labels[i]}, order 1, position {p}"
            assert lines[1].startswith(f"{best}  logit {precise(float(lens.full_values[i, 1, 0, p, 0]))}, own part ")
            kl, control = (precise(float(m.kl[i, 1, 0, p])) for m in (lens.measures, lens.control))
            assert f"KL (nats) {kl} (control {control})" in lines
            # Once more: the browser's own title is gone, and the text is still there.
            assert hovered(opened, place).split("\n") == lines and place.get_attribute("title") is None


def test_every_view_has_something_under_the_pointer(world, show):
    for name, view in world["views"].items():
        with show(view.page()) as opened:
            places = opened.locator("td[title], span[title]")
            n = places.count()
            assert n >= 3, name
            wanted = [places.nth(i).get_attribute("title") for i in (0, n - 1)]
            found = opened.locator("td[title], span[title], [data-tip]")
            assert [hovered(opened, found.nth(i)) for i in (0, n - 1)] == wanted, name


def test_the_keyboard_closes_a_tip(world, show):
    with show(world["views"]["lens table"].page()) as opened:
        opened.locator("td[title]").first.hover()
        assert opened.locator(".tip").count() == 1
        opened.keyboard.press("Escape")
        assert opened.locator(".tip").count() == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_joined_page(world, show, scheme):
    pytest.importorskip("matplotlib")
    figure = views.figures.lens_table(world["joint"])
    results = [world[name] for name in ("iterative", "joint", "sums", "table")]
    document = page(HOSTILE[0], *world["views"].values(), *results, world["iterative"].to_dataframe(), figure)
    with show(document, scheme) as opened:
        assert opened.locator("h1").text_content() == HOSTILE[0]
        assert opened.locator("section").count() == len(world["views"]) + len(results) + 2
        assert opened.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 300)") == [
            True
        ]
        assert opened.evaluate(WORST_CONTRAST)["contrast"] >= 4.5
        frame = opened.locator("section").nth(len(world["views"]) + len(results))
        shown = frame.locator("tbody tr").first.locator("td").all_text_contents()
        first = world["iterative"].to_dataframe().iloc[0]
        assert shown[:2] == [first["layer"], "0"] and visible(first["token_string"]) in shown


@pytest.mark.parametrize(("theme", "scheme"), [("true", "dark"), ("false", "light")])
def test_a_notebook_s_theme_wins(world, show, theme, scheme):
    """A notebook has several outputs, each with its own style and script, and a theme that need not be the system's."""
    outputs = "".join(
        result._repr_html_() for result in (world["iterative"], world["joint"], world["sums"], world["table"])
    )
    # What notebooks do to tables.
    of_notebooks = (
        ".output table { margin-left: auto; margin-right: auto; table-layout: fixed; width: 100%; }"
        ".output td, .output th, .output tr { text-align: right; white-space: normal; vertical-align: middle; }"
        ".output tbody tr:nth-child(odd) { background: #ff0; } .output tbody tr:hover { background: #f00; }"
    )
    document = (
        f'<!DOCTYPE html><meta charset="utf-8"><style>{of_notebooks}</style>'
        f'<body data-jp-theme-light="{theme}"><div class="output">{outputs}</div></body>'
    )
    with show(document, scheme) as opened:
        assert opened.locator(".tl-jets").count() == 4
        color = opened.locator(".tl-jets").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert (color == "rgb(255, 255, 255)") == (theme == "true")
        assert opened.evaluate(WORST_CONTRAST)["contrast"] >= 4.5
        row = opened.locator("tbody tr").first
        row.hover()
        assert row.evaluate("e => getComputedStyle(e).backgroundColor") == "rgba(0, 0, 0, 0)"
        assert row.locator("td").first.evaluate("e => getComputedStyle(e).textAlign") == "left"
        assert opened.locator("table").first.bounding_box()["x"] < 40
        opened.mouse.move(0, 0)
        for output in (0, 1):
            place = opened.locator(".tl-jets").nth(output).locator("td[title], td[data-tip]").first
            assert hovered(opened, place)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_lens_page(world, show, scheme):
    """Padded prompts, a joint lens with weights: every number of a cell, by hand from the lenses."""
    iterative, joint = world["iterative"], world["joint"]
    kinds = (joint.measures, joint.control, joint.uniform, joint.control_uniform)
    name = lambda token: visible(zoo.text_of(iterative, int(token)))  # noqa: E731
    made = views.lens_page(iterative, joint, model=HOSTILE[1], prompt=HOSTILE[0], shown=1)
    with show(made.page(), scheme) as opened:
        assert opened.title() == opened.locator("h1").text_content() == HOSTILE[0]
        for b in (0, 1):
            if b:
                opened.locator(".controls select").nth(2).select_option(index=1)
            real = iterative.valid[b].nonzero()[:, 0].tolist()
            heads = opened.locator(".grid thead th").all_text_contents()
            assert heads == ["layer", *(name(iterative.tokens[b, p]) for p in real)]
            rows = opened.locator(".grid tbody tr")
            assert rows.count() == len(iterative.labels)
            opened.locator(".order").select_option("1")
            for p in real[-2:]:
                rows.nth(1).locator(f'td[data-pos="{p}"]').click()
                assert opened.locator(".panel p b").first.text_content() == name(iterative.model_top_ids[b, p])
                for i in range(len(iterative.labels)):
                    best = rows.nth(i).locator(f'td[data-pos="{p}"] bdi').text_content()
                    assert best == name(iterative.top_ids[i, 1, b, p, 0])
                first = opened.locator(".panel table").first.locator("tr").nth(1).locator("td").all_text_contents()
                own, full = iterative.own_values[1, 1, b, p, 0], iterative.full_values[1, 1, b, p, 0]
                assert [float(x) for x in first[1:]] == pytest.approx([float(full), float(own)], rel=0.06, abs=6e-3)
                cells = opened.locator(".panel tr", has_text="centered cosine").locator("td").all_text_contents()
                wanted = [float(m.centered_cosine[1, 1, b, p]) for m in (iterative.measures, iterative.control)]
                assert [float(x) for x in cells[1:]] == pytest.approx(wanted, rel=0.06, abs=6e-3)
                opened.locator(".joint").evaluate("part => { part.open = true }")
                components = [row.locator("td").all_text_contents() for row in opened.locator(".joint tr").all()[1:]]
                weights = [float(row[1]) for row in components]
                assert weights == pytest.approx([*joint.weights[:, b, p].tolist(), 1], abs=6e-4)
                found = re.search(
                    r"KL (\S+) \(control (\S+)\); uniform weights (\S+) \(control (\S+)\)$", components[-1][2]
                )
                kl = [float(kind.kl[b, p]) for kind in kinds]
                assert [float(each) for each in found.groups()] == pytest.approx(kl, rel=0.06, abs=6e-3)
                worst = opened.evaluate(WORST_CONTRAST)
                assert worst["contrast"] >= 4.5, worst


def test_the_page_of_a_detached_lens_shows_effects(world, show):
    trace = world["trace"]
    targets = [int(token) for token in trace.tokens[0, :2]]
    lenses = (
        lens(trace.network, trace, linearize="detached", targets=targets)
        for lens in (tj.iterative_jet_lens, tj.joint_jet_lens)
    )
    iterative, joint = (zoo.renamed_tokens(lens, HostileTokenizer()) if world["hostile"] else lens for lens in lenses)
    name = lambda token: visible(zoo.text_of(joint, token))  # noqa: E731
    # Beside other parts, and twice on a page.
    document = page("Lenses", views.lens_page(iterative, joint, shown=1), iterative.average(), world["views"]["lens table"],
                    views.lens_page(iterative, joint))  # fmt: skip
    with show(document) as opened:
        assert opened.locator(".explorer .grid").count() == 2 and opened.locator(".panel").last.inner_text()
        part = opened.locator(".explorer").first
        heads, *rows = (row.locator("th, td").all_text_contents() for row in part.locator(".joint tr").all())
        assert heads == ["component", *(f"effect on {name(token)}" for token in targets), "its own best tokens"]
        found = [[float(each) for each in row[1:3]] for row in rows]
        effects = joint.effects[:, 0, 1]
        for shown, values in zip(found, [*effects.tolist(), effects.sum(0).tolist()], strict=True):
            assert shown == pytest.approx(values, rel=0.06, abs=6e-3)
        ranks = [
            part.locator(".panel tr", has_text="rank (0: best) of").nth(t).locator("td").nth(1).inner_text()
            for t in (0, 1)
        ]
        last = iterative.target_ranks[-1, 0, 0, 1]
        assert [int(rank) for rank in ranks] == last.tolist()
