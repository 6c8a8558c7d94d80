"""Figures for papers, with matplotlib: lens tables, measures with controls, paths, flows, doses, learning curves, spectra.

Every function returns a matplotlib `Figure` and shows nothing. Colors suit color-blind readers: Okabe and Ito's
palette, a blue-orange map around zero, cividis for depth. Controls are dashed, in the color of what they control.
matplotlib is an extra, `pip install "tl-jets[plots]"`, imported when a figure is drawn (else ImportError).

Example:
    >>> import tl_jets as tj
    >>> lens = tj.iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and", order=1)
    >>> figure = measures(lens, names=["kl"])
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['order 0', 'control', 'order 1', 'control']
"""

from tl_jets.views.figures.direct_attribution import attributions
from tl_jets.views.figures.flows import flow_bars, flow_graph, flow_heatmap, joint_shares
from tl_jets.views.figures.lenses import lens_table, measures
from tl_jets.views.figures.results import directions, dose_responses, learning_curves, path_shares, spectra
from tl_jets.views.figures.studies import head_scores, mass_changes, masses, promoters, roles, sketch

__all__ = [
    "attributions",
    "directions",
    "dose_responses",
    "flow_bars",
    "flow_graph",
    "flow_heatmap",
    "head_scores",
    "joint_shares",
    "learning_curves",
    "lens_table",
    "mass_changes",
    "masses",
    "measures",
    "path_shares",
    "promoters",
    "roles",
    "sketch",
    "spectra",
]
