"""Results as things to look at: HTML views for notebooks and pages, the lens page, and matplotlib figures.

Every view is returned and nothing is shown: a notebook shows a `View` that is the last line of a cell, `view.save("a.html")`
writes one self-contained page, and `page(title, *parts)` puts several on one. Pages ask the network for nothing, and no token
becomes markup. Colors adapt to light and dark themes, are told apart by color-blind readers, and never stand alone: the number is
in the cell, or a pointer brings it up.

The views are drawn here and not with circuitsvis: that writes tokens as markup (`<img onerror=...>` in a vocabulary would run),
scales positive and negative values differently, and brings 1.3 MB of script with every view.

Example:
    >>> import tl_jets as tj
    >>> lens = tj.iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and", order=1)
    >>> document = tj.views.page("Unix", tj.views.lens_table(lens, order=0), lens.average())
    >>> document.count("<table>"), "://" in document
    (2, False)
"""

import tl_jets.views.figures as figures
from tl_jets.core.notebook import View, page
from tl_jets.views.heatmaps import trigram_heatmap
from tl_jets.views.lens_pages import lens_data, lens_page
from tl_jets.views.lens_tables import lens_table, top_tokens
from tl_jets.views.tokens import detached_tokens, lens_tokens, path_tokens

__all__ = [
    "View",
    "detached_tokens",
    "figures",
    "lens_data",
    "lens_page",
    "lens_table",
    "lens_tokens",
    "page",
    "path_tokens",
    "top_tokens",
    "trigram_heatmap",
]
