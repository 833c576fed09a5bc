"""Layers with every kind of option, in PyTorch; jittor_grid.py is its port.

Takes two inputs, one of them integers, and returns a dict with lists in it.
"""

import torch
from options import CONVS, RESIZES
from torch import nn
from torch.nn import functional


class Resize(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return functional.interpolate(x, **self.options)


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(6, outs, k, **o) for outs, k, o in CONVS])
        self.resizes = nn.ModuleList([Resize(options) for options in RESIZES])
        self.words = nn.Embedding(10, 3)
        self.fc = nn.Linear(3, 5)

    def forward(self, x, words):
        return {
            "logits": self.fc(self.words(words).mean(1)),
            "maps": [[layer(x) for layer in self.convs], [layer(x) for layer in self.resizes]],
        }


def loss(output, target):
    convolved, resized = output["maps"]
    squares = sum((array * array).mean() for array in (*convolved, *resized))
    return functional.cross_entropy(output["logits"], target) + squares


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-3)
