"""OverLoCK, an Overview-first-Look-Closely-next ConvNet (CVPR 2025, arXiv 2502.20087).

Three sub-networks (paper, section 3.1):

    image       -> Base-Net     -> x         (patch_embed1-3, blocks1-3)
    x           -> Overview-Net -> overview  (patch_embed4, blocks4)
    x, overview -> Focus-Net    -> logits    (sub_blocks3, patch_embedx, sub_blocks4, head)

x are the mid-level features, at stride 16; overview is a coarse view of the scene, at stride 32.
Focus-Net looks at x again, guided by the context prior ctx, which it refines on the way.

ctx is the paper's P_i, the context prior at block i. ctx0 is P_0, the first one, a projection of
the overview; every block but the first mixes it in again. (The official code and the state-dict
keys say h for both: h_proj, h_scale, high_level_proj.)

Every state-dict key and shape is that of the official implementation, so its checkpoints load
strictly. Shapes are (B, C, H, W) unless a comment says otherwise.
"""

from zlib import crc32

import numpy as np
from .aligned.functions import adaptive_avg_pool2d, cat_channels, interpolate, split_channels
from .aligned.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d
from .aligned.nn import FusedSequential as Sequential
from .aligned.start import jt, nn
from .contmix import contmix
from .layers import GRN, DilatedReparamBlock, DropPath, LayerNorm2d, LayerScale, ResDWConv, SEModule

# Base-Net and Overview-Net have four stages, Focus-Net ("sub") two.
# fmt: off
VARIANTS = {
    "overlock_xxt": dict(
        depth=(1, 1, 2, 1), sub_depth=(3, 1), embed_dim=(24, 48, 96, 128),
        kernel_size=(13, 11, 9, 7), mlp_ratio=(2, 2, 2, 2),
        sub_num_heads=(1, 2), sub_mlp_ratio=(2, 2), projection=256),
    "overlock_xt": dict(
        depth=(2, 2, 3, 2), sub_depth=(6, 2), embed_dim=(56, 112, 256, 336),
        kernel_size=(17, 15, 13, 7), mlp_ratio=(4, 4, 4, 4),
        sub_num_heads=(4, 6), sub_mlp_ratio=(3, 3), projection=1024),
    "overlock_t": dict(
        depth=(4, 4, 6, 2), sub_depth=(12, 2), embed_dim=(64, 128, 256, 512),
        kernel_size=(17, 15, 13, 7), mlp_ratio=(4, 4, 4, 4),
        sub_num_heads=(4, 8), sub_mlp_ratio=(3, 3), projection=1024),
    "overlock_s": dict(
        depth=(6, 6, 8, 3), sub_depth=(16, 3), embed_dim=(64, 128, 320, 512),
        kernel_size=(17, 15, 13, 7), mlp_ratio=(4, 4, 4, 4),
        sub_num_heads=(8, 16), sub_mlp_ratio=(3, 3), projection=1024),
    "overlock_b": dict(
        depth=(8, 8, 10, 4), sub_depth=(20, 4), embed_dim=(80, 160, 384, 576),
        kernel_size=(17, 15, 13, 7), mlp_ratio=(4, 4, 4, 4),
        sub_num_heads=(6, 9), sub_mlp_ratio=(3, 3), projection=1024),
}
# fmt: on


def stem(in_chans, embed_dim):
    """(B, in_chans, H, W) -> (B, embed_dim, H/4, W/4)."""
    return Sequential(
        Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1, bias=False),
        BatchNorm2d(embed_dim // 2),
        nn.GELU(),
        Conv2d(embed_dim // 2, embed_dim // 2, kernel_size=3, padding=1, bias=False),
        BatchNorm2d(embed_dim // 2),
        nn.GELU(),
        Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1, bias=False),
        BatchNorm2d(embed_dim),
        nn.GELU(),
        Conv2d(embed_dim, embed_dim, kernel_size=3, padding=1, bias=False),
        BatchNorm2d(embed_dim),
    )


def downsample(in_dim, out_dim):
    """(B, in_dim, H, W) -> (B, out_dim, H/2, W/2)."""
    return Sequential(
        Conv2d(in_dim, out_dim, kernel_size=3, stride=2, padding=1, bias=False),
        BatchNorm2d(out_dim),
    )


class CTXDownsample(nn.Module):
    """Between the two stages of Focus-Net: features and context prior go to half the resolution."""

    def __init__(self, dim, out_dim, ctx_dim):
        super().__init__()
        self.x_proj = downsample(dim, out_dim)
        self.h_proj = downsample(ctx_dim, ctx_dim)

    def execute(self, x, ctx):
        return self.x_proj(x), self.h_proj(ctx)


class RepConvBlock(nn.Module):
    """The block of Base-Net and Overview-Net (paper, figure 3)."""

    def __init__(self, dim, kernel_size, mlp_ratio, ls_init_value, drop_path, deploy):
        super().__init__()
        mlp_dim = int(dim * mlp_ratio)
        self.dwconv = ResDWConv(dim)
        self.proj = Sequential(
            LayerNorm2d(dim),
            DilatedReparamBlock(dim, kernel_size, deploy),
            BatchNorm2d(dim),
            SEModule(dim),
            Conv2d(dim, mlp_dim, kernel_size=1),
            nn.GELU(),
            ResDWConv(mlp_dim),
            GRN(mlp_dim),
            Conv2d(mlp_dim, dim, kernel_size=1),
            DropPath(drop_path),
        )
        self.ls = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)

    def execute(self, x):
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


class DynamicConvBlock(nn.Module):
    """The block of Focus-Net with ContMix, context-mixing dynamic convolution (paper, section 3.2).

    Half of the heads apply a dynamic kernel of `smk_size`, half one of `kernel_size`. The kernel at
    a pixel is a mixture, by the affinity of the pixel (query) to the 7x7 regions of the context
    prior (key), of learned kernels.
    """

    def __init__(
        self,
        dim,
        ctx_dim,
        kernel_size,
        smk_size,
        num_heads,
        mlp_ratio,
        ls_init_value,
        drop_path,
        is_first,
        is_last,
        deploy,
    ):
        super().__init__()
        out_dim = dim + ctx_dim
        mlp_dim = int(dim * mlp_ratio)
        self.dims = (dim, ctx_dim)
        self.kernel_size = kernel_size
        self.num_heads = num_heads * 2
        self.scale = (dim // self.num_heads) ** -0.5
        self.is_first = is_first
        self.is_last = is_last

        if not is_first:
            self.x_scale = LayerScale(ctx_dim, 1)
            self.h_scale = LayerScale(ctx_dim, 1)
        self.dwconv1 = ResDWConv(out_dim)
        self.norm1 = LayerNorm2d(out_dim)
        self.fusion = Sequential(
            Conv2d(out_dim, out_dim, kernel_size=3, padding=1, groups=out_dim),
            BatchNorm2d(out_dim),
            nn.GELU(),
            Conv2d(out_dim, dim, kernel_size=1),
            GRN(dim),
        )
        self.weight_query = Sequential(
            Conv2d(dim, dim // 2, kernel_size=1, bias=False),
            BatchNorm2d(dim // 2),
        )
        self.weight_key = Sequential(
            AdaptiveAvgPool2d(7),
            Conv2d(ctx_dim, dim // 2, kernel_size=1, bias=False),
            BatchNorm2d(dim // 2),
        )
        self.weight_proj = Conv2d(7 * 7, kernel_size**2 + smk_size**2, kernel_size=1)
        self.dyconv_proj = Sequential(
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
            Conv2d(dim, out_dim, kernel_size=1),
        )
        self.dwconv2 = ResDWConv(out_dim)
        self.norm2 = LayerNorm2d(out_dim)
        self.mlp = Sequential(
            Conv2d(out_dim, mlp_dim, kernel_size=1),
            nn.GELU(),
            ResDWConv(mlp_dim),
            GRN(mlp_dim),
            Conv2d(mlp_dim, out_dim, kernel_size=1),
        )
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(out_dim, ls_init_value)
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(out_dim, ls_init_value)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)
        small, large = 2 * smk_size - 1, 2 * kernel_size - 1
        self.rpb1 = jt.zeros(self.num_heads, small, small)
        self.rpb2 = jt.zeros(self.num_heads, large, large)

    def execute(self, x, ctx, ctx0):
        """Features x (B, dim, H, W), context prior ctx and the first one ctx0 (B, ctx_dim, H, W).

        Returns new x and ctx; the last block of all no ctx.
        """
        if not self.is_first:
            ctx = self.x_scale(ctx) + self.h_scale(ctx0)
        x_f = self.dwconv1(cat_channels([x, ctx]))  # (B, dim + ctx_dim, H, W)
        identity = x_f
        x_f = self.norm1(x_f)
        x = self.fusion(x_f)  # (B, dim, H, W)
        gate = self.gate(x)
        lepe = self.lepe(x)

        x = self.dynamic_conv(x, x_f)
        x = self.se_layer(self.dyconv_proj(x) + lepe)
        x = self.ls1(identity) + self.drop_path1(self.proj(gate * x))
        x = self.dwconv2(x)
        x = self.ls2(x) + self.drop_path2(self.mlp(self.norm2(x)))
        if self.is_last:
            return x, None
        return split_channels(x, self.dims)  # (B, dim, H, W), (B, ctx_dim, H, W)

    def dynamic_conv(self, x, x_f):
        """ContMix of x (B, dim, H, W), with kernels made from x_f (B, dim + ctx_dim, H, W)."""
        H, W = x.shape[2:]
        h, w = self.dynamic_conv_size(H, W)
        if (h, w) != (H, W):
            # (B, dim, H, W) -> (B, dim, h, w)
            x = interpolate(x, size=(h, w), mode="bilinear", align_corners=False)
            # (B, dim + ctx_dim, H, W) -> (B, dim + ctx_dim, h, w)
            x_f = interpolate(x_f, size=(h, w), mode="bilinear", align_corners=False)

        query, key = split_channels(x_f, self.dims)  # (B, dim, h, w), (B, ctx_dim, h, w)
        query = self.weight_query(query) * self.scale  # (B, dim/2, h, w)
        key = self.weight_key(key)  # (B, dim/2, 7, 7)
        x = contmix(query, key, self.weight_proj, self.rpb1, self.rpb2, x)  # (B, dim, h, w)
        return x if (h, w) == (H, W) else adaptive_avg_pool2d(x, (H, W))  # (B, dim, H, W)

    def dynamic_conv_size(self, H, W):
        """Size of the map to convolve: at least the kernel, the aspect ratio (about) kept."""
        K = self.kernel_size
        if min(H, W) >= K:
            return H, W
        # As in the official code, for the same rounding; max() mends int(15 / 11 * 11) == 14.
        return (K, max(K, int(K / H * W))) if H < W else (max(K, int(K / W * H)), K)


class OverLoCK(nn.Module):
    """The whole network. `depth` to `projection` are a row of VARIANTS.

    Training mode returns dict(main=logits, aux=logits of the Overview-Net), evaluation the main
    logits; (B, num_classes) each. num_classes=0 leaves both classifiers out and returns the pooled
    features. `seed` is that of the initial weights, `deploy` builds the form that `reparam` makes.
    `feature_dims` are the channels of what `features` returns.
    """

    def __init__(
        self,
        depth,
        sub_depth,
        embed_dim,
        kernel_size,
        mlp_ratio,
        sub_num_heads,
        sub_mlp_ratio,
        projection,
        in_chans=3,
        num_classes=1000,
        ls_init_value=(None, None, 1, 1),
        smk_size=5,
        drop_path_rate=0.0,
        deploy=False,
        seed=0,
    ):
        super().__init__()
        ctx_dim = embed_dim[3] // 4
        self.num_classes = num_classes
        self.feature_dims = (*embed_dim[:2], embed_dim[2] + ctx_dim, embed_dim[3] + ctx_dim)
        drop_path = iter(np.linspace(0, drop_path_rate, sum(depth) + sum(sub_depth)).tolist())

        self.patch_embed1 = stem(in_chans, embed_dim[0])
        self.patch_embed2 = downsample(embed_dim[0], embed_dim[1])
        self.patch_embed3 = downsample(embed_dim[1], embed_dim[2])
        self.patch_embed4 = downsample(embed_dim[2], embed_dim[3])
        self.high_level_proj = Conv2d(embed_dim[3], ctx_dim, kernel_size=1)
        self.patch_embedx = CTXDownsample(embed_dim[2], embed_dim[3], ctx_dim)

        def base_stage(i):
            settings = embed_dim[i], kernel_size[i], mlp_ratio[i], ls_init_value[i]
            blocks = [RepConvBlock(*settings, next(drop_path), deploy) for _ in range(depth[i])]
            return nn.ModuleList(blocks)

        def focus_stage(i):
            heads, ratio, last = sub_num_heads[i - 2], sub_mlp_ratio[i - 2], sub_depth[i - 2] - 1
            kernels, blocks = (kernel_size[i], smk_size), nn.ModuleList()
            for j in range(last + 1):
                settings = *kernels, heads, ratio, ls_init_value[i], next(drop_path)
                place = dict(is_first=(i, j) == (2, 0), is_last=(i, j) == (3, last))
                block = DynamicConvBlock(embed_dim[i], ctx_dim, *settings, **place, deploy=deploy)
                blocks.append(block)
            return blocks

        self.blocks1 = base_stage(0)
        self.blocks2 = base_stage(1)
        self.blocks3 = base_stage(2)
        self.blocks4 = base_stage(3)
        self.sub_blocks3 = focus_stage(2)
        self.sub_blocks4 = focus_stage(3)
        self.aux_head = Sequential(
            BatchNorm2d(embed_dim[3]),
            AdaptiveAvgPool2d(1),
            Conv2d(embed_dim[3], num_classes, kernel_size=1) if num_classes > 0 else nn.Identity(),
        )
        self.head = Sequential(
            Conv2d(embed_dim[3] + ctx_dim, projection, kernel_size=1, bias=False),
            BatchNorm2d(projection),
            nn.SiLU(),
            AdaptiveAvgPool2d(1),
            Conv2d(projection, num_classes, kernel_size=1) if num_classes > 0 else nn.Identity(),
        )
        self.init_weights(seed)

    def init_weights(self, seed):
        """Draw every convolution's weight from N(0, 0.02²).

        By NumPy and by its name: the same bits in any framework. The official
        trunc_normal_(std=.02) cuts at +-2, 100 standard deviations away, which is no cut at all.
        Norms, LayerScale, GRN and position biases keep the constants of their constructors.
        """
        for name, module in self.named_modules():
            if isinstance(module, Conv2d):
                generator = np.random.default_rng([seed, crc32(f"{name}.weight".encode())])
                weight = 0.02 * generator.standard_normal(tuple(module.weight.shape))
                module.weight.update(jt.array(weight.astype(np.float32)))
                if module.bias is not None:
                    module.bias.update(jt.zeros_like(module.bias))

    def seed_drop_path(self, *seed):
        """Let each DropPath draw, until the next call, by these numbers and its own name."""
        for name, module in self.named_modules():
            if isinstance(module, DropPath):
                module.seed, module.part = [*seed, crc32(name.encode())], None

    def reparam(self):
        """Merge the dilated branches of every block; outputs in evaluation mode stay equal."""
        for module in self.modules():
            if isinstance(module, DilatedReparamBlock):
                module.merge_dilated_branches()

    def stages(self, x):
        """(B, in_chans, H, W) -> the maps at stride 4, 8, 16, with its context, 32; the overview.

        The last blocks' outputs: x1, x2, x3 (B, embed_dim[2], H/16, W/16), ctx (B, ctx_dim, H/16,
        W/16), x4 (B, embed_dim[3] + ctx_dim, H/32, W/32), overview (B, embed_dim[3], H/32, W/32).
        """
        x1 = self.patch_embed1(x)  # (B, embed_dim[0], H/4, W/4)
        for block in self.blocks1:
            x1 = block(x1)
        x2 = self.patch_embed2(x1)  # (B, embed_dim[1], H/8, W/8)
        for block in self.blocks2:
            x2 = block(x2)
        x3 = self.patch_embed3(x2)  # (B, embed_dim[2], H/16, W/16)
        for block in self.blocks3:
            x3 = block(x3)
        overview = self.patch_embed4(x3)  # (B, embed_dim[3], H/32, W/32)
        for block in self.blocks4:
            overview = block(overview)

        ctx0 = self.high_level_proj(overview)  # (B, ctx_dim, H/32, W/32)
        # (B, ctx_dim, H/32, W/32) -> (B, ctx_dim, H/16, W/16), the size of x3
        ctx0_at_16 = interpolate(ctx0, size=x3.shape[2:], mode="bilinear", align_corners=False)
        ctx = ctx0_at_16
        for block in self.sub_blocks3:
            x3, ctx = block(x3, ctx, ctx0_at_16)
        # (B, embed_dim[3], H/32, W/32), (B, ctx_dim, H/32, W/32)
        x4, ctx4 = self.patch_embedx(x3, ctx)
        for block in self.sub_blocks4:
            x4, ctx4 = block(x4, ctx4, ctx0)
        return x1, x2, x3, ctx, x4, overview

    def features(self, x):
        """Four maps for a detector or a segmenter: (B, feature_dims[i], H/2**(i+2), W/2**(i+2))."""
        x1, x2, x3, ctx, x4, _ = self.stages(x)
        return x1, x2, cat_channels([x3, ctx]), x4

    def execute(self, x):
        *_, x, overview = self.stages(x)
        main = self.head(x).flatten(1)  # (B, num_classes, 1, 1) -> (B, num_classes)
        if not self.training:
            return main
        # (B, num_classes, 1, 1) -> (B, num_classes)
        return dict(main=main, aux=self.aux_head(overview).flatten(1))


def overlock_xxt(**kwargs):
    return OverLoCK(**{**VARIANTS["overlock_xxt"], **kwargs})


def overlock_xt(**kwargs):
    return OverLoCK(**{**VARIANTS["overlock_xt"], **kwargs})


def overlock_t(**kwargs):
    return OverLoCK(**{**VARIANTS["overlock_t"], **kwargs})


def overlock_s(**kwargs):
    return OverLoCK(**{**VARIANTS["overlock_s"], **kwargs})


def overlock_b(**kwargs):
    return OverLoCK(**{**VARIANTS["overlock_b"], **kwargs})
