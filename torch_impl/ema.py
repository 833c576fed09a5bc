"""Averaged weights, which are often better than those that the last steps left."""

import torch


class ModelEma:
    """Exponential moving average of a model's state: timm's ModelEmaV2.

    module: another model of the same kind, with the state to start from.
    """

    def __init__(self, module, decay):
        self.module, self.decay = module, decay
        self.module.eval()

    @torch.no_grad()
    def update(self, model):
        """Go 1 - decay of the way to the model's parameters and statistics."""
        averages, state = self.module.state_dict(), model.state_dict()
        counts = [key for key in averages if key.endswith("num_batches_tracked")]
        for key in counts:  # a number, of which there is no average
            averages.pop(key).copy_(state.pop(key))
        torch._foreach_lerp_(list(averages.values()), list(state.values()), 1 - self.decay)
