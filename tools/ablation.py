"""Put a defect of the published Jittor port back into our Jittor model (docs/why-it-drifted.md).

python tools/ablation.py DEFECT [options of train.py]
    train with that defect; DEFECT: none, residual, window, decay, layers, all
python tools/ablation.py errors
    print the error that each causes in its layer
python tools/ablation.py draw FOLDER
    draw FOLDER/DEFECT/log.csv of all of them (needs matplotlib)
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def lose_residual():
    """ResDWConv overrides `forward`; Jittor calls `execute`, which stays the convolution's."""
    from jittor_impl import layers

    layers.ResDWConv.execute = layers.Conv2d.execute


def rows_read(size, kernel_size):
    """(size, K): which of `size` rows the published expression reads for each pixel and offset."""
    import numpy as np

    half, offset = kernel_size // 2, np.arange(kernel_size)
    pixel = np.maximum(np.arange(size), half)[:, None]  # (size, 1)
    return np.where(pixel < size - half - 1, pixel, size - half - 1 + offset - half)


def read_one_pixel(attn, value, kernel_size):
    """na2d_av with the published indices.

    Along each axis all neighbours are one pixel, unless the window ends at the last.
    """
    B, heads, H, W, dim = value.shape
    rows, cols = rows_read(H, kernel_size), rows_read(W, kernel_size)
    # (B, heads, H, W, K, K, dim) -> (B, heads, H, W, K*K, dim)
    window = value[:, :, rows[:, None, :, None], cols[None, :, None, :]]
    window = window.reshape(B, heads, H, W, kernel_size**2, dim)
    return (attn.unsqueeze(-1) * window).sum(-2)  # (B, heads, H, W, dim)


def misread_the_window():
    """C reads `a ? b : c + d` as `a ? b : (c + d)`.

    So the offset is added only where the window was shifted from below.
    """
    from jittor_impl import contmix

    contmix.has_kernel = lambda _: False  # the formula runs, with this na2d_av in it
    contmix.na2d_av = read_one_pixel


def lose_decay():
    """AdamW's weight decay defaults to 0 in Jittor, to 0.01 in PyTorch."""
    sys.argv += ["--weight-decay", "0"]


def use_stock_layers():
    """Jittor's own adaptive pooling and BatchNorm."""
    from jittor_impl import layers, models
    from jittor_impl.aligned.start import nn

    for module in (layers, models):
        module.AdaptiveAvgPool2d, module.BatchNorm2d = nn.AdaptiveAvgPool2d, nn.BatchNorm2d


DEFECTS = {
    "none": [],
    "residual": [lose_residual],
    "window": [misread_the_window],
    "decay": [lose_decay],
    "layers": [use_stock_layers],
    "all": [lose_residual, misread_the_window, lose_decay, use_stock_layers],
}
LABELS = {
    "none": "right",
    "residual": "1 lost residual",
    "window": "2 one pixel",
    "decay": "3 no weight decay",
    "layers": "4 stock pooling and BatchNorm",
    "all": "all four",
}


def print_errors():
    """max|wrong - right| / max|right| of each defect's layer, on normal input."""
    import numpy as np
    from jittor_impl import layers, ops
    from jittor_impl.aligned import nn as aligned
    from jittor_impl.aligned.start import jt, nn

    jt.set_global_seed(0)  # of the layers' own initial weights
    generator = np.random.default_rng(0)

    def normal(*shape):
        return jt.array(generator.standard_normal(shape).astype(np.float32))

    def error(wrong, right):
        return float(np.abs(wrong.numpy() - right.numpy()).max() / np.abs(right.numpy()).max())

    block, x = layers.ResDWConv(24), normal(16, 24, 16, 16)
    off = error(aligned.Conv2d.execute(block, x), block(x))
    print(f"1 a residual depthwise convolution without its residual: {off:.2f}")
    for size, kernel in ((9, 9), (9, 5), (7, 5), (14, 13), (28, 5)):
        attn = nn.softmax(normal(4, 2, size, size, kernel**2), dim=-1)
        value = normal(4, 2, size, size, 12)
        wrong, right = read_one_pixel(attn, value, kernel), ops.na2d_av(attn, value, kernel)
        print(f"2 na2d_av, kernel {kernel} on a {size}x{size} map: {error(wrong, right):.2f}")
    print(
        "3 a weight after 3140 steps without decay (lr 1e-3, 0.01): "
        f"{1 - (1 - 1e-5) ** 3140:.3f} of it is not taken away"
    )
    x = normal(16, 32, 9, 9)
    off = error(nn.AdaptiveAvgPool2d(7)(x), aligned.AdaptiveAvgPool2d(7)(x))
    print(f"4 adaptive pooling 9 -> 7: {off:.2f}")
    for ratio in (1, 20, 200):
        stock, ours = nn.BatchNorm2d(24), aligned.BatchNorm2d(24)
        x = normal(16, 24, 4, 4) + ratio
        mean = x.numpy().mean((0, 2, 3), dtype=np.float64, keepdims=True)
        right = x.numpy().astype(np.float64) - mean
        right /= np.sqrt((right**2).mean((0, 2, 3), keepdims=True) + 1e-5)
        for name, layer in (("Jittor's", stock), ("ours", ours)):
            off = np.abs(layer(x).numpy() - right).max() / np.abs(right).max()
            print(f"4 BatchNorm, mean {ratio} times the spread, {name}: {off:.1e}")
        off = error(stock.running_var, ours.running_var)
        print(f"4 its running variance after a batch of 256 pixels: {off:.1e}")


def draw(folder):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, label) in enumerate(LABELS.items()):
        path = folder / name / "log.csv"
        if not path.exists():
            continue
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        for axes, column in zip(panels, ("train_loss_main", "acc_top1")):
            axes.plot(
                [int(row["epoch"]) for row in rows],
                [float(row[column]) for row in rows],
                marker="osv^Dx"[i],
                label=label,
                linewidth=3 if name == "none" else 1.3,
                color=f"C{i}",
                zorder=3 if name == "none" else 2,
            )
    for axes, title in zip(panels, ("main loss in training", "top-1 accuracy")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(folder / "ablation.png", dpi=150)
    print(f"written: {folder / 'ablation.png'}")


def main():
    parser = argparse.ArgumentParser(
        prog="ablation.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=[*DEFECTS, "errors", "draw"])
    args, options = parser.parse_known_args()
    if args.what == "errors":
        return print_errors()
    if args.what == "draw":
        return draw(Path(options[0])) if options else parser.error("draw needs a folder")
    sys.argv[1:] = options
    from jittor_impl import train

    for defect in DEFECTS[args.what]:
        defect()
    train.main()


if __name__ == "__main__":
    main()
