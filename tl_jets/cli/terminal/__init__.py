"""Output of the command as rich tables for 80 columns or more, readable without color; tokens are escaped."""
