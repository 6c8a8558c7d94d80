"""Views of results: HTML for notebooks and pages, the lens page, and matplotlib figures.

Views are returned, never shown: a notebook displays a `View` on the last line of a cell, `view.save("a.html")` writes a
self-contained page, and `page(title, *parts)` joins several. Pages make no network requests, and tokens are escaped.
Colors suit color-blind readers, and every number is in the cell or on hover. circuitsvis is not used: it writes tokens
as markup (`<img onerror=...>` in a vocabulary would run), scales positive and negative values differently, and adds
1.3 MB of script to every view.

Example:
    >>> import tl_jets as tj
    >>> lens = tj.iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and", order=1)
    >>> document = tj.views.page("Unix", tj.views.lens_table(lens, order=0), lens.average())
    >>> document.count("<table>"), "://" in document
    (2, False)
"""

import tl_jets.views.figures as figures
from tl_jets.views.explorers import Explorer, explorer, flow_page, lens_data, lens_page
from tl_jets.views.flows import flow_heatmap, flow_table, joint_table
from tl_jets.views.heatmaps import trigram_heatmap
from tl_jets.views.lens_tables import lens_table, top_tokens
from tl_jets.views.pages import View, page
from tl_jets.views.tokens import detached_tokens, lens_tokens, path_tokens

__all__ = [
    "Explorer",
    "View",
    "detached_tokens",
    "explorer",
    "figures",
    "flow_heatmap",
    "flow_page",
    "flow_table",
    "joint_table",
    "lens_data",
    "lens_page",
    "lens_table",
    "lens_tokens",
    "page",
    "path_tokens",
    "top_tokens",
    "trigram_heatmap",
]
