"""Shared foundations: the residual network of a model, decoders, traces, the frozen network, result classes."""
