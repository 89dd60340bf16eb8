"""The network of Improved DDPM: a UNet from (x_t, t, y) to ε, the noise in x_t, and v, for p's Σ.

First comes the network, which knows nothing of schedules or data; then its checkpoints; then what
the two scripts share. The layers have the order and shapes of openai/improved-diffusion's.
"""

import argparse
import dataclasses
import math
import os
import zipfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

@dataclasses.dataclass
class UNetConfig:
    """The sizes of a UNet. The defaults are the paper's CIFAR-10 network (52.5M parameters).
    Raises ValueError for sizes that make no network."""

    image_size: int = 32  # pixels a side; halved between the entries of channel_mult
    in_channels: int = 3  # C
    out_channels: int = 6  # C for ε alone, 2C for ε and v
    channels: int = 128  # width at the full resolution
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)  # width of each resolution, in units of channels
    num_res_blocks: int = 3  # at each resolution on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16, 8)  # pixels a side; the middle always attends
    num_heads: int = 4
    dropout: float = 0.3
    num_classes: int | None = None  # None: unconditional
    scale_shift_norm: bool = True  # time scales and shifts the norm, instead of being added
    norm_groups: int = 0  # the most groups that a norm has. 0: at most 32, each of at least 4
    # channels, since groups of 1 channel would remove an image's mean colour
    low_res: int | None = None  # an upsampler's: pixels a side of the small image it is given

    def __post_init__(self):
        size, mult = self.image_size, self.channel_mult
        sizes = [size >> level for level in range(len(mult))]
        if not sizes or size != sizes[-1] << len(sizes) - 1:
            raise ValueError(f"channel_mult {mult} halves image_size {size} too often")
        if unknown := set(self.attention_resolutions) - set(sizes):
            raise ValueError(f"attention at {unknown.pop()}: the resolutions are {sizes}")
        if self.low_res and (size % self.low_res or self.low_res >= size):
            raise ValueError(f"low_res {self.low_res} must divide {size} and be smaller")
        for resolution, channels in zip([None, *sizes], [m * self.channels for m in (1, *mult)]):
            attends = resolution in (sizes[-1], *self.attention_resolutions)
            if channels % 4 or (attends and channels % self.num_heads):
                needs = f"a multiple of 4 and, with attention, of the {self.num_heads} heads"
                raise ValueError(f"channels: a resolution has {channels}, which must be {needs}")

class UNet(nn.Module):
    """The UNet that `config` describes; random weights, the last layer of every block zero."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, D = config, 4 * config.channels

        def stage(in_channels, out_channels, size):
            layers = [ResBlock(in_channels, out_channels, c)]
            if size in c.attention_resolutions:
                layers.append(Attention(out_channels, c))
            return Stage(*layers)

        self.time_embed = nn.Sequential(nn.Linear(c.channels, D), nn.SiLU(), nn.Linear(D, D))
        if c.num_classes is not None:
            self.label_emb = nn.Embedding(c.num_classes, D)
        in_channels = c.in_channels * (2 if c.low_res else 1)
        self.down = nn.ModuleList([Stage(nn.Conv2d(in_channels, c.channels, 3, padding=1))])
        skips = [c.channels]  # channels of each output on the way down, to be joined on the way up
        for level, mult in enumerate(c.channel_mult):
            if level > 0:
                self.down.append(Stage(nn.Conv2d(skips[-1], skips[-1], 3, stride=2, padding=1)))
                skips.append(skips[-1])
            for _ in range(c.num_res_blocks):
                self.down.append(stage(skips[-1], mult * c.channels, c.image_size >> level))
                skips.append(mult * c.channels)
        ch = skips[-1]
        self.middle = Stage(ResBlock(ch, ch, c), Attention(ch, c), ResBlock(ch, ch, c))
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            for _ in range(c.num_res_blocks + 1):
                self.up.append(stage(ch + skips.pop(), mult * c.channels, c.image_size >> level))
                ch = mult * c.channels
            if level > 0:
                conv = nn.Conv2d(ch, ch, 3, padding=1)
                self.up[-1].append(nn.Sequential(nn.Upsample(scale_factor=2.0), conv))
        last = zero(nn.Conv2d(ch, c.out_channels, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(ch, c.norm_groups), nn.SiLU(), last)
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in

    def forward(self, x, t, y=None, low_res=None):
        """ε and v (N, out_channels, S, S) for x (N, in_channels, S, S) at t (N,) float.

        y        (N,) int64, the class of each image, -1 for none; for a class-conditional network
        low_res  (N, in_channels, s, s) in [-1, 1], the small images; for an upsampler
        Raises ValueError if one is missing, or is given to a network that has no use for it, or
        if images are not floating-point numbers.
        """
        if not all(each.is_floating_point() for each in (x, low_res) if each is not None):
            raise ValueError("x and low_res must be floating-point numbers")
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("y must be given if and only if the network has num_classes")
        if (low_res is None) != (self.config.low_res is None):
            raise ValueError("low_res must be given if and only if the network is an upsampler")
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.config.channels).to(dtype))
        if y is not None:
            emb = emb + torch.where(y[:, None] >= 0, self.label_emb(y.clamp(min=0)), 0)
        emb = F.silu(emb)  # (N, 4·channels); once, instead of in every block
        if low_res is not None:
            x = torch.cat([x, F.interpolate(low_res, x.shape[-2:], mode="bilinear")], dim=1)
        h, skips = x.to(dtype, memory_format=torch.channels_last), []
        for stage in self.down:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)

class Stage(nn.Sequential):
    """Layers in a row; those that want the time embedding get it."""

    def forward(self, h, emb):
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h

class ResBlock(nn.Module):
    """(N, in_channels, H, W) and a time embedding (N, 4·channels) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.scale_shift_norm = config.scale_shift_norm
        self.norm1 = GroupNorm(in_channels, config.norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(4 * config.channels, (1 + self.scale_shift_norm) * out_channels)
        self.norm2 = GroupNorm(out_channels, config.norm_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.emb(emb)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        return h.add_(self.skip(x))

class Attention(nn.Module):
    """Self-attention of several heads over the H·W pixels of (N, C, H, W)."""

    def __init__(self, channels, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = GroupNorm(channels, config.norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        N, C, H, W = x.shape
        # Each head's q, k and v lie side by side in the 3C channels, as in the published weights.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # x is channels-last: nothing is moved
        q, k, v = qkv.reshape(N, H * W, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        h = attend(q, k, v)  # each (N, heads, H·W, C / heads)
        h = h.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2)
        return self.proj(h).add_(x)

class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with UNetConfig's norm_groups, in the precision of its weights: 16 bits would
    be less exact, and slower on CPUs."""

    def __init__(self, channels, groups):
        most = groups or min(32, channels // 4)
        super().__init__(max(g for g in range(1, most + 1) if channels % g == 0), channels)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

def timestep_embedding(t, channels):
    """Sinusoidal embedding: t (N,) float -> (N, channels), an even number, cosines first."""
    half = channels // 2
    freqs = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)

def zero(layer):
    """The layer with its parameters 0: at first a block returns its skip, the network 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer

def attend(q, k, v):
    """Attention of (N, heads, L, d). On CPUs, bfloat16 is computed in parts of 16 images, which is
    three times as fast as torch's kernel: it saves 11 % of a training step, 13 % in sampling."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)  # softmax in float32 whatever the inputs
    parts = zip((q * q.shape[-1] ** -0.5).split(16), k.transpose(2, 3).split(16), v.split(16))
    return torch.cat([torch.softmax(q @ k, dim=-1) @ v for q, k, v in parts])

# ---- Checkpoints -------------------------------------------------------------------------------

def load_checkpoint(path):
    """A UNet with the averaged weights, in eval mode, and the checkpoint: a dict whose "diffusion"
    holds Diffusion's arguments, "classes" the names of the classes or None, and "config" the flags
    of training. path is a file of train.py, its directory, or a file that OpenAI released, known by
    its name. Raises ValueError if there is no such file or it is no checkpoint."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        ckpt = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is missing, damaged, or no checkpoint") from error
    names = [name for name in OPENAI_FILES if os.path.basename(path).startswith(name)]
    if names and "unet" not in ckpt:
        ckpt = from_openai(ckpt, *OPENAI_FILES[names[0]])
    if "unet" not in ckpt:
        raise ValueError(f"{path} is neither train.py's nor named like one of OpenAI's files")
    model = UNet(UNetConfig(**ckpt["unet"]))
    model.load_state_dict(ckpt["ema"])
    return model.eval(), ckpt

def from_openai(state, config, diffusion):
    """A checkpoint of ours from the tensors of a released file, and the settings that it lacks."""
    for theirs, ours in OPENAI_NAMES.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    # Their attention's 1×1 convolutions run over H·W, (C', C, 1); ours over (H, W).
    state = {name: v[..., None] if v.ndim == 3 else v for name, v in state.items()}
    unet = dict(dropout=0.0, norm_groups=32) | config
    return dict(unet=unet, ema=state, diffusion=diffusion, classes=None, config={})

# openai/improved-diffusion's names for our layers; then, for each of its files, what differs from
# UNetConfig's defaults, and Diffusion's arguments.
OPENAI_NAMES = {
    "input_blocks": "down", "middle_block": "middle", "output_blocks": "up", ".op.": ".",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "emb", "proj_out": "proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "skip", ".conv.": ".1.",
}  # fmt: skip
SIZE_64 = dict(image_size=64, channel_mult=(1, 2, 3, 4))
SIZE_256 = dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2)
LSUN = SIZE_256 | dict(attention_resolutions=(16,), num_heads=1, scale_shift_norm=False)
CLASSES = dict(channels=192, num_classes=1000)
OPENAI_FILES = {
    "cifar10_uncond": ({}, dict(schedule="cosine", T=4000)),
    "imagenet64_uncond": (SIZE_64, dict(schedule="cosine", T=4000)),
    "imagenet64_cond": (SIZE_64 | CLASSES, dict(schedule="cosine", T=4000, time_scale=1.0)),
    "lsun_uncond": (LSUN, dict(schedule="linear", T=1000, time_scale=1.0)),
    "upsample_cond": (
        SIZE_256 | CLASSES | dict(low_res=64), dict(schedule="linear", T=4000, time_scale=1.0)
    ),
}

# ---- What the two scripts share: ranks, device, precision, arrays, pictures ----------------------

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of torchrun's processes
DEVICES = ["auto", "cpu"]  # the last of them is the best
DEVICES += ["mps"] * torch.backends.mps.is_available() + ["cuda"] * torch.cuda.is_available()
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float between two limits."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:
            limits = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    parse.__name__ = kind.__name__  # which argparse prints if the text is no number
    return parse

def pick_device(name):
    """The torch.device for one of DEVICES. Joins the ranks, each of which has its own GPU."""
    device = torch.device(DEVICES[-1] if name == "auto" else name)
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if WORLD > 1:  # one rank may draw a grid or decode images alone, for which the others wait
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return device

def pick_dtype(name, device):
    """The torch.dtype of matrix products for one of DTYPES. "auto" is bfloat16 where the device
    computes with it natively, else float16 on CUDA, else float32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # which torch 2.6 does not have
        native = device.type == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16"))
        name = "bf16" if native else "fp32"
    torch.backends.cudnn.allow_tf32 = name != "fp32"  # TF32 has a precision of 10 bits
    return DTYPES[name]

def autocast(device, dtype):
    """A context in which the network computes matrix products in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def load_npz(path):
    """The images of an .npz file, uint8 (N, 3, S, S), and the name of the class of each, or None.
    It holds arr_0 or images, uint8 (N, S, S, 3), and maybe arr_1 or labels (N,), which are names or
    indices of class_names. Raises ValueError if it does not."""
    try:
        with np.load(path) as file:
            images = file.get("images", file.get("arr_0"))
            labels, names = file.get("labels", file.get("arr_1")), file.get("class_names")
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is missing, damaged, or no .npz file") from error
    right = images is not None and images.dtype == np.uint8 and len(images)
    if not right or images.shape[1:] != (*2 * images.shape[1:2], 3):
        raise ValueError(f"{path} must hold arr_0 or images, uint8 (N, S, S, 3)")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{path} holds {len(images)} images, but labels {labels.shape}")
    if labels is not None and labels.dtype.kind not in "iubSU":
        raise ValueError(f"{path}: labels must be whole numbers or names, not {labels.dtype}")
    if labels is not None and names is not None:
        if labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(len(names))).all():
            raise ValueError(f"{path}: labels must be indices of the {len(names)} class_names")
        labels = names[labels]
    return images.transpose(0, 3, 1, 2), None if labels is None else labels.astype(str).tolist()

def to_pixels(x, numbers):
    """(N, C, H, W) in [-1, 1] -> uint8 of the same shape, on the CPU. Raises FloatingPointError,
    which says the numbers (N,) of the images that are not finite: these would look black."""
    if bad := [i for i, image in zip(numbers, x.cpu()) if not image.isfinite().all()]:
        raise FloatingPointError(f"not finite: images {bad}")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()

def make_picture(pixels, columns=None):
    """uint8 (N, 3, H, W) -> a PIL image of all in a grid, nearly square; small ones enlarged."""
    from torchvision.utils import make_grid  # here, since this import takes seconds

    zoom = max(1, 64 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = make_grid(pixels, columns or math.ceil(len(pixels) ** 0.5), padding=1)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())
