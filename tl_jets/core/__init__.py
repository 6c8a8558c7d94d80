"""What every room builds on: the residual network of a model, its decoder, its trace, the frozen network, results."""
