"""Train Improved DDPM, or measure its bits per dimension.

    python train.py                                      drawn digits, a few minutes on a laptop
    torchrun train.py --data cifar10                     the paper's CIFAR-10 run on one GPU
    torchrun --nproc-per-node 8 train.py --data cifar10  the same run on eight
    python train.py --data DIR --image-size 64           your own folder of images
    python train.py --eval-only --data DIR --ckpt FILE   bits/dim of a checkpoint on other images

The same command again goes on from the last checkpoint, on any number of processes.
"""

import argparse
import contextlib
import copy
import fcntl
import hashlib
import math
import os
import signal
import sys
import time
from functools import lru_cache
from multiprocessing.pool import ThreadPool

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # for log_ndtr
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for resuming to the bit
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # no traceback, not of these imports either

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.utils import clip_grad_norm_
from torchvision.datasets import CIFAR10
from torchvision.utils import save_image
from tqdm import tqdm

from diffusion import SCHEDULES, Diffusion, generator, randn
from model import (
    UNet, UNetConfig, load_checkpoint, pick_device, read_checkpoint, save_checkpoint, write,
)  # fmt: skip
from sampler import T_SAMPLERS, gather

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TTY = sys.stderr.isatty()
Image.MAX_IMAGE_PIXELS = None  # large photographs are no attack here


def say(message):
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)


def fail(message, status=1):
    if os.environ.get("LOCAL_RANK", "0") == "0":  # what is wrong may be wrong on one node alone
        tqdm.write(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(status)


# ---- The command line --------------------------------------------------------------------------

# The flags' own defaults are the paper's CIFAR-10 run. What other data change:
DIGITS = dict(
    image_size=16, class_cond=True, flip=False, T=1000, channels=32, channel_mult=(1, 2, 2),
    num_res_blocks=1, attention_resolutions=(8,), dropout=0.0, steps=1200, batch=64, lr=1e-3,
    warmup=100, ema=0.995, log_every=40, sample_every=400, save_every=200,
)  # fmt: skip
FOLDER = dict(image_size=64, dropout=0.0, steps=1_500_000)
MULTS = {16: (1, 2, 2), 32: (1, 2, 2, 2), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
NETWORK = "image_size channels channel_mult num_res_blocks attention_resolutions num_heads".split()
PROCESS = "schedule T variance time_scale".split()
# What may differ when a run goes on: where, how long and how fast it computes, not what.
FREE = "steps accum device dtype compile log_every sample_every save_every out init".split()
FREE += "eval_images eval_steps eval_calls".split()


def within(low, high, kind=int):
    """A type for argparse: a number between these limits."""

    def number(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"must be {low} … {high}, not {text}")
        return value

    return number


whole, fraction = within(1, 10**9), within(0, 1, float)
natural, width = within(0, 10**9), within(1, 4096)


def wholes(text):
    return tuple(whole(part) for part in text.split(",") if part != "none")


def configure(argv):
    """-> the configuration (a Namespace), and what to start from: a checkpoint's dict or {}."""
    flags = argparse.ArgumentParser(
        usage="[torchrun] train.py [--data digits|cifar10|DIR] [flags]", add_help=False,
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, 2, 26, 100),
    )  # fmt: skip
    flags.error = lambda message: fail(message, 2)
    switch = argparse.BooleanOptionalAction
    add = flags.add_argument_group("data").add_argument
    add("--data", default="digits", metavar="WHAT", help="digits, cifar10 or a folder of images")
    add("--image-size", type=within(8, 4096), default=32, metavar="N", help="pixels a side")
    add("--class-cond", action=switch, default=False, help="classes: a folder's subfolders")
    add("--flip", action=switch, default=True, help="mirror images at random")
    add = flags.add_argument_group("process").add_argument
    add("--objective", choices=["simple", "hybrid", "vlb"], default="hybrid", help="loss")
    add("--schedule", choices=list(SCHEDULES), default="cosine", help="of the noise")
    add("--T", type=within(2, 10**5), default=4000, metavar="N", help="timesteps")
    add("--variance", choices=["learned", "small", "large"], default="learned", help="of p")
    add("--t-sampler", choices=list(T_SAMPLERS), default="uniform", help="which t to train on")
    add = flags.add_argument_group("network").add_argument
    add("--channels", type=width, default=128, metavar="N", help="width at the full resolution")
    add("--channel-mult", type=wholes, default=(1, 2, 2, 2), metavar="N,N", help="× --channels")
    add("--num-res-blocks", type=whole, default=3, metavar="N", help="blocks at each resolution")
    add("--attention", type=wholes, dest="attention_resolutions", default=(16, 8), metavar="N,N",
        help="resolutions with attention, or none")  # fmt: skip
    add("--num-heads", type=whole, default=4, metavar="N", help="heads of attention")
    add("--dropout", type=within(0, 0.99, float), default=0.3, metavar="P", help="probability")
    add = flags.add_argument_group("training").add_argument
    add("--out", metavar="DIR", help="run directory (runs/ and the name of the data)")
    add("--steps", type=whole, default=500_000, metavar="N", help="updates in all")
    add("--batch", type=whole, default=128, metavar="N", help="images an update, of all processes")
    add("--accum", type=whole, default=1, metavar="N", help="parts a process computes its share in")
    add("--lr", type=fraction, default=1e-4, metavar="X", help="AdamW's learning rate")
    add("--warmup", type=natural, default=0, metavar="N", help="updates until it's reached")
    add("--ema", type=fraction, default=0.9999, metavar="X", help="decay of the averaged weights")
    add("--grad-clip", type=within(0, 1e9, float), default=0.0, metavar="X", help="0: none")
    add("--seed", type=within(0, 2**32 - 1), default=0, metavar="N", help="of all randomness")
    add("--init", metavar="FILE", help="checkpoint whose weights to start from")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of matrix products")
    add("--compile", action=switch, default=False, help="torch.compile the network")
    add("--log-every", type=whole, default=100, metavar="N", help="updates a row of log.csv")
    add("--sample-every", type=whole, default=10_000, metavar="N", help="updates a grid of samples")
    add("--save-every", type=whole, default=1_000, metavar="N", help="updates a checkpoint")
    add = flags.add_argument_group("bits per dimension").add_argument
    add("--eval-only", action="store_true", help="measure --ckpt on images of --data")
    add("--ckpt", metavar="FILE", help="what to measure (ckpt.pt in --out)")
    add("--eval-images", type=within(2, 10**9), default=10_000, metavar="N", help="at most")
    add("--eval-steps", type=whole, metavar="N", help="steps of the process to measure (T)")
    add("--eval-calls", type=within(5, 10**6), default=10, metavar="N", help="an image; T: all")
    add("-h", "--help", action="store_true", default=argparse.SUPPRESS,
        help="print this, for the --data given")  # fmt: skip

    unset = argparse.Namespace(**dict.fromkeys(vars(flags.parse_args([]))))
    given = {k: v for k, v in vars(flags.parse_args(argv, unset)).items() if v is not None}
    data = given.get("data", "digits")
    if data == "digits":
        flags.set_defaults(**DIGITS)
    elif data not in ("cifar10", ""):
        given["data"] = data = os.path.join(os.path.normpath(data), "")  # cifar10/ is a folder
        mult = MULTS.get(given.get("image_size"), (1, 2, 3, 4))
        flags.set_defaults(**FOLDER, channel_mult=mult)
    if "help" in given:
        flags.print_help()
        raise SystemExit
    if "" in given.values():
        fail("--data, --out, --init and --ckpt must not be empty", 2)
    out = given.setdefault("out", os.path.join("runs", os.path.basename(os.path.abspath(data))))
    path, config = os.path.join(out, "ckpt.pt"), vars(flags.parse_args([]))
    config["time_scale"] = None  # 1000/T, or that of --init
    state, fixed = {}, ()
    if "eval_only" in given:
        config |= dict(ckpt=path, **dict.fromkeys(PROCESS))  # the process is the checkpoint's
    elif "ckpt" in given:
        fail("--ckpt is for --eval-only: training goes on in --out, or starts from --init", 2)
    elif os.path.exists(path):
        state = read_checkpoint(path)
        if not isinstance(state.get("config"), dict):
            fail(f"{path} holds weights, but no run to go on with: take another --out")
        config |= state["config"]
        fixed, whose = config.keys() - FREE, f"the run in {out}"
    elif "init" in given:
        known = (given.get("schedule"), given.get("T"), None, given.get("num_heads", 4))
        model, process = load_checkpoint(given["init"], *known)
        config |= process | {name: getattr(model.config, name) for name in NETWORK}
        fixed, whose, weights = NETWORK, "the network of --init", model.state_dict()
        state = dict(unet=vars(model.config), model=weights, ema=weights)
    for name in given.keys() & fixed:
        if given[name] != config[name]:
            flag = name.removesuffix("_resolutions").replace("_", "-")
            fail(f"--{flag} {given[name]}: {whose} has {config[name]};"
                 " leave it out, or take another --out", 2)  # fmt: skip
    return argparse.Namespace(**config | given), state


# ---- Data: uint8 images (N, 3, S, S), labels (N,) ----------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def draw_digits(n, size, seed):
    """n pictures of a digit: any height, place, and two colours that differ in brightness."""
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size=height * 1.4) for height in range(size // 2, size - 2)]
    images, labels = np.empty((n, size, size, 3), np.uint8), rng.integers(10, size=n)
    for i, digit in enumerate(labels.astype(str)):
        paper = ink = rng.integers(256, size=3)
        while abs((paper - ink) @ [0.299, 0.587, 0.114]) < 80:
            ink = rng.integers(256, size=3)
        image = Image.new("RGB", (size, size), tuple(paper.tolist()))
        font = fonts[rng.integers(len(fonts))]
        left, top, right, bottom = font.getbbox(digit)
        x, y = rng.integers((0, 0), (size + 1 - right + left, size + 1 - bottom + top))
        ImageDraw.Draw(image).text((x - left, y - top), digit, tuple(ink.tolist()), font)
        images[i] = image
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def read_image(path, size):
    """The centre square of an image file as uint8 (3, size, size), or None if it is broken."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":  # of no known range
                return None
            image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception:  # Pillow has one for every way in which a file can be broken
        return None


def locked(path, flags=0):
    """Open a file that one process of this machine may hold at a time; the others wait."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "w")
    fcntl.flock(file, fcntl.LOCK_EX | flags)
    return file


def load_folder(root, size):
    """All images below root -> memory-mapped (N, 3, size, size), and their paths.

    The first process decodes them into data/cache, anew if a file was added, removed or changed.
    """
    here = os.path.join(os.path.realpath(root), "")
    links = [entry.path for entry in os.scandir(root) if entry.is_symlink()]
    loops = [link for link in links if here.startswith(os.path.join(os.path.realpath(link), ""))]
    tops = [root, *(link for link in links if link not in loops)]
    files = [os.path.join(folder, f) for top in tops for folder, _, fs in os.walk(top) for f in fs]
    paths = sorted(os.path.relpath(f, root) for f in files if f.lower().endswith(SUFFIXES))
    stats = [os.lstat(os.path.join(root, path)) for path in paths]
    listing = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats)]
    key = hashlib.sha256(repr((listing, size)).encode()).hexdigest()[:12]
    cache = f"data/cache/{os.path.basename(os.path.abspath(root))}-{size}-{key}"
    with locked(cache + ".lock"):
        if not os.path.exists(cache):
            os.makedirs(cache + ".tmp", exist_ok=True)
            good = []
            with open(f"{cache}.tmp/images.u8", "wb") as file, ThreadPool() as pool:
                decode = pool.imap(lambda path: read_image(os.path.join(root, path), size), paths)
                bar = tqdm(decode, f"reading {root}", len(paths), unit=" images", disable=not TTY)
                for path, image in zip(paths, bar):
                    if image is not None:
                        file.write(image.tobytes())
                        good.append(path)
            if broken := sorted(set(paths) - set(good)):
                some = ", ".join(broken[:5]) + ", …" * (len(broken) > 5)
                message = f"left out {len(broken)} of {len(paths)} images, which are broken: {some}"
                tqdm.write(message, file=sys.stderr)  # one process decodes, whichever comes first
            np.save(f"{cache}.tmp/paths.npy", good)
            os.rename(cache + ".tmp", cache)
    paths = np.load(f"{cache}/paths.npy").tolist()
    if not paths:
        raise ValueError(f"--data {root}: no readable image there ({' '.join(SUFFIXES)})")
    return np.memmap(f"{cache}/images.u8", np.uint8, "r", shape=(len(paths), 3, size, size)), paths


def load_data(config, held_out=False):
    """-> images (N, 3, S, S) uint8, labels (N,) int64 or None, number of classes or None."""
    classes = 10
    if config.data == "digits":
        images, labels = draw_digits(20_000, config.image_size, config.seed + 2**32 * held_out)
    elif config.data == "cifar10":
        if config.image_size != 32:
            raise ValueError(f"--data cifar10 has images of 32 pixels, not {config.image_size}")
        try:
            with locked("data/cifar10.lock"), contextlib.redirect_stdout(sys.stderr):
                data = CIFAR10("data", train=not held_out, download=True)
        except (OSError, RuntimeError) as error:
            fail(f"cannot download CIFAR-10 ({error}); put cifar-10-python.tar.gz into data/")
        images, labels = data.data.transpose(0, 3, 1, 2), np.array(data.targets)
    elif os.path.isdir(config.data):
        images, paths = load_folder(config.data, config.image_size)
        names, labels = np.unique([path.split(os.sep)[0] for path in paths], return_inverse=True)
        classes = len(names)
        if config.class_cond and (loose := [f for f in names if f.lower().endswith(SUFFIXES)]):
            raise ValueError(f"{loose[0]} in {config.data} is in no subfolder and so has no class")
    else:
        fail(f"--data {config.data}: neither digits, nor cifar10, nor a folder", 2)
    return images, *((labels, classes) if config.class_cond else (None, None))


@lru_cache(2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, 2**31 + epoch)).numpy()


def to_device(images, labels, rows, device):
    """The images of some rows, as float32 in [-1, 1], and their labels or None."""
    x0 = torch.from_numpy(np.asarray(images[rows]))
    if device.type == "cuda":  # from pinned memory, the host need not wait for the device
        x0 = x0.pin_memory()
    x0 = x0.to(device, non_blocking=True).float() / 127.5 - 1
    return x0, None if labels is None else torch.from_numpy(labels[rows]).to(device)


def load_batch(config, images, labels, t_sampler, step, device):
    """This process's part of the batch of a step -> x0, y, t, weights, noise.

    All randomness is drawn anew from (seed, step), for the whole batch, by each process: neither
    their number nor a restart changes what an image of the batch meets.
    """
    B, N = config.batch, len(images)
    mine = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD)
    places = range(step * B, step * B + B)[mine]  # in the endless sequence of epochs
    rows = np.array([epoch_order(config.seed, p // N, N)[p % N] for p in places])
    g = generator(config.seed, step, device)
    t, weights = t_sampler.sample(B, g)
    noise = torch.randn(B, *images.shape[1:], generator=g, device=device)[mine]
    flip = torch.rand(B, 1, 1, 1, generator=g, device=device)[mine] < 0.5 * config.flip
    x0, y = to_device(images, labels, rows, device)
    return torch.where(flip, x0.flip(3), x0), y, t[mine], weights[mine], noise


# ---- Training ----------------------------------------------------------------------------------

COLUMNS = "step,loss,bits_per_dim,grad_norm,lr,skipped,seconds\n"


def catch_signals():
    """-> a tensor that becomes the number of the first SIGINT or SIGTERM; the next one kills."""
    stop, first = torch.zeros(1, dtype=torch.int64), []

    def handle(number, frame):
        if first and time.monotonic() > first[0] + 1:  # sooner, torchrun passes on the same Ctrl-C
            raise SystemExit(128 + number)
        if not first:
            first.append(time.monotonic())
            stop.fill_(number)
            say("stopping after this step (once more: at once)")

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def draw_grid(path, seed, diffusion, ema, device, autocast):
    """Write a grid of 64 samples."""
    size, classes = ema.config.image_size, ema.config.num_classes
    generators = [generator(seed, i, device) for i in range(64)]
    y = torch.arange(64, device=device) % classes if classes else None
    with autocast:
        x = diffusion.sample(ema, randn((3, size, size), generators), y, generators=generators)
    x = torch.nn.functional.interpolate(x, scale_factor=float(max(1, 64 // size)))
    write(path, lambda f: save_image(x, f, "png", normalize=True, value_range=(-1, 1)))


def check_classes(model, classes, data):
    if model.config.num_classes != classes:
        ours = model.config.num_classes or "no"
        raise ValueError(f"--data {data} has {classes or 'no'} classes, the network {ours}")


def train(config, state, device, autocast):
    """Train to config.steps. `state` may hold a whole checkpoint, weights alone, or nothing."""
    images, labels, classes = load_data(config)
    process = {name: getattr(config, name) for name in PROCESS}
    unet = {name: getattr(config, name) for name in NETWORK}
    unet |= dict(out_channels=6 if config.variance == "learned" else 3, num_classes=classes)
    unet |= state.get("unet", {}) | {"dropout": config.dropout}
    torch.manual_seed(config.seed)
    model = UNet(UNetConfig(**unet))
    check_classes(model, classes, config.data)
    diffusion = Diffusion(**process).to(device)
    preview = Diffusion(**process, steps=min(config.T, 100)).to(device)
    ema = copy.deepcopy(model.to(device)).eval().requires_grad_(False)
    params, averages = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(params, config.lr, weight_decay=0.0, fused=True)
    t_sampler = T_SAMPLERS[config.t_sampler](config.T).to(device)
    stateful = {"model": model, "ema": ema, "optimizer": optimizer, "t_sampler": t_sampler}
    for name in stateful.keys() & state.keys():
        stateful[name].load_state_dict(state.pop(name))
    start, log = state.get("step", 0), state.get("log", COLUMNS)
    begin = time.monotonic() - state.get("seconds", 0)
    if (gather(torch.tensor([start])) != start).any():
        fail("not all processes see the same checkpoint: nodes must share the storage of --out")
    net = torch.compile(model) if config.compile else model
    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    ckpt = os.path.join(config.out, "ckpt.pt")
    about = dict(config=vars(config), unet=vars(model.config), diffusion=process)
    # Since the last row of the log: loss, bits/dim, gradient norm, steps, skipped steps.
    sums, skipped_in_a_row = torch.zeros(5, device=device), torch.zeros((), device=device)
    os.makedirs(os.path.join(config.out, "samples"), exist_ok=True)
    try:
        _lock = RANK == 0 and locked(os.path.join(config.out, ".lock"), fcntl.LOCK_NB)  # until exit
    except BlockingIOError:
        fail(f"another run is writing to {config.out}: take another --out")
    stop, bar = catch_signals(), tqdm(
        desc=f"step {start}", total=config.steps * config.batch, initial=start * config.batch,
        file=sys.stderr if TTY and RANK == 0 else open(os.devnull, "w"), unit=" images",
        unit_scale=True,
        bar_format="{desc}, {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
    )  # fmt: skip
    for step in range(start, max(start, config.steps) + 1):  # steps done; the last pass only saves
        stopping = int(gather(stop).max())  # on the CPU: the device does not wait
        last, new = step >= config.steps, step > start
        saves = new and (last or stopping or step % config.save_every == 0)
        if saves or new and step % config.log_every == 0:
            loss, bits, norm, good, bad = gather(sums[None]).mean(0).tolist()
            loss, bits, norm = (value / max(good, 1) for value in (loss, bits, norm))
            bits += diffusion.prior(x0).mean().item()
            seconds = time.monotonic() - begin
            log += f"{step},{loss:.6g},{bits:.6g},{norm:.6g},{lr:.6g},{bad:.0f},{seconds:.1f}\n"
            if RANK == 0:
                write(os.path.join(config.out, "log.csv"), lambda file: file.write(log.encode()))
            sums.zero_()
            bar.set_description_str(f"step {step}: loss {loss:.4f}, {bits:.3f} bits/dim")
            if not TTY:
                say(str(bar))
            if skipped_in_a_row >= 100:
                fail(f"no finite gradient in the 100 steps before {step}: try a smaller --lr")
        if RANK == 0 and new and not stopping and (last or step % config.sample_every == 0):
            path = os.path.join(config.out, "samples", f"{step:07}.png")
            draw_grid(path, config.seed, preview, ema, device, autocast)
        if RANK == 0 and saves:
            parts = {name: part.state_dict() for name, part in stateful.items()}
            save_checkpoint(ckpt, about | parts | dict(step=step, seconds=seconds, log=log))
        if last or stopping:
            break

        lr = config.lr * min(1, (step + 1) / max(config.warmup, 1))
        optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(generator(config.seed, 2**30 + step * WORLD + RANK).initial_seed())
        x0, y, t, weights, noise = load_batch(config, images, labels, t_sampler, step, device)
        losses, n = [], len(x0)
        for part in range(config.accum):
            s = slice(part * n // config.accum, (part + 1) * n // config.accum)
            net.require_backward_grad_sync = part == config.accum - 1  # DDP sums gradients once
            y_part = None if y is None else y[s]
            with autocast:
                loss, vlb = diffusion.losses(net, x0[s], t[s], y_part, noise[s], config.objective)
            (weights[s] @ loss * (WORLD / config.batch)).backward()  # DDP divides by WORLD
            losses.append(torch.stack([loss.detach(), vlb]))
        norm = clip_grad_norm_(params, config.grad_clip or math.inf)
        # A gradient that is not finite, on any process, is not used: the fused optimizer then does
        # nothing, and the host need not look.
        bad = (~norm.isfinite()).float()
        optimizer.grad_scale, optimizer.found_inf = None, bad
        if device.type != "mps" or not bad:  # whose optimizer may not know found_inf
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # else each step's average would keep the one before for a backward
            # The ramp keeps the initial weights out of the average of a short run.
            torch._foreach_lerp_(averages, params, 1 - min(config.ema, (1 + step) / (10 + step)))
        losses = torch.cat(losses, 1)
        t_sampler.update(t, losses[0])
        skipped_in_a_row = (skipped_in_a_row + bad) * bad
        means = losses @ weights * (WORLD / config.batch)
        row = torch.stack([*means, norm]).where(bad == 0, 0).nan_to_num(0, 0, 0)
        sums += torch.cat([row, torch.stack([1 - bad, bad])])
        bar.update(config.batch)
    bar.close()
    if stopping:
        raise SystemExit(128 + stopping)
    if RANK == 0:
        print(ckpt)


# ---- Bits per dimension ------------------------------------------------------------------------


def evaluate(config, device, autocast):
    """Print a checkpoint's bound on images of --data (or its test set), write each L_t's mean."""
    known = config.schedule, config.T, None, config.num_heads  # for a plain state dict
    model, process = load_checkpoint(config.ckpt, *known)
    process |= {"variance": config.variance or process["variance"], "steps": config.eval_steps}
    diffusion = Diffusion(**process).to(device)
    config.image_size = model.to(device).config.image_size
    config.class_cond = model.config.num_classes is not None
    images, labels, classes = load_data(config, held_out=True)
    check_classes(model, classes, config.data)
    n = min(config.eval_images, len(images))
    rows = epoch_order(config.seed, 0, len(images))[:n]
    # Every term once; or, in eval_calls calls, two estimates, whose difference tells the error.
    exact, p = config.eval_calls >= diffusion.num_steps, None
    estimates, calls = (range(1), None) if exact else (range(2), (config.eval_calls - 3) // 2)
    found, sums = [torch.zeros(0, 3)], torch.zeros(2, diffusion.num_steps).double()
    torch.manual_seed(generator(config.seed, RANK).initial_seed())
    bar = tqdm(range(RANK, n, config.batch * WORLD), "bits/dim", disable=not TTY or RANK > 0)
    with autocast:
        for i in bar:
            x0, y = to_device(images, labels, rows[i : i + config.batch * WORLD : WORLD], device)
            if p is None and not exact:  # a pilot: at most one call an image
                few = slice(max(1, n // WORLD // 32))
                p = diffusion.pilot(model, x0[few], None if y is None else y[few])
            inner = exact and not bar.disable
            bounds = [diffusion.bits_per_dim(model, x0, y, p, calls, inner) for _ in estimates]
            total, terms, prior = (torch.stack(parts).cpu() for parts in zip(*bounds))
            found.append(torch.stack([total.mean(0), (total[0] - total[-1]) / 2, prior[0]], 1))
            sums += torch.stack([terms.nansum((0, 1)), (~terms.isnan()).sum((0, 1))])
            total, rest, _ = torch.cat(found).unbind(1)
            bar.set_postfix_str(f"{total.mean():.3f} ± {rest.norm() / len(rest):.4f}")
    total, rest, prior = gather(torch.cat(found)).double().unbind(1)
    sums, draws = gather(sums[None]).sum(0)
    if RANK == 0:
        L_t = sums / draws
        error = f"± {rest.norm() / n:.4f} by the choice of t and noise"
        print(f"bits/dim {total.mean():.4f} on {n} images,"
              f" {'every term computed' if exact else error},"
              f" ± {total.std() / n**0.5:.4f} with that of images")  # fmt: skip
        kls = (total - prior).mean() - L_t[0]
        print(f"L_0 {L_t[0]:.4f}, KLs {kls:.4f}, L_T {prior.mean():.6f}")
        run = config.ckpt if os.path.isdir(config.ckpt) else os.path.dirname(config.ckpt)
        path, t = os.path.join(run, "terms.csv"), draws.nonzero().flatten()
        table, header = torch.stack([t, L_t[t], draws[t]], 1), "t,bits_per_dim,draws"
        np.savetxt(path, table, ("%d", "%.6g", "%d"), ",", header=header, comments="")
        say(f"wrote {path}")


def main():
    config, state = configure(sys.argv[1:])
    say(" ".join(f"{name}={value}" for name, value in vars(config).items() if value is not None))
    # bf16 biases bits/dim by about 0.02: there it is used only where it is asked for.
    exact = config.eval_only and config.dtype == "auto"
    device, autocast = pick_device(config.device, "fp32" if exact else config.dtype)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)  # for resuming to the bit
    torch.utils.deterministic.fill_uninitialized_memory = False
    if config.eval_only:
        return evaluate(config, device, autocast)
    if config.batch < WORLD * config.accum:
        fail(f"--batch {config.batch} is less than {WORLD} processes × --accum {config.accum}", 2)
    train(config, state, device, autocast)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        fail(str(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
