"""What the command `tl-jets` prints: rich tables for 80 columns or more, that read as well without color.

A module a command (`lenses`, `paths`, `ngrams`, `jacobian`), and what their tables share (`parts`). Every token is written by
`tl_jets.core.tokens.visible`, and nothing is read as markup.
"""
