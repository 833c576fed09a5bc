"""What `train.py --export` does: a checkpoint's weights in a file that PyTorch code loads."""

import io

import torch
from .checkpoint import load_whole_model, model_arrays, read_checkpoint
from .errors import InputError
from .progress import say
from .run_files import check_new_file, write_atomic

SUFFIXES = (".pth", ".pt", ".bin", ".tar")


def export(args):
    """Write the weights of args.init to args.export: a state dict with the official keys.

    The official model loads it with strict=True; with args.merge, the one built with deploy=True.
    Variant, classes and branches are those of the checkpoint. Raises InputError.
    """
    path = args.export
    if path.suffix.lower() not in SUFFIXES:
        where = "torch_impl/plugins/onnx_export.py" if path.suffix == ".onnx" else ""
        remedy = f"; {where} writes ONNX" if where else ""
        raise InputError(f"{path} does not end in {' or '.join(SUFFIXES)}{remedy}")
    check_new_file(path)
    arrays, _, _, notes = read_checkpoint(args.init, args.use_ema)
    model, kept = load_whole_model(arrays, args.init)
    if args.merge:
        model.reparam()
    arrays = model_arrays(model)
    file = io.BytesIO()
    torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, file)
    write_atomic(path, file.getvalue())
    for note in notes:
        say(note)
    if kept:
        say(f"{args.init} has no auxiliary classifier; {path} holds an untrained one")
    say(f"wrote {len(arrays)} tensors of {args.init} to {path}")
