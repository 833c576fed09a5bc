"""Print README's model table: python tools/model_table.py, in the PyTorch environment.

FLOPs are multiply-adds of one 224x224 image in evaluation mode, as the paper counts them;
convolutions and matrix products by PyTorch's own counter, na2d_av by its definition. "Merged":
after reparam(), without the auxiliary head, as inference needs it and the paper reports it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import count_products  # noqa: E402
from torch_impl import models  # noqa: E402

print("| variant | parameters | parameters, merged | FLOPs at 224x224, merged |")
print("| --- | --- | --- | --- |")
for name in models.VARIANTS:
    model = models.OverLoCK(**models.VARIANTS[name]).eval()
    count = sum(p.numel() for p in model.parameters())
    model.reparam()
    auxiliary = sum(p.numel() for p in model.aux_head.parameters())
    merged = sum(p.numel() for p in model.parameters()) - auxiliary
    flops = count_products(model, 224)
    print(f"| {name} | {count / 1e6:.2f} M | {merged / 1e6:.2f} M | {flops / 1e9:.2f} G |")
