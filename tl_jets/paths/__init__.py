"""Paths from input to output: expansions of a whole network, exact when it is frozen (Algorithm 2)."""
