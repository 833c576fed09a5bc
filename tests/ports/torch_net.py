"""A small PyTorch model; jittor_net.py is its port."""

import torch
from torch import nn


class ResConv(nn.Conv2d):
    def forward(self, x):
        return x + super().forward(x)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x):
        return x + self.norm(self.conv(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.local = ResConv(8, 8, 1)
        self.pool = nn.AvgPool2d(2)
        self.windows = nn.AdaptiveAvgPool2d(7)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.windows(self.pool(self.local(self.block(torch.relu(self.stem(x))))))
        # (B, C, 7, 7) -> (B, 49, C)
        x = self.drop(self.norm(x.flatten(2).transpose(1, 2)))
        return self.fc(x.square().mean(1))


def net():
    return Net()
