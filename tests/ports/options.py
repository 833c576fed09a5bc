"""The options of layers that torch_grid.py and jittor_grid.py try."""

# Of a Conv2d from 6 channels: output channels, kernel, and options.
CONVS = [
    (4, 3, dict()),
    (4, 1, dict(stride=2, bias=False)),
    (4, (3, 2), dict(padding=(1, 0))),
    (4, (2, 5), dict(stride=(2, 1), padding=(0, 2), dilation=(2, 1))),
    (4, 3, dict(stride=3, padding=2, dilation=2, bias=False)),
    (4, 3, dict(padding=1, groups=2)),
    (6, (1, 3), dict(stride=(1, 2), dilation=(1, 2), groups=3, bias=False)),
    (6, 5, dict(padding=2, groups=6)),
    (6, 3, dict(padding=2, dilation=2, groups=6, bias=False)),
    (12, 3, dict(stride=2, padding=1, groups=6)),
    (6, (3, 5), dict(padding=(1, 2), groups=6)),
]
# Of an interpolation of 9 rows and 12 columns.
RESIZES = [
    dict(size=(13, 5), mode="bilinear"),
    dict(scale_factor=2, mode="bilinear"),
    dict(scale_factor=(2, 0.5), mode="bilinear", align_corners=True),
    dict(size=(13, 5), mode="nearest"),
    dict(scale_factor=3, mode="nearest"),
    dict(size=(13, 5), mode="bicubic"),
    dict(size=(4, 5), mode="area"),
]
