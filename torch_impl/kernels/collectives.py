"""What many processes do together, by torch.distributed: NCCL on GPUs, gloo on the CPU.

torchrun starts the processes and tells each its rank.

Gradients are added up once, after the backward pass, and not by DistributedDataParallel during it:
that arranges them anew after its first step, so that of three processes a resumed run would add
them in another order than the unbroken one, and part from it.
"""

import atexit
import os
import sys
from contextlib import suppress

import torch
import torch.distributed as dist
from torch.nn import BatchNorm2d
from torch.nn.functional import batch_norm
from ..errors import InputError

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
LAUNCHED = all(name in os.environ for name in OF_TORCHRUN)
RANK, WORLD_SIZE, LOCAL_RANK = (
    int(os.environ[name]) if LAUNCHED else alone for name, alone in zip(OF_TORCHRUN, (0, 1, 0))
)
# What another launcher sets, and what to start processes with instead.
OTHER = "OMPI_COMM_WORLD_SIZE", "torchrun --nproc_per_node N torch_impl/train.py"

stores = []  # torchrun's, of keys and values that every process sees


def connect(device):
    """Find the other processes. Raises InputError if there is no GPU for this one."""
    if device == "cuda":
        if torch.cuda.device_count() <= LOCAL_RANK:
            few = f"{torch.cuda.device_count()} GPUs are too few for the processes here"
            raise InputError(f"{few}; start one for each GPU, or give --device cpu")
        torch.cuda.set_device(LOCAL_RANK)
    store, *_ = next(dist.rendezvous("env://"))
    stores.append(store)
    of_ranks = dict(store=store, rank=RANK, world_size=WORLD_SIZE)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", **of_ranks)
    atexit.register(dist.destroy_process_group)


def launch_command(program):
    """The words that start `program` again as it was started, without its options."""
    if WORLD_SIZE == 1:
        return [sys.executable, program]
    command = sys.executable, "-m", "torch.distributed.run"  # torchrun
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
    nodes = f"--nnodes={WORLD_SIZE // local}" if local < WORLD_SIZE else "--standalone"
    return [*command, nodes, f"--nproc_per_node={local}", program]


def all_reduce(numbers):
    """The sum over the processes of a NumPy array."""
    summed = torch.from_numpy(numbers)
    summed = summed.cuda() if dist.get_backend() == "nccl" else summed
    dist.all_reduce(summed)
    return summed.cpu().numpy()


def sum_gradients(optimizer):
    """Let every gradient be its sum over the processes."""
    if WORLD_SIZE == 1:
        return
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([grad.reshape(-1) for grad in grads])  # of all, one after another: (n,)
    dist.all_reduce(flat)
    summed = flat.split([grad.numel() for grad in grads])
    # (numel,) -> the parameter's shape
    torch._foreach_copy_(grads, [s.view(grad.shape) for s, grad in zip(summed, grads)])


def is_lost_connection(error):
    """Whether `error` says that another process is gone."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_gloo or isinstance(error, dist.DistBackendError)


def is_first_to_speak():
    """Whether no other process has said why the run ends. Each may ask once, before it does."""
    with suppress(RuntimeError):  # torchrun is gone
        return all(store.add("speakers", 1) == 1 for store in stores)
    return True


class BatchNormFunction(torch.autograd.Function):
    """BatchNorm over the maps x (B, C, H, W) of all processes.

    counts: whether those of this one do. Returns y, and mean and variance, (C,), without a
    gradient, and the number of values in a channel. torch.nn.SyncBatchNorm is for GPUs alone.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, counts):
        wide = x.float() if x.dtype == torch.float16 else x
        var, mean = torch.var_mean(wide, (0, 2, 3), unbiased=False)  # (C,) of this process
        n = counts * x.numel() // x.shape[1]
        mean, var = mean.double(), var.double()
        # The squares about 0, from those about the mean: in float64, where no digits are lost.
        moments = torch.stack([mean, var + mean * mean, torch.ones_like(mean)]) * n  # (3, C)
        dist.all_reduce(moments)
        total = moments[2]
        mean = moments[0] / total
        var = moments[1] / total - mean * mean
        mean, var, total = mean.to(wide.dtype), var.to(wide.dtype), total.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps, ctx.counts = eps, counts
        ctx.mark_non_differentiable(mean, var, total)
        return batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, total

    @staticmethod
    def backward(ctx, grad_y, *_):
        x, weight, mean, var, total = ctx.saved_tensors
        # Those of fixed statistics, to which belongs what the statistics pass on.
        options = (mean, var, None, None, False, ctx.eps, [True, True, True])
        grads = torch.ops.aten.native_batch_norm_backward(grad_y, x, weight, *options)
        grad_x, grad_weight, grad_bias = grads
        sums = torch.stack([grad_weight, grad_bias])  # (2, C)
        dist.all_reduce(sums)
        if ctx.counts:
            inv_std = torch.rsqrt(var + ctx.eps)
            slope, shift = sums / total  # (C,) each
            # (C,) -> (1, C, 1, 1)
            mean, slope, shift, scale = (
                v.view(1, -1, 1, 1) for v in (mean, slope * inv_std, shift, weight * inv_std)
            )
            grad_x = grad_x - ((x - mean) * slope + shift) * scale
        return grad_x, grad_weight, grad_bias, None, None


class SyncBatchNorm2d(BatchNorm2d):
    """BatchNorm2d that in training takes its statistics over all processes.

    part: what this process computes now (distributed.take).
    """

    part = None

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        counts = self.part is None or self.part.share > 0
        y, mean, var, n = BatchNormFunction.apply(x, self.weight, self.bias, self.eps, counts)
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        return y
