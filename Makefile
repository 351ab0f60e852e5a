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
	rlora study --tables --output docs/reference/study/strings
	$(PYTHON) docs/reference/front_tables.py
	$(PYTHON) docs/explanation/drawings.py

gpu:  # needs a CUDA device with torch and PEFT, and CuPy for its rows; records in build/gpu
	mkdir -p build/gpu
	$(PYTHON) -m pytest -q -n 8 -rf -W default tests/gpu
	$(PYTHON) docs/reference/graphs.py build/gpu/graphs.csv
	@set -e; for dtype in float32 bfloat16; do \
	  rlora bench run --backend torch --device cuda:0 --dtype $$dtype --against torch.adamw:fused,peft \
	    --method scaled_adamw,scaled_adamw:before,lora_rite,lora_muon,ref_lora,lora_pro_adamw \
	    --seconds 5 --output build/gpu/$$dtype.json; \
	done
