"""torch_grid.py in Jittor."""

import jittor as jt
from jittor import nn
from options import CONVS, RESIZES


class Resize(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def execute(self, x):
        return nn.interpolate(x, **self.options)


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(6, outs, k, **o) for outs, k, o in CONVS])
        self.resizes = nn.ModuleList([Resize(options) for options in RESIZES])
        self.words = nn.Embedding(10, 3)
        self.fc = nn.Linear(3, 5)

    def execute(self, x, words):
        return {
            "logits": self.fc(self.words(words).mean(1)),
            "maps": [[layer(x) for layer in self.convs], [layer(x) for layer in self.resizes]],
        }


def loss(output, target):
    convolved, resized = output["maps"]
    squares = sum((array * array).mean() for array in (*convolved, *resized))
    return nn.cross_entropy_loss(output["logits"], target) + squares


def sgd(parameters):
    return jt.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-3)
