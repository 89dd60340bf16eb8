"""The network of Improved DDPM: a UNet from (x_t, t, y) to ε, the noise in x_t, and v, for Σ of p.

The file holds, in this order: the network, which knows nothing of schedules or data; its
checkpoints, ours and OpenAI's; and what the two scripts share. The layers have the order and shapes
of openai/improved-diffusion's, whose published weights load here (see load_checkpoint).
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import zipfile
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from tqdm import tqdm

from sampler import gather


@dataclasses.dataclass
class UNetConfig:
    """What a UNet is. The defaults are the paper's CIFAR-10 network (52.5M parameters). Raises
    ValueError for sizes that do not fit: channel_mult, attention_resolutions, low_res."""

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
    class_names: tuple[str, ...] | None = None  # of class 0, 1, 2, …
    label_dropout: float = 0.0  # share of the training images that were shown without their class

    def __post_init__(self):
        size, mult, low_res = self.image_size, self.channel_mult, self.low_res
        sizes = [size >> level for level in range(len(mult))]
        if not sizes or size != sizes[-1] << len(sizes) - 1:
            raise ValueError(f"--channel-mult {spelt(mult)} halves --image-size {size} too often")
        if unknown := set(self.attention_resolutions) - set(sizes):
            raise ValueError(f"--attention {unknown.pop()}: the resolutions are {spelt(sizes)}")
        if low_res and (size % low_res or low_res == size):
            raise ValueError(f"--low-res {low_res} must divide {size} and be smaller")


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
        Raises ValueError if one is missing, or is given to a network that has no use for it.
        """
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("y must be given if and only if the network has num_classes")
        if (low_res is None) != (self.config.low_res is None):
            raise ValueError("low_res must be given if and only if the network is an upsampler")
        emb = self.time_embed(timestep_embedding(t, self.config.channels))
        if y is not None:
            emb = emb + torch.where(y[:, None] >= 0, self.label_emb(y.clamp(min=0)), 0)
        emb = F.silu(emb)  # (N, 4·channels); every block would begin with it
        if low_res is not None:
            x = torch.cat([x, F.interpolate(low_res, x.shape[-2:], mode="bilinear")], dim=1)
        h, skips = x.contiguous(memory_format=torch.channels_last), []
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
        if channels % self.num_heads:
            raise ValueError(f"--num-heads {self.num_heads} does not divide {channels} channels")
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
    be less exact, and slower on CPUs. Raises ValueError if the channels make no groups of 4."""

    def __init__(self, channels, groups):
        if channels % 4:
            raise ValueError(f"--channels makes {channels} channels, which is no multiple of 4")
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
    """The layer with its parameters 0: a block starts as its skip, the network as 0."""
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

FORMAT = 1  # of our files; to be raised when older code would misread a newer file

# openai/improved-diffusion's names for our layers.
OPENAI_NAMES = {
    "input_blocks": "down", "middle_block": "middle", "output_blocks": "up", ".op.": ".",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "emb", "proj_out": "proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "skip", ".conv.": ".1.",
}  # fmt: skip

# What the tensors of its released files do not say: schedule, T, time_scale, heads.
OPENAI_FILES = {
    "cifar10_uncond": ("cosine", 4000, None, 4),
    "imagenet64_uncond": ("cosine", 4000, None, 4),
    "imagenet64_cond": ("cosine", 4000, 1.0, 4),
    "lsun_uncond": ("linear", 1000, 1.0, 1),
    "upsample_cond": ("linear", 4000, 1.0, 4),
}


def load_checkpoint(path, schedule=None, T=None, time_scale=None, num_heads=None):
    """UNet with the EMA weights, in eval mode, and Diffusion's arguments, both from the file.

    The file is ours or one that openai/improved-diffusion released. Other plain state dicts of its
    UNets need schedule and T; of time_scale and num_heads, the defaults are None and 4. Raises
    OSError, or ValueError if the file is damaged or foreign, or does not agree with what is given.
    """
    state = read_checkpoint(path)
    given = dict(schedule=schedule, T=T, time_scale=time_scale, num_heads=num_heads)
    try:
        if "format" not in state:
            known = [v for k, v in OPENAI_FILES.items() if os.path.basename(path).startswith(k)]
            state = from_openai(state, *(known or [(schedule, T, time_scale, num_heads or 4)])[0])
        model, process = UNet(UNetConfig(**state["unet"])), state["diffusion"]
        model.load_state_dict(state["ema"])
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no UNet of this code or of improved-diffusion") from error
    if process["schedule"] is None or process["T"] is None:
        raise ValueError(f"{path} does not say its process: give --schedule and --T")
    held = process | {"num_heads": model.config.num_heads}
    for name, value in given.items():
        if value is not None and value != held.get(name):
            raise ValueError(f"{flag(name)} {value}: {path} has {spelt(held.get(name))}")
    return model.eval(), process


def read_checkpoint(path):
    """The dict in a checkpoint file, or in ckpt.pt of a directory, once its checksums are verified.

    Raises OSError, or ValueError if the file is damaged, foreign or newer than this code.
    """
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        newer = state.get("format", FORMAT) != FORMAT
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is damaged, or not a checkpoint") from error
    if newer:
        raise ValueError(f"{path} has format {state['format']}: a newer version wrote it")
    return state


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values."""
    write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def from_openai(state, schedule, T, time_scale, num_heads):
    """Our checkpoint from improved-diffusion's tensors and the settings that they do not hold."""
    for theirs, ours in OPENAI_NAMES.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    # Their attention's 1×1 convolutions run over H·W, (C', C, 1); ours over (H, W).
    state = {name: v[..., None] if v.ndim == 3 else v for name, v in state.items()}
    channels, in_channels = state["down.0.0.weight"].shape[:2]
    # The input and each downsampling are bare convolutions: `first` are the blocks after them.
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
        low_res=size // 4 if in_channels == 6 else None,
    )  # fmt: skip
    variance = "learned" if unet["out_channels"] == 6 else "large"
    process = dict(schedule=schedule, T=T, variance=variance, time_scale=time_scale)
    return dict(unet=unet, ema=state, diffusion=process)


# ---- What the two scripts share: ranks, messages, flags, devices, files, pictures ----------------

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
TTY = sys.stderr is not None and sys.stderr.isatty()


def run_script(main):
    """Run main() as a command: an error is one line on stderr, its status 2 for wrong input."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # no result is lost to an ASCII terminal
    try:
        main()
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not memory:
            raise  # a bug: its traceback is shown
        # Before the ranks join, an error is the same on all: one of each machine prints it.
        if LOCAL_RANK == 0 or dist.is_initialized():
            where = f"rank {RANK}: " if RANK > 0 else ""
            name = os.path.basename(sys.argv[0])
            tqdm.write(f"{name}: error: {where}{first_line(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def first_line(error):
    """What an error says, in one line."""
    if getattr(error, "filename", None):  # "[Errno 2] No such file or directory: 'x'"
        return f"{error.filename}: {error.strerror}"
    return (str(error) or type(error).__name__).splitlines()[0]


def say(message):
    """Print a line to stderr, from one rank. A failure to print does not end the run."""
    with contextlib.suppress(OSError, RuntimeError):  # the latter in a signal's handler
        if RANK == 0:
            tqdm.write(message, file=sys.stderr)


def progress_bar(*given, **more):
    """A bar of tqdm's, from one rank. Off a terminal, it is printed once a minute."""
    seconds = {} if TTY else dict.fromkeys(("delay", "mininterval", "maxinterval"), 60)
    return tqdm(*given, **seconds, **more, disable=RANK > 0 or sys.stderr is None)


def some(names, most=10):
    """The first of these names, in a message, and how many more there are."""
    return ", ".join(names[:most]) + f", … ({len(names) - most} more)" * (len(names) > most)


def report(line):
    """Print a result to stdout, from one rank."""
    if RANK == 0:
        with contextlib.suppress(BrokenPipeError):  # nobody reads it
            print(line, flush=True)


def parse_flags(usage, flags, argv, preset_of):
    """The flags that were typed, {name: value}, and the defaults of all. Raises ValueError.

    flags      the table {title: [(name, default, kind, meaning), …]}; for a kind, see within()
    preset_of  a function from what was typed to the values that replace defaults
    """
    parser = argparse.ArgumentParser(
        usage=usage, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, 2, 26, 100),
    )  # fmt: skip
    parser.error = refuse
    for title, rows in flags.items():
        group = parser.add_argument_group(title)
        for name, _, kind, meaning in rows:
            group.add_argument(flag(name), dest=name, help=meaning, **kind)
    parser.add_argument("-h", "--help", action="store_true", help="print this")
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":
            raise ValueError(f"{flag(name)} must not be empty")
    preset = {row[0]: row[1] for rows in flags.values() for row in rows} | preset_of(given)
    if "help" in given:
        told = {k: spelt(v) for k, v in preset.items() if v is not None and v is not False}
        parser.set_defaults(**told)
        parser.print_help()
        raise SystemExit
    return given, preset


def refuse(message):
    raise ValueError(message)


SWITCH = dict(action=argparse.BooleanOptionalAction)
DEVICES = dict(choices=("auto", "cpu", "cuda", "mps"))
DTYPES = dict(choices=("auto", "fp32", "bf16", "fp16"))


def within(low, high, kind=int):
    """What argparse must know of a flag that is a number between these limits."""

    def number(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        what = "a whole number, " if kind is int else ""
        raise argparse.ArgumentTypeError(f"must be {what}{low} … {high}, not {text}")

    return dict(type=number, metavar="N" if kind is int else "X")


def flag(name):
    """How a value's name is spelt on the command line."""
    return "--" + name.removesuffix("_resolutions").replace("_", "-")


def spelt(value):
    """How a value is spelt on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else value


def pick_device(name):
    """The torch.device for auto (the best), cpu, cuda or mps. Under torchrun, the ranks are joined,
    and each rank of a machine has a GPU of its own. Raises ValueError if it lacks the device."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    name = next(n for n in found if found[n]) if name == "auto" else name
    if not found[name]:
        raise ValueError(f"--device {name}: this machine has none")
    device, backend = torch.device(name), "gloo"
    if name == "cuda":
        if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            raise ValueError("more ranks than GPUs: give torchrun a smaller --nproc-per-node")
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(LOCAL_RANK)
        device, backend = torch.device(name, LOCAL_RANK), "cpu:gloo,cuda:nccl"
    if WORLD > 1:  # one rank may draw a grid or decode images alone, for which the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return device


def pick_dtype(name, device):
    """The torch.dtype of matrix products for auto, fp32, bf16 or fp16. "auto" is bfloat16 where the
    device computes with it natively, else float16 on CUDA, else float32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # which torch 2.6 does not have
        native = device.type == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16"))
        name = "bf16" if native else "fp32"
    torch.backends.cudnn.allow_tf32 = name != "fp32"  # TF32 has a precision of 10 bits
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """A context in which the network computes matrix products in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def one_rank_first():
    """A context that the first rank of each machine goes through before the others do: each rank
    passes one barrier, before or after it."""
    if LOCAL_RANK > 0:
        gather(torch.zeros(1))
    yield
    if LOCAL_RANK == 0:
        gather(torch.zeros(1))


def agree(number, what):
    """Raise ValueError unless all ranks have this number."""
    if (gather(torch.tensor([number], dtype=torch.float64)) != number).any():
        raise ValueError(f"the ranks see different {what}")


def checksum(model):
    """A whole number that tells a network's weights from others."""
    return zlib.crc32(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]).numpy())


def write(path, save):
    """Have save(file) write a file, which gets its name once it is complete. Raises OSError."""
    target = os.path.realpath(path)  # a link stays a link
    try:
        with open(f"{target}.tmp", "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{target}.tmp", target)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, of a failed write
        reason = getattr(error, "strerror", None) or f"{first_line(error)} (is the disk full?)"
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{target}.tmp")


def load_npz(path):
    """The uint8 images of an .npz file (N, 3, S, S), and the name of the class of each, or None.

    It holds arr_0 or images, uint8 (N, S, S, 3); it may hold arr_1 or labels, whole numbers or
    names (N,), and class_names, of which the labels are then the indices. sample.py writes such
    files. Raises OSError, or ValueError if the file is damaged or holds something else.
    """
    try:
        with np.load(path) as file:
            images = file.get("images", file.get("arr_0"))
            labels = file.get("labels", file.get("arr_1"))
            names, found = file.get("class_names"), ", ".join(file.files)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is damaged, or its images or labels are objects") from error
    if images is None:
        raise ValueError(f"{path} has no arr_0 or images, but {found}")
    square = images.ndim == 4 and images.shape[1:] == (images.shape[1], images.shape[1], 3)
    if images.dtype != np.uint8 or not square or not len(images):
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"{path}: arr_0 (or images) must be uint8 (N, S, S, 3), not {found}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU"):
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{path}: labels must be N whole numbers or names, not {found}")
    if labels is not None and names is not None:
        if names.ndim != 1 or not np.isin(labels, np.arange(len(names))).all():
            raise ValueError(f"{path}: class_names must have a name for each label")
        labels = names[labels]
    return images.transpose(0, 3, 1, 2), None if labels is None else labels.astype(str).tolist()


Image.MAX_IMAGE_PIXELS = None  # these limits guard servers; here, large images are wanted
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30


def read_picture(path, size=None):
    """A picture file in RGB, upright, on white. Raises ValueError, which says why there is none.

    size  a large JPEG is decoded at a fraction of its size, at least twice this many pixels a side
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", size and (2 * size, 2 * size))
            image.load()
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise OSError(0, "32 bits a pixel, whose range is not known")
        key = image.info.get("transparency")
        with contextlib.suppress(Exception):  # damaged EXIF is no reason to lose the picture
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel
            grey = np.asarray(image)
            grey = np.where(grey == key, 65535, grey) if isinstance(key, int) else grey
            image = Image.fromarray((grey / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow has one for every way in which a file can be broken
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'broken'}") from error


def to_pixels(x):
    """(N, C, H, W) in [-1, 1] -> uint8 of the same shape, on the CPU."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def draw_grid(pixels, columns=None):
    """uint8 (N, 3, H, W) -> a picture of all, nearly square; small ones are enlarged to be seen."""
    N, _, H, W = pixels.shape
    columns, zoom = columns or math.ceil(N**0.5), max(1, 64 // W)
    width, height = columns * (W + 1) - 1, math.ceil(N / columns) * (H + 1) - 1
    grid = Image.new("RGB", (width, height))  # black, as are the lines between the images
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        grid.paste(Image.fromarray(image), (i % columns * (W + 1), i // columns * (H + 1)))
    return grid.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
