"""What many processes do together, by Jittor's MPI: OpenMPI on the CPU, NCCL on GPUs.

mpirun or srun starts the processes; start.py then turns Jittor's MPI on.

Gradients are added up once, after the backward pass. Jittor's optimizer would take their mean after
each of several backward passes.
"""

import os
import sys

import numpy as np
from .functions import NORM_HEADERS, batch_norm, norm_backward
from .nn import BatchNorm2d
from .start import jt

RANK, WORLD_SIZE = jt.rank, jt.world_size
# What another launcher sets, and what to start processes with instead.
OTHER = "LOCAL_WORLD_SIZE", "mpirun -np N python jittor_impl/train.py"


def connect(_):
    """Let Jittor do nothing of its own over the processes, which MPI has connected."""
    jt.in_mpi = False


def launch_command(program):
    """The words that start `program` again as it was started, without its options."""
    if WORLD_SIZE == 1:
        return [sys.executable, program]
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    return ["mpirun", *root, "-np", str(WORLD_SIZE), sys.executable, program]


last_sum = []  # the Var of it


def sum_over_processes(x):
    """The sum of a Var over the processes, after the one that was asked for before it.

    Jittor is free to change the order of operators, and all processes must have the same.
    """
    y = x.mpi_all_reduce("add")
    if last_sum:
        y._add_dependency(last_sum)
    last_sum[:] = [y]
    return y


def all_reduce(numbers):
    """The sum over the processes of a NumPy array."""
    return sum_over_processes(jt.array64(numbers)).numpy()


def sum_gradients(optimizer):
    """Let every gradient be its sum over the processes."""
    if WORLD_SIZE == 1:
        return
    for group in optimizer.param_groups:
        for parameter, grad in zip(group["params"], group["grads"]):
            if not parameter.is_stop_grad():
                grad.update(sum_over_processes(grad))


def is_lost_connection(error):
    """Whether `error` says that another process is gone: MPI ends this one at once."""
    return False


def is_first_to_speak():
    """Whether no other process has said why the run ends: MPI would have ended this one."""
    return True


class SyncBatchNormFunction(jt.Function):
    """BatchNorm over the maps x (B, C, H, W) of all processes.

    batches: how many the running statistics have seen, int32; counts: whether the maps of this
    process do. Returns y, and mean and variance, (C,), without a gradient, and the number of values
    in a channel, (1,); `batches` is one more.
    """

    headers = NORM_HEADERS

    def execute(self, x, weight, bias, batches, eps, counts):
        B, C, H, W = x.shape
        n, zeros = B * H * W, jt.zeros(C)
        statistics = zeros, zeros, batches  # of this process
        _, mean, _, _, var, self.batches = batch_norm(x, weight, bias, statistics, 1.0, eps)
        n_all = jt.array64(np.full(C, n * counts, np.float64))
        mean = mean.float64()
        # The squares about 0, from those about the mean: in float64, where no digits are lost.
        squares = var.float64() * ((n - 1) / n) if n > 1 else zeros.float64()
        moments = jt.concat([mean * n_all, (squares + mean * mean) * n_all, n_all])
        moments = sum_over_processes(moments).reshape(3, C)  # (3 C,) -> (3, C)
        total = moments[2]
        mean = moments[0] / total
        var = (moments[1] / total - mean * mean).float32()
        mean, total = mean.float32(), total.float32()
        inv_std = 1 / jt.sqrt(var + eps)
        self.saved, self.counts, self.total = (x, weight, mean, inv_std), counts, total
        return affine(x, mean, weight * inv_std, bias), mean, var, total

    def grad(self, grad_y, *_):
        x, weight, mean, inv_std = self.saved
        n = x.numel() // x.shape[1]
        grad_x, grad_weight, grad_bias = norm_backward("batch_norm_backward", self.saved, grad_y)
        sums = sum_over_processes(jt.concat([grad_weight, grad_bias]).float32())
        sums = sums.reshape(2, -1) * float(self.counts) / self.total  # (2 C,) -> (2, C)
        # What the kernel took for the means of all processes were those of this one.
        slope, shift = grad_weight / n - sums[0], grad_bias / n - sums[1]
        scale = weight * inv_std
        grad_x = grad_x + affine(x, mean, slope * inv_std * scale, shift * scale)
        return grad_x, grad_weight, grad_bias, None, None, None


def affine(x, mean, slope, shift):
    """(x - mean) * slope + shift for x (B, C, H, W), by channel."""
    # (C,) -> (1, C, 1, 1)
    mean, slope, shift = (v.reshape(1, -1, 1, 1) for v in (mean, slope, shift))
    return (x - mean) * slope + shift


class SyncBatchNorm2d(BatchNorm2d):
    """BatchNorm2d that in training takes its statistics over all processes.

    part: what this process computes now (distributed.take).
    """

    part = None

    def execute(self, x):
        if not self.training or x.ndim != 4:
            return super().execute(x)
        counts = self.part is None or self.part.share > 0
        function = SyncBatchNormFunction()
        variables = self.weight, self.bias, self.statistics()[2]
        y, mean, var, n = function(x, *variables, self.eps, counts)
        old_mean, old_var = self.running_mean, self.running_var
        var = var * (n / (n - 1))
        self.keep_statistics(
            (old_mean + (mean - old_mean) * self.momentum).stop_grad(),
            (old_var + (var - old_var) * self.momentum).stop_grad(),
            function.batches,
        )
        return y
