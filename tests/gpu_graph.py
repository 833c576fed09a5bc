"""The operators that Jittor would run on a GPU, without one: the graph is built and not executed.

    python tests/gpu_graph.py [--model overlock_xxt] [--img-size 64] [--batch-size 64]

prints a line of JSON: {"training": {operator: count}, "inference": {...}, "clipping and EMA": what
--clip-grad and --ema-decay add to a training step}. What is Jittor's own is built as for a CPU, so
a batched product of matrices is four operators here and one on a GPU.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jittor_impl import models, train  # noqa: E402
from jittor_impl.aligned import functions, launch  # noqa: E402
from jittor_impl.aligned.start import jt  # noqa: E402
from jittor_impl.ema import ModelEma  # noqa: E402

# Marks of the gradient, and numbers that are part of the operator that takes them.
NO_KERNEL = ("tape", "tapes", "array")


def operators():
    """{name: count} of the operators that were built since the last jt.sync_all()."""
    nodes = [node for node in jt.dump_all_graphs().nodes_info if node.startswith("Op(")]
    counts = Counter(re.search(r",([^,]*?)->", node)[1] for node in nodes)
    return {name: count for name, count in counts.items() if name not in NO_KERNEL}


def main():
    parser = argparse.ArgumentParser(prog="gpu_graph.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="overlock_xxt")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    args = train.make_parser().parse_args([])
    model = models.OverLoCK(**models.VARIANTS[options.model], num_classes=20)
    optimizer = train.make_optimizer(model, args)
    averages = ModelEma(models.OverLoCK(**models.VARIANTS[options.model], num_classes=20), 0.9)
    images = np.zeros((options.batch_size, 3, options.img_size, options.img_size), np.float32)
    labels = np.zeros(options.batch_size, np.int64)
    jt.sync_all()

    code = jt.code

    def code_for_a_gpu(*arguments, cuda_src, **named):
        if not cuda_src:
            sys.exit(f"gpu_graph.py: a kernel for the CPU alone: {named['cpu_src']}")
        return code(*arguments, cuda_src=cuda_src, **named)

    jt.code = code_for_a_gpu
    launch.on_gpu = functions.on_gpu = lambda: True
    model.eval()
    with jt.no_grad():
        logits = model(jt.array(images))
    inference = operators()
    del logits
    model.train()
    loss, _, _ = train.losses(model(jt.array(images)), labels, args)
    optimizer.step(loss)
    training = Counter(operators())
    optimizer.clip_grad_norm(1)
    averages.update(model)
    added = Counter(operators()) - training
    found = {"training": training, "inference": inference, "clipping and EMA": added}
    print(json.dumps(found), flush=True)
    os._exit(0)  # Jittor would execute what was built


if __name__ == "__main__":
    main()
