"""Print README's model table: python docs/model_table.py, in the PyTorch environment.

FLOPs are multiply-adds of one 224x224 image in evaluation mode, as the paper counts them; convolutions and matrix
products by PyTorch's own counter, na2d_av by its definition. "Merged": after reparam(), without the auxiliary head,
which is what inference needs and what the paper reports.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "torch_impl"))
import contmix
import models
import torch
from torch.utils.flop_counter import FlopCounterMode

window_products = 0


def counted_na2d_av(attn, value, kernel_size):
    global window_products
    window_products += attn.numel() * value.shape[-1]
    return torch.zeros_like(value)


contmix.na2d_av = counted_na2d_av
print("| variant | parameters | parameters, merged | FLOPs at 224x224, merged |\n| --- | --- | --- | --- |")
for name in models.VARIANTS:
    model = models.OverLoCK(**models.VARIANTS[name]).eval()
    count = sum(p.numel() for p in model.parameters())
    model.reparam()
    merged = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.aux_head.parameters())
    window_products = 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    flops = counter.get_total_flops() / 2 + window_products
    print(f"| {name} | {count / 1e6:.2f} M | {merged / 1e6:.2f} M | {flops / 1e9:.2f} G |")
