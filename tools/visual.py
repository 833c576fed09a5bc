"""What `python plot.py --visual DIR` draws: both frameworks' pictures and their difference.

DIR holds what both visualize.py wrote from one checkpoint: cam.npz and cam_torch.npz, and so on.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_impl.figures import COLORS, MAPS, grid, overlay  # noqa: E402


def panels(data):
    """[(title of a group of columns, [(title of a row, image or None, map)])] of an .npz."""
    if "count" in data:
        moments = ("initial weights", "initial"), ("trained", "trained")
        return [
            (title, [(name, None, np.log10(data[f"{key} {name}"] + 1e-30)) for name in MAPS])
            for title, key in moments
        ]
    names = [name for name in (*MAPS, "small", "large", "affinity") if name in data]
    return [
        (f"image {i + 1}", [(name, data["images"][i], data[name][i]) for name in names])
        for i in range(min(2, len(data["images"])))
    ]


def numbers(data):
    """The arrays of an .npz in which the frameworks may differ by rounding."""
    return {key: data[key] for key in data if data[key].dtype.kind == "f" and data[key].ndim > 1}


def largest_difference(jittor, torch):
    """(name, difference) of the array that differs most, in parts of the range of its values.

    Raises ValueError, saying how, if the two were not made of the same images and checkpoint.
    """
    ours, theirs = numbers(jittor), numbers(torch)
    if ours.keys() != theirs.keys() or any(ours[k].shape != theirs[k].shape for k in ours):
        raise ValueError("have other images or maps")
    if "images" in jittor and not np.array_equal(jittor["images"], torch["images"]):
        raise ValueError("have other images")
    differences = {}
    for key, values in theirs.items():
        scale = np.ptp(values) or 1.0
        differences[key] = float(np.abs(ours[key] - values).max() / scale)
    return max(differences.items(), key=lambda item: item[1])


def draw(jittor, torch):
    """Columns: Jittor, PyTorch, their difference; for two images, or before training and after."""
    groups = list(zip(panels(jittor), panels(torch)))
    figure, axes = grid(len(groups[0][0][1]), 3 * len(groups), width=1.5, height=1.62)
    for g, ((title, ours), (_, theirs)) in enumerate(groups):
        for row, (name, image, left), (_, _, right) in zip(axes, ours, theirs):
            pair = row[3 * g : 3 * g + 3]
            for panel, values in zip(pair, (left, right)):
                if image is None:
                    panel.imshow(values, cmap=COLORS, vmin=right.max() - 4, vmax=right.max())
                else:
                    overlay(panel, image, values - min(0, right.min()))
            gap = np.abs(left.astype(float) - right)
            pair[2].imshow(gap, cmap="gray", vmin=0, vmax=max(gap.max(), 1e-30))
            pair[2].set_xlabel(f"up to {gap.max() / (np.ptp(right) or 1):.0e}", fontsize=6.5)
            if g == 0:
                pair[0].set_ylabel(name, fontsize=7.5)
        for panel, column in zip(axes[0][3 * g :], ("Jittor", "PyTorch", "|difference|")):
            panel.set_title(f"{title}\n{column}", fontsize=7.5)
    note = "Differences are drawn from 0 to their own maximum, given in parts of the map's range"
    figure.supxlabel(note, fontsize=7)
    return figure
