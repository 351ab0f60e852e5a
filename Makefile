# What is made from the sources; CONTRIBUTING.md says what each needs.
PYTHON ?= python
SPHINX = $(PYTHON) -m sphinx --fail-on-warning --keep-going

.PHONY: docs linkcheck figures

docs:
	$(SPHINX) -b html docs build/docs

linkcheck:  # needs a network
	$(SPHINX) -b linkcheck docs build/links

figures:
	$(PYTHON) docs/reference/claims.py
	rlora study --tables --output docs/reference/study
	$(PYTHON) docs/explanation/drawings.py
