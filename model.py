"""The network of Improved DDPM: a UNet from (x_t, t, y) to the noise in x_t and its variance.

Layers have the order and shapes of openai/improved-diffusion's, whose published weights load here
(see load_checkpoint). The network knows nothing of schedules or data.
"""

import contextlib
import ctypes
import dataclasses
import math
import os
import zipfile

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class UNetConfig:
    """What a UNet is. The defaults are the paper's CIFAR-10 network (52.5M parameters)."""

    image_size: int = 32  # pixels a side; halved between the entries of channel_mult
    in_channels: int = 3  # C
    out_channels: int = 6  # C for ε alone, 2C for ε and v
    channels: int = 128  # width at the full resolution
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)  # width of each resolution, in units of channels
    num_res_blocks: int = 3  # at each resolution on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16, 8)  # pixels a side at which blocks attend
    num_heads: int = 4
    dropout: float = 0.3
    num_classes: int | None = None  # None: unconditional
    scale_shift_norm: bool = True  # time scales and shifts the norm, instead of being added
    norm_groups: int = 0  # at most; 0: 32, but none of fewer than 4 channels

    def __post_init__(self):
        sizes = [self.image_size >> level for level in range(len(self.channel_mult) or 1)]
        if not self.channel_mult or self.image_size != sizes[-1] << len(sizes) - 1:
            raise ValueError(f"image size {self.image_size} is not halved by {self.channel_mult}")
        if unknown := set(self.attention_resolutions) - set(sizes):
            raise ValueError(f"no attention at resolution {unknown.pop()}: there are {sizes}")


class GroupNorm(nn.GroupNorm):
    """Groups of one channel each would take an image's mean colour from it: 4 channels or more.

    In float32 when the rest is in bfloat16: more exact, and on CPUs several times as fast.
    """

    def __init__(self, channels, groups):
        if channels % 4:
            raise ValueError(f"{channels} channels make no groups of 4 to norm")
        most = groups or min(32, channels // 4)
        super().__init__(max(g for g in range(1, most + 1) if channels % g == 0), channels)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def timestep_embedding(t, channels, max_period=10_000):
    """Sinusoidal embedding: t (N,) float -> (N, channels), cosines first."""
    half = (channels + 1) // 2
    freqs = torch.exp(torch.arange(half, device=t.device) * (-math.log(max_period) / half))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :channels]


def dropout(x, p):
    """F.dropout of (N, C, H, W); on CPUs from 16 random bits an element, at a fifth of the time."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    N, C, H, W = x.shape
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(N, H, W, C).permute(0, 3, 1, 2)
    return x * (bits >= round(p * 2**16) - 2**15).to(x.dtype).mul_(1 / (1 - p))


class ResBlock(nn.Module):
    """(N, in_channels, H, W) and a time embedding (N, 4·channels) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.dropout, self.scale_shift_norm = config.dropout, config.scale_shift_norm
        self.norm1 = GroupNorm(in_channels, config.norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(4 * config.channels, (1 + self.scale_shift_norm) * out_channels)
        self.norm2 = GroupNorm(out_channels, config.norm_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
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
        h = F.silu(h)
        if self.training and self.dropout > 0:
            h = dropout(h, self.dropout)
        return self.conv2(h).add_(self.skip(x))


class Attention(nn.Module):
    """Self-attention of several heads over the H·W pixels of (N, C, H, W)."""

    def __init__(self, channels, config):
        super().__init__()
        self.num_heads = config.num_heads
        if channels % self.num_heads:
            raise ValueError(f"{self.num_heads} heads for {channels} channels")
        self.norm = GroupNorm(channels, config.norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        N, C, H, W = x.shape
        # Each head's q, k and v lie side by side in the 3C channels, as in the published weights.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # x is channels-last: nothing is moved
        q, k, v = qkv.reshape(N, H * W, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:  # three times as fast there
            few = zip((q * q.shape[-1] ** -0.5).split(16), k.transpose(2, 3).split(16), v.split(16))
            h = torch.cat([torch.softmax(q @ k, dim=-1) @ v for q, k, v in few])
        else:  # (N, heads, H·W, C / heads); softmax in float32 whatever the inputs
            h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2)
        return self.proj(h).add_(x)


class Stage(nn.Sequential):
    """Layers in a row; those that want the time embedding get it."""

    def forward(self, h, emb):
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class UNet(nn.Module):
    """The UNet that `config` describes; random weights, every block's last layer zero."""

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
        self.down = nn.ModuleList([Stage(nn.Conv2d(c.in_channels, c.channels, 3, padding=1))])
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
        last = nn.Conv2d(ch, c.out_channels, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(ch, c.norm_groups), nn.SiLU(), last)
        for name, parameter in self.named_parameters():
            if name.split(".")[-2] in ("conv2", "proj") or name.startswith("out.2"):
                nn.init.zeros_(parameter)  # each block starts as the identity, the network as 0
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in

    def forward(self, x, t, y=None):
        """x (N, in_channels, S, S), t (N,) float, y (N,) int64 or None -> (N, out_channels, S, S).

        Raises ValueError if y is missing from a class-conditional network, or given to another.
        """
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("y must be given if and only if the network has num_classes")
        emb = self.time_embed(timestep_embedding(t, self.config.channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        emb = F.silu(emb)  # (N, 4·channels); every block would begin with it
        h, skips = x.contiguous(memory_format=torch.channels_last), []
        for stage in self.down:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


# ---- Checkpoints -------------------------------------------------------------------------------

FORMAT = 1  # of our files; one with a higher number was written by a newer version

# openai/improved-diffusion's names for our layers.
OPENAI_NAMES = {
    "input_blocks": "down", "middle_block": "middle", "output_blocks": "up", ".op.": ".",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "emb", "proj_out": "proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "skip", ".conv.": ".1.",
}  # fmt: skip

# What the tensors of its released files don't tell: schedule, T, time_scale, heads.
OPENAI_FILES = {
    "cifar10_uncond": ("cosine", 4000, None, 4),
    "imagenet64_uncond": ("cosine", 4000, None, 4),
    "imagenet64_cond": ("cosine", 4000, 1.0, 4),
    "lsun_uncond": ("linear", 1000, 1.0, 1),
}


def write(path, save):
    """save(file) and then give the file its name, so that no half of it ever has it. Or OSError."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, of a failed write
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.tmp")


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values."""
    write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def read_checkpoint(path):
    """The dict in a checkpoint or in a run's, its checksums verified. ValueError, or OSError."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        newer = state.get("format", FORMAT) != FORMAT
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is damaged, or no checkpoint of weights only") from error
    if newer:
        raise ValueError(f"{path} has format {state['format']}: a newer version wrote it")
    return state


def from_openai(state, schedule, T, time_scale, num_heads):
    """improved-diffusion's tensors, and what they don't tell, as a checkpoint of ours."""
    for theirs, ours in OPENAI_NAMES.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    # Their attention's 1×1 convolutions run over H·W, (C', C, 1); ours over (H, W).
    state = {name: v[..., None] if v.ndim == 3 else v for name, v in state.items()}
    channels = len(state["down.0.0.weight"])
    # A convolution alone stands before the blocks of each resolution: here the blocks' first.
    first = [i + 1 for i in range(len(state)) if f"down.{i}.0.weight" in state]
    mult = tuple(len(state[f"down.{i}.0.conv1.weight"]) // channels for i in first)
    size = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64}.get(mult, 256)  # as its create_model has them
    attention = [size >> k for k, i in enumerate(first) if f"down.{i}.1.qkv.weight" in state]
    unet = dict(
        image_size=size, out_channels=len(state["out.2.weight"]), channels=channels,
        channel_mult=mult, num_res_blocks=first[1] - 2, dropout=0.0, num_heads=num_heads,
        attention_resolutions=tuple(attention), norm_groups=32,
        num_classes=len(state["label_emb.weight"]) if "label_emb.weight" in state else None,
        scale_shift_norm=len(state["down.1.0.emb.weight"]) > len(state["down.1.0.norm2.weight"]),
    )  # fmt: skip
    variance = "learned" if unet["out_channels"] == 6 else "large"
    process = dict(schedule=schedule, T=T, variance=variance, time_scale=time_scale)
    return dict(unet=unet, ema=state, diffusion=process)


def load_checkpoint(path, schedule=None, T=None, time_scale=None, num_heads=4):
    """UNet with the EMA weights, in eval mode, and Diffusion's arguments, from a file alone.

    The file is ours or one that openai/improved-diffusion released; other plain state dicts of its
    UNet need the arguments after path, those of the process else go before what a file says.
    Raises OSError, or ValueError if it is damaged or foreign.
    """
    state = read_checkpoint(path)
    try:
        if "format" not in state:
            told = [v for k, v in OPENAI_FILES.items() if os.path.basename(path).startswith(k)]
            state = from_openai(state, *(told or [(schedule, T, time_scale, num_heads)])[0])
        model, process = UNet(UNetConfig(**state["unet"])), state["diffusion"]
        model.load_state_dict(state["ema"])
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no UNet of ours or of improved-diffusion's") from error
    given = dict(schedule=schedule, T=T, time_scale=time_scale)
    process = process | {name: value for name, value in given.items() if value is not None}
    if process["schedule"] is None or process["T"] is None:
        raise ValueError(f"{path} does not say its process: give --schedule and --T")
    return model.eval(), process


# ---- Devices -----------------------------------------------------------------------------------


def pick_device(name, dtype):
    """Device and autocast for auto|cpu|cuda|mps and auto|fp32|bf16. Raises ValueError.

    "auto" is the best device, under torchrun this process's own, and bf16 where it is native.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    name = next(n for n in found if found[n]) if name == "auto" else name
    if not found[name]:
        raise ValueError(f"--device {name}: there is none here")
    device, native = torch.device(name), False
    if name == "cuda":
        if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            raise ValueError("more processes than GPUs: take a smaller --nproc-per-node")
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif name == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        with contextlib.suppress(OSError, AttributeError, TypeError):  # where there is glibc:
            malloc = ctypes.CDLL(None).mallopt  # keep the memory of one step for the next
            malloc(-3, 2**25), malloc(-1, 2**31 - 1)  # M_MMAP_ and M_TRIM_THRESHOLD
    bf16 = dtype == "bf16" or (dtype == "auto" and native)
    torch.backends.cudnn.allow_tf32 = bf16  # else its "float32" has the 10 bits of TF32
    return device, torch.autocast(name, torch.bfloat16, enabled=bf16)
