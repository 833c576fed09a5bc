"""OverLoCK as an ONNX file, for images of one size in batches of any.

    python torch_impl/plugins/onnx_export.py CHECKPOINT overlock.onnx --img-size 224

writes the merged network, opset 17: images (batch, 3, size, size), normalised, to logits (batch,
classes). It needs no package beside PyTorch; a PyTorch of 2.9 or newer wants `onnx`.
"""

import io
import sys
import warnings
from inspect import signature
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as a file: the folder around it becomes a package
    root = Path(__file__).resolve().parents[2]
    sys.path[0] = str(root)
    __package__ = ".".join(Path(__file__).resolve().parent.relative_to(root).parts)
    __import__(__package__)

from torch.nn.functional import adaptive_avg_pool2d
from torch.overrides import TorchFunctionMode
from ..checkpoint import load_whole_model, read_checkpoint
from ..predict import IMG_SIZE, image_size
from ..program import ArgumentParser, number, run_program
from ..progress import say
from ..run_files import check_new_file, write_atomic

OPSET = 17


def pooling_matrix(size, output_size):
    """(output_size, size): each row averages the values of one window of adaptive pooling."""
    matrix = np.zeros((output_size, size), np.float32)
    for i in range(output_size):
        first, end = i * size // output_size, -(-(i + 1) * size // output_size)
        matrix[i, first:end] = 1 / (end - first)
    return torch.from_numpy(matrix)


class Traceable(TorchFunctionMode):
    """While PyTorch traces: sizes are numbers, but for the batch's; adaptive pooling is a product.

    Traced sizes would be tensors, which neither NumPy nor our checks take for numbers. ONNX has no
    adaptive pooling.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is adaptive_avg_pool2d:
            return self.pool(*args, **kwargs)
        result = function(*args, **kwargs or {})
        if function == torch.Tensor.shape.__get__:
            batch = slice(1 if len(result) > 3 else 0)  # position biases have three axes
            return (*result[batch], *map(int, result[batch.stop :]))
        return result

    @staticmethod
    def pool(x, output_size):
        """(B, C, H, W) -> (B, C, *output_size)"""
        rows, columns = output_size if isinstance(output_size, tuple) else (output_size,) * 2
        of_rows, of_columns = pooling_matrix(x.shape[2], rows), pooling_matrix(x.shape[3], columns)
        return of_rows @ x @ of_columns.T


def export_onnx(model, file, img_size):
    """Write `model`, in evaluation mode, for images (batch, 3, *img_size), to a path or open file.

    The model is left in evaluation mode, on the CPU.
    """
    model = model.cpu().eval()
    options = dict(input_names=["images"], output_names=["logits"], opset_version=OPSET)
    if "dynamo" in signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # the other exporter, since PyTorch 2.5, needs more packages
    axes = {name: {0: "batch"} for name in ("images", "logits")}
    with Traceable(), warnings.catch_warnings():
        # Sizes become constants, which is meant: the file is for images of one size.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        images = torch.zeros(2, 3, *img_size)
        torch.onnx.export(model, images, file, **options, dynamic_axes=axes)


def make_parser():
    parser = ArgumentParser(prog="onnx_export.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="ours, official, timm's")
    add("file", type=Path, metavar="FILE", help="the ONNX file to write")
    size = f"side of the images (default: as trained by train.py, else {IMG_SIZE})"
    add("--img-size", type=number(int, 1, maximum=8192), help=size)
    add("--use-ema", action="store_true", help="take a checkpoint's averaged weights (EMA)")
    return parser


def export(args):
    check_new_file(args.file)
    arrays, _, run, notes = read_checkpoint(args.checkpoint, args.use_ema)
    model, _ = load_whole_model(arrays, args.checkpoint)
    model.reparam()
    height, width, _ = image_size(run, args.img_size)
    file = io.BytesIO()
    export_onnx(model, file, (height, width))
    write_atomic(args.file, file.getvalue())
    for note in notes:
        say(note)
    say(f"wrote {args.checkpoint}, merged, for images of {width}x{height} pixels to {args.file}")


if __name__ == "__main__":
    run_program("onnx_export.py", export, make_parser().parse_args())
