# What is made from the sources; CONTRIBUTING.md says what each needs.
PYTHON ?= python
SPHINX = $(PYTHON) -m sphinx --fail-on-warning --keep-going

.PHONY: docs linkcheck figures gpu

docs:
	$(SPHINX) -b html docs build/docs

linkcheck:  # needs a network
	$(SPHINX) -b linkcheck docs build/links

figures:
	$(PYTHON) docs/reference/claims.py
	rlora study --tables --output docs/reference/study
	$(PYTHON) docs/explanation/drawings.py

gpu:  # needs a CUDA device with torch, and CuPy for its rows; records in build/gpu
	mkdir -p build/gpu
	$(PYTHON) -m pytest -q -n 8 -rf -W default tests/gpu
	@set -e; for dtype in float32 bfloat16; do \
	  rlora bench run --backend torch --device cuda:0 --dtype $$dtype \
	    --method scaled_adamw,lora_rite,lora_pro_adamw,lora_muon --against torch.adamw:fused \
	    --seconds 3 --output build/gpu/$$dtype.json; \
	done
