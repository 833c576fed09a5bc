"""Gradient checkpointing: a block's activations are computed again in the backward pass."""

from contextlib import contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def statistics_kept(module):
    """BatchNorm counts no batch twice: its running statistics stay as they are."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    momenta, counts = zip(*((norm.momentum, norm.num_batches_tracked.clone()) for norm in norms))
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def set_grad_checkpointing(model):
    """Let every block of an OverLoCK keep its inputs alone in training (torch.utils.checkpoint).

    The same numbers: DropPath draws the same again by its seed, where that is set.
    """
    stages = model.blocks1, model.blocks2, model.blocks3, model.blocks4
    for blocks in (*stages, model.sub_blocks3, model.sub_blocks4):
        for block in blocks:

            def contexts(block=block):
                return nullcontext(), statistics_kept(block)

            options = dict(use_reentrant=False, context_fn=contexts)
            block.forward = partial(checkpoint, block.forward, **options)
