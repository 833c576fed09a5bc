"""Write the initial weights of XXT and epochs of batches, for comparison bit by bit.

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
# The paper's recipe: cropped, augmented, mixed, erased.
program, recipe = impl.module("train"), impl.module("recipe")
words = ["--recipe", "paper", "--img-size", "64", "--data-dir", data_dir, "--num-classes", "3"]
words += ["--train-per-class", "12", "--val-per-class", "6", "--workers", "1", "--no-progress"]
args = program.make_parser(recipe.choose_recipe(words)).parse_args(words)
train, val = program.load_data(args, args.train_per_class)
for epoch in (1, 2):
    for i, (images, targets) in enumerate(train.batches(16, int(seed), epoch)):
        arrays |= {f"paper {epoch} {i}": images, f"targets {epoch} {i}": targets}
arrays |= {f"paper val {i}": images for i, (images, _) in enumerate(val.batches(16))}
np.savez(out, **arrays)
