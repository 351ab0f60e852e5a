"""Run PEFT's method comparison with the classes of rlora.torch beside those of torch.optim.

python run_rlora.py -v experiments/lora/llama-3.2-3B-rank32-graft-adamw
"""

import runpy

import torch

import rlora.torch
from rlora.integrations.options import optimizer_names

for name in optimizer_names():
    setattr(torch.optim, name, getattr(rlora.torch, name))

if __name__ == "__main__":
    runpy.run_path("run.py", run_name="__main__")
