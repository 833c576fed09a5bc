"""The figures of visualize.py, from the arrays that it keeps beside them as .npz.

Colours are viridis: apart for the colour-blind and in greyscale.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# The maps of OverLoCK.stages, and the sub-network and stride of each.
MAPS = {
    "stage 1": "Base-Net, 1/4",
    "stage 2": "Base-Net, 1/8",
    "stage 3": "Focus-Net, 1/16",
    "stage 4": "Focus-Net, 1/32",
    "overview": "Overview-Net, 1/32",
}
SHARES = (0.5, 0.8, 0.99)
COLORS = "viridis"


def grid(rows, columns, width=1.75, height=1.9):
    """A figure of empty square panels: (figure, axes (rows, columns))."""
    figure = Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    return figure, axes


def overlay(panel, image, values, extent=None, interpolation="bilinear"):
    """Lay a map over an image (H, W, 3), enlarged: 0 is dark, its maximum yellow."""
    height, width = image.shape[:2]
    panel.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    how = dict(cmap=COLORS, vmin=0, vmax=max(values.max(), 1e-30), alpha=0.6)
    panel.imshow(values, extent=extent or whole, interpolation=interpolation, **how)
    panel.set(xlim=whole[:2], ylim=whole[2:])


def draw_cam(data):
    """A row for each image: the picture, then its Grad-CAM at the end of each part."""
    names = [str(name).partition(",")[0][:20] for name in data["names"]]  # the first synonym
    figure, axes = grid(len(data["images"]), 1 + len(MAPS))
    for i, row in enumerate(axes):
        row[0].imshow(data["images"][i])
        best, target, true = (int(data[key][i]) for key in ("predicted", "target", "true"))
        share = data["probabilities"][i]
        lines = [f"{names[best]} {share[best]:.2f}"]
        if true >= 0:
            lines.append(f"true: {names[true]} {share[true]:.2f}" if true != best else "(right)")
        if target != best:
            lines.append(f"map of: {names[target]}")
        row[0].set_xlabel("\n".join(lines), fontsize=6.5)
        for panel, name in zip(row[1:], MAPS):
            values = data[name][i]
            overlay(panel, data["images"][i], values)
            shape = "x".join(map(str, values.shape))
            panel.set_xlabel(f"{shape}, up to {values.max():.2g}", fontsize=6.5)
            if i == 0:
                panel.set_title(f"{name}\n{MAPS[name]}", fontsize=7.5)
    axes[0][0].set_title(f"{data['framework']}\nimage, prediction", fontsize=7.5)
    note = (
        "Grad-CAM of each map, enlarged bilinearly from the size under it; "
        "each panel from 0 to its own maximum"
    )
    figure.supxlabel(note, fontsize=7)
    return figure


def draw_erf(data):
    """Effective receptive fields, before training and after, with the shares of each."""
    figure, axes = grid(2, len(MAPS), height=2.15)
    for row, when in zip(axes, ("initial", "trained")):
        for panel, name in zip(row, MAPS):
            field = data[f"{when} {name}"]
            scaled = np.log10(field / max(field.max(), 1e-30) + 1e-4)
            panel.imshow(scaled, cmap=COLORS, vmin=-4, vmax=0)
            areas = [f"{100 * share:.0f} %: {area_share(field, share):.3f}" for share in SHARES]
            panel.set_xlabel("\n".join(areas), fontsize=6.5)
            if when == "initial":
                panel.set_title(f"{name}\n{MAPS[name]}", fontsize=7.5)
        row[0].set_ylabel("initial weights" if when == "initial" else "trained", fontsize=7.5)
    note = (
        f"{data['framework']}, {int(data['count'])} images: mean |gradient| of the central pixel, "
        "of even maps the central four; log scale from 1e-4 of its maximum\n"
        "Below: share of the image in the smallest central square that holds 50, 80, 99 % of it"
    )
    figure.supxlabel(note, fontsize=7)
    return figure


def area_share(field, share):
    """Share of an image's area in the smallest central square with `share` of field (H, W).

    RepLKNet's measure (arXiv 2203.06717, table 10). The square's side grows by a pixel at each end.
    """
    height, width = field.shape
    for reach in range(1, max(height, width)):
        top, left = max(0, height // 2 - reach), max(0, width // 2 - reach)
        square = field[top : (height + 1) // 2 + reach, left : (width + 1) // 2 + reach]
        if square.sum() >= share * field.sum():
            break
    return square.size / field.size


def draw_kernels(data):
    """A row for each image: the pixel, its two mixed kernels, its affinity to the overview."""
    titles = "image and pixel", "small kernel", "large kernel", "affinity to the\nregions"
    figure, axes = grid(len(data["images"]), len(titles))
    for i, row in enumerate(axes):
        image, (y, x) = data["images"][i], data["pixel"]
        for panel, key in zip(row[1:], ("small", "large", "affinity")):
            values = data[key][i]
            if key == "affinity":
                values = values - values.min()
                overlay(panel, image, values)
                panel.set_xlabel(f"{len(values)}x{len(values)}, mean of heads", fontsize=6.5)
            else:
                left, top, right, bottom = data[f"{key} window"]
                overlay(panel, image, values, (left, right, bottom, top), "nearest")
                box = Rectangle((left, top), right - left, bottom - top, fill=False, color="white")
                panel.add_patch(box)
                span = f"{len(values)}x{len(values)}, {values.min():.3f} to {values.max():.3f}"
                panel.set_xlabel(span, fontsize=6.5)
        row[0].imshow(image)
        for panel in row:
            panel.plot(x, y, "+", color="white", markersize=9, markeredgewidth=2.4)
            panel.plot(x, y, "+", color="black", markersize=8, markeredgewidth=1)
    for panel, title in zip(axes[0], titles):
        panel.set_title(title, fontsize=7.5)
    note = f"{data['framework']}, {data['block']}: what ContMix mixes at the pixel, mean of heads"
    figure.supxlabel(note, fontsize=7)
    return figure


DRAW = {"cam": draw_cam, "erf": draw_erf, "kernels": draw_kernels}
