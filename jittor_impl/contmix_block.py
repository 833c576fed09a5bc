"""ContMixBlock, upstream's plug-and-play block: ContMix and a feed-forward part for any ConvNet.

As DynamicConvBlock of models.py, but without a context prior: the map itself gives the query, the
key and the value. Every state-dict key and shape is that of upstream's models/contmix.py
(https://github.com/LMMMEng/OverLoCK). Shapes are (B, C, H, W) unless a comment says otherwise.
"""

from .aligned.functions import adaptive_avg_pool2d, interpolate
from .aligned.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d
from .aligned.nn import FusedSequential as Sequential
from .aligned.start import jt, nn
from .contmix import contmix
from .layers import (
    DILATED_BRANCHES,
    GRN,
    DilatedReparamBlock,
    DropPath,
    LayerNorm2d,
    LayerScale,
    ResDWConv,
    SEModule,
)
from .models import DynamicConvBlock, OverLoCK


class ContMixBlock(nn.Module):
    """(B, dim, H, W) -> (B, dim, H, W), for a map of any size.

    Half of the heads apply a dynamic kernel of `smk_size`, half one of `kernel_size`. A map smaller
    than the large kernel is enlarged for the dynamic convolution, then pooled back.

    Args:
        dim: channels, a multiple of 4 * num_heads
        kernel_size: 5, 7, ... or 19
        smk_size: odd, not above kernel_size
        num_heads: heads of each of the two kernel sizes
        mlp_ratio: channels of the feed-forward part, in units of dim
        res_scale: whether LayerScale acts on the two shortcuts, or on what is added to them
        ls_init_value: LayerScale's initial value, None for no LayerScale
        drop_path: probability of dropping a sample's branch in training
        norm_layer: called with dim; the layer takes and gives (B, dim, H, W)
        use_gemm: chooses a CUDA extension upstream; accepted so that its calls run, ignored
        deploy: builds the form that `reparam` makes
        use_checkpoint: only False; to recompute in the backward pass is left to the caller
        seed: of the initial weights; give each block of a network its own
    Raises:
        ValueError: if an argument is none of these.
    """

    def __init__(
        self,
        dim=64,
        kernel_size=7,
        smk_size=5,
        num_heads=2,
        mlp_ratio=4,
        res_scale=False,
        ls_init_value=None,
        drop_path=0,
        norm_layer=LayerNorm2d,
        use_gemm=False,
        deploy=False,
        use_checkpoint=False,
        seed=0,
    ):
        super().__init__()
        if dim % (4 * num_heads) or kernel_size not in DILATED_BRANCHES:
            raise ValueError(
                f"ContMixBlock: dim {dim}, num_heads {num_heads}, kernel_size {kernel_size}; dim "
                f"must be a multiple of 4 * num_heads, kernel_size one of {[*DILATED_BRANCHES]}"
            )
        if smk_size % 2 == 0 or smk_size > kernel_size:
            raise ValueError(f"ContMixBlock: smk_size {smk_size} is even or above {kernel_size}")
        if use_checkpoint:
            raise ValueError("ContMixBlock: use_checkpoint is not supported; leave it False")
        mlp_dim = int(dim * mlp_ratio)
        self.kernel_size = kernel_size
        self.num_heads = num_heads * 2
        self.scale = (dim // self.num_heads) ** -0.5
        self.res_scale = res_scale

        self.dwconv1 = ResDWConv(dim)
        self.norm1 = norm_layer(dim)
        self.weight_query = Sequential(
            Conv2d(dim, dim // 2, kernel_size=1, bias=False),
            BatchNorm2d(dim // 2),
        )
        self.weight_key = Sequential(
            AdaptiveAvgPool2d(7),
            Conv2d(dim, dim // 2, kernel_size=1, bias=False),
            BatchNorm2d(dim // 2),
        )
        self.weight_value = Sequential(
            Conv2d(dim, dim, kernel_size=1, bias=False),
            BatchNorm2d(dim),
        )
        self.weight_proj = Conv2d(7 * 7, kernel_size**2 + smk_size**2, kernel_size=1)
        self.fusion_proj = Sequential(
            Conv2d(dim, dim, kernel_size=1, bias=False),
            BatchNorm2d(dim),
        )
        self.lepe = Sequential(
            DilatedReparamBlock(dim, kernel_size, deploy),
            BatchNorm2d(dim),
        )
        self.se_layer = SEModule(dim)
        self.gate = Sequential(
            Conv2d(dim, dim, kernel_size=1, bias=False),
            BatchNorm2d(dim),
            nn.SiLU(),
        )
        self.proj = Sequential(
            BatchNorm2d(dim),
            Conv2d(dim, dim, kernel_size=1),
        )
        self.dwconv2 = ResDWConv(dim)
        self.norm2 = norm_layer(dim)
        self.mlp = Sequential(
            Conv2d(dim, mlp_dim, kernel_size=1),
            nn.GELU(),
            ResDWConv(mlp_dim),
            GRN(mlp_dim),
            Conv2d(mlp_dim, dim, kernel_size=1),
        )
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)
        small, large = 2 * smk_size - 1, 2 * kernel_size - 1
        self.rpb1 = jt.zeros(self.num_heads, small, small)
        self.rpb2 = jt.zeros(self.num_heads, large, large)
        self.init_weights(seed)

    # The same rules as in the whole network.
    init_weights = OverLoCK.init_weights
    reparam = OverLoCK.reparam
    dynamic_conv_size = DynamicConvBlock.dynamic_conv_size

    def execute(self, x):
        x = self.dwconv1(x)
        identity = x
        x = self.norm1(x)
        gate = self.gate(x)
        lepe = self.lepe(x)

        x = self.se_layer(self.fusion_proj(self.dynamic_conv(x)) + lepe)
        x = self.add(identity, self.proj(gate * x), self.ls1, self.drop_path1)
        x = self.dwconv2(x)
        return self.add(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2)

    def add(self, shortcut, branch, ls, drop_path):
        """The residual sum; its LayerScale `ls` stands where `res_scale` puts it."""
        if self.res_scale:
            return ls(shortcut) + drop_path(branch)
        return shortcut + drop_path(ls(branch))

    def dynamic_conv(self, x):
        """ContMix of x (B, dim, H, W), with kernels made from x."""
        H, W = x.shape[2:]
        h, w = self.dynamic_conv_size(H, W)
        if (h, w) != (H, W):
            # (B, dim, H, W) -> (B, dim, h, w)
            x = interpolate(x, size=(h, w), mode="bilinear", align_corners=False)

        query = self.weight_query(x) * self.scale  # (B, dim/2, h, w)
        key = self.weight_key(x)  # (B, dim/2, 7, 7)
        value = self.weight_value(x)  # (B, dim, h, w)
        x = contmix(query, key, self.weight_proj, self.rpb1, self.rpb2, value)  # (B, dim, h, w)
        return x if (h, w) == (H, W) else adaptive_avg_pool2d(x, (H, W))  # (B, dim, H, W)
