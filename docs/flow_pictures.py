"""Draw the pictures of docs/pages/guides/flow_views.md, on SmolLM2-135M: python docs/flow_pictures.py FOLDER.

FOLDER holds the model, as `../shared/models/get_smollm2.py` makes it. Each picture is small: 80 dots an inch, 24 colors.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

import tl_jets as tj
from tl_jets.pretrained import load_model
from tl_jets.views import figures

PICTURES = Path(__file__).parent / "pages" / "pictures"
PROMPT = "The variable foo_barrel is set. Later the function reads foo_bar"
HEADS = ["L17H3", "L17H4", "L17H5", "L18H6", "L18H7", "L20H6", "L23H2", "L23H7"]


def draw(folder: str) -> None:
    """Write every picture into the documentation."""
    network = tj.ResidualNetwork(load_model(folder))
    trace = network.trace(PROMPT)
    hooks = tj.ablation_hooks(network, "8_mlp", positions=list(range(1, trace.tokens.shape[1])))
    found = tj.flow(network, trace, hooks, by_position=True)
    jet = tj.ablation_effect(network, trace, ["20_mlp", "L17H3", "29_mlp"], order=3, doses=[0.25, 0.5, 0.75])
    drawn = {
        "flow_bars": figures.flow_bars(found, top=12),
        "flow_heatmap": figures.flow_heatmap(found),
        "joint_shares": figures.joint_shares(tj.joint_flow(network, trace, HEADS)),
        "dose_responses": figures.dose_responses(jet),
    }
    for name, figure in drawn.items():
        image = io.BytesIO()
        figure.savefig(image, dpi=80, format="png")
        small = Image.open(image).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=24)
        small.save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    draw(sys.argv[1])
