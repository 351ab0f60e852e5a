"""Pairs among the parameters of a model: discovery, layouts of layers, parameter groups."""
