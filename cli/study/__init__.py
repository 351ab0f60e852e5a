"""`rlora study`: beds to fine-tune on, what takes part, and what came of it."""
