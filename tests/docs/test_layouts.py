"""The code of docs/how-to/layouts.md, in its order."""

import pages
import torch
from models import make_model
from torch import nn

import rlora.torch
from rlora.pairing import Convention, Layout


def test_the_page_runs(capsys):
    own_model = nn.Module()
    own_model.q = nn.Module()
    own_model.q.reduce = nn.Parameter(torch.randn(6, 2))
    own_model.q.expand = nn.Parameter(torch.randn(2, 5))
    space = {
        "rlora": rlora,
        "Layout": Layout,
        "Convention": Convention,
        "model": make_model(),
        "own_model": own_model,
        "reduce": own_model.q.reduce,
        "expand": own_model.q.expand,
    }
    pages.run("layouts.md", "Pair parameters: names and layouts", space)
    assert "2 pairs, 2 unpaired parameters, 0 refused" in capsys.readouterr().out
    pages.run("layouts.md", "Pairs by hand", space)
    assert [pair.shape_a for pair in space["optimizer"].report] == [(2, 6)]
    assert len(space["query_key_value"].views((12, 64), (96, 4))) == 3
    pages.run("layouts.md", "A library of your own", space)
    assert [pair.name for pair in space["optimizer"].report] == ["q.reduce"]
