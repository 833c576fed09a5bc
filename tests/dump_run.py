"""Write the initial weights of XXT and two epochs of batches, for comparison bit by bit.

Each framework's environment runs it: python dump_run.py FRAMEWORK DATA_DIR SEED OUT.npz
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools import frameworks

name, data_dir, seed, out = sys.argv[1:]
impl = frameworks.load(name)
model_arrays, load = impl.module("checkpoint").model_arrays, impl.module("dataset").load
model = impl.module("models").overlock_xxt(num_classes=3)
model.init_weights(int(seed))
train, val = load(data_dir, 3, 12, 6)
arrays = {f"weight {key}": value for key, value in model_arrays(model).items()}
for epoch in (1, 2):
    for i, (images, labels) in enumerate(train.batches(16, int(seed), epoch)):
        arrays |= {f"images {epoch} {i}": images, f"labels {epoch} {i}": labels}
for i, (images, labels) in enumerate(val.batches(16)):
    arrays |= {f"images val {i}": images, f"labels val {i}": labels}
np.savez(out, **arrays)
