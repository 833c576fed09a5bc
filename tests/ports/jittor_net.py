"""torch_net.py in Jittor, with a fault on demand."""

import jittor as jt
from jittor import nn


class UnbiasedNorm(nn.BatchNorm2d):
    """Divides by the unbiased variance in training."""

    def execute(self, x):
        out = super().execute(x)
        if not self.is_train:
            return out
        mean, n = x.mean((0, 2, 3), keepdims=True), x.numel() // x.shape[1]
        variance = ((x - mean) * (x - mean)).sum((0, 2, 3), keepdims=True) / (n - 1)
        weight, bias = (v.reshape(1, -1, 1, 1) for v in (self.weight, self.bias))
        return (x - mean) / jt.sqrt(variance + self.eps) * weight + bias


class ResConv(nn.Conv2d):
    def execute(self, x):
        return x + super().execute(x)


class IgnoredResConv(nn.Conv2d):
    def forward(self, x):
        return x + super().execute(x)


class HalfConv(ResConv):
    def execute(self, x):
        return super().execute(x) / 2


LOCAL = {"forward": IgnoredResConv, "factor": HalfConv}


class Block(nn.Module):
    def __init__(self, dim, fault):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        norm = UnbiasedNorm if fault == "unbiased" else nn.BatchNorm2d
        eps, momentum = 1e-3 if fault == "epsilon" else 1e-5, 0.2 if fault == "momentum" else 0.1
        self.norm = norm(dim, eps=eps, momentum=momentum)
        self.fault = fault

    def execute(self, x):
        out = self.norm(self.conv(x))
        return out if self.fault == "residual" else x + out


class Net(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8, fault)
        self.local = LOCAL.get(fault, ResConv)(8, 8, 1)
        if fault == "pooling":
            self.pool = nn.Pool(3, stride=2, padding=1, op="mean")
        else:
            self.pool = nn.Pool(2, op="mean")
        self.windows = nn.AdaptiveAvgPool2d(7)
        self.norm = nn.LayerNorm(8, eps=1e-2 if fault == "layer epsilon" else 1e-5)
        self.drop = nn.Dropout(0.2 if fault == "frozen" else 0.1)
        setattr(self, "head" if fault == "name" else "fc", nn.Linear(8, 5))
        if fault == "frozen":
            self.fc.weight.stop_grad()
        self.fault = fault

    def execute(self, x):
        x = self.windows(self.pool(self.local(self.block(nn.relu(self.stem(x))))))
        # (B, C, 7, 7) -> (B, 49, C)
        B, C, H, W = x.shape
        x = self.drop(self.norm(x.reshape(B, C, H * W).transpose(1, 2)))
        x = (x * x).mean(1)
        if self.fault == "gradient":
            x = x + (x - x.detach())
        return self.head(x) if hasattr(self, "head") else self.fc(x)


def net(fault=None):
    return Net(fault)


def other_rate(parameters):
    return jt.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)


def other_decay(parameters):
    return jt.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
