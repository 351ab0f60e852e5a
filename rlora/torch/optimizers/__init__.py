"""The optimizer classes: their groups, state and construction."""
