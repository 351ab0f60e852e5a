"""The step over a group of pairs: lists, stacks, kernels of torch, shards, rounding."""
