"""Train Improved DDPM, or measure its bits per dimension.

    python train.py                                      drawn digits, a few minutes on a laptop
    torchrun train.py --data cifar10                     the paper's CIFAR-10 run on one GPU
    torchrun --nproc-per-node 8 train.py --data cifar10  the same run on eight
    python train.py --data DIR --image-size 64           your own folder of images
    python train.py --data DIR --low-res 16              an upsampler from 16 pixels a side
    python train.py --eval-only --data DIR --ckpt FILE   bits/dim of a checkpoint on other images

The same command again resumes the run from its last checkpoint, on any number of ranks.
"""

import contextlib
import copy
import hashlib
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from argparse import ArgumentTypeError, Namespace
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # MPS has no log_ndtr (for bits/dim)


def on_stop(handle):
    """Call handle on the signals that stop a program, except ignored ones (as under nohup)."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if (number := getattr(signal, name, None)) and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


on_stop(lambda number, _: sys.exit(128 + number))  # no traceback, even of the imports below

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from diffusion import FEW_STEPS_SAMPLER, SCHEDULES, Diffusion, few_steps, generator, randn
from model import (
    DEVICES, DTYPES, RANK, SWITCH, TTY, WORLD, UNet, UNetConfig, agree, autocast, checksum,
    draw_grid, first_line, flag, load_checkpoint, load_npz, one_rank_first, parse_flags,
    pick_device, pick_dtype, progress_bar, read_checkpoint, read_picture, report, run_script,
    save_checkpoint, say, some, spelt, to_pixels, within, write,
)  # fmt: skip
from sampler import T_SAMPLERS, gather


# ---- The flags ---------------------------------------------------------------------------------


def list_of_numbers(text):
    if not re.fullmatch("none|[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", text):
        raise ArgumentTypeError(f"must be numbers like 1,2,2 or none, not {text}")
    return () if text == "none" else tuple(map(int, text.split(",")))


whole, share = within(1, 10**9), within(0, 1, float)
wholes = dict(type=list_of_numbers, metavar="N,N")

# Name, the paper's value on CIFAR-10 (of flip, Ho et al.'s), what argparse must know, meaning.
FLAGS = {
    "where (may change when a run is resumed)": [
        ("data", "digits", dict(metavar="WHAT"), "digits, cifar10, a folder or X.npz; the defaults depend on it"),
        ("out", None, dict(metavar="DIR"), "the run's directory (default: runs/ and the name of the data)"),
        ("device", "auto", DEVICES, "where to compute"),
        ("dtype", "auto", DTYPES, "precision of matrix products"),
    ],
    "images": [
        ("image_size", 32, within(8, 4096), "pixels a side"),
        ("class_cond", False, SWITCH, "learn the classes: subfolders, or the labels in X.npz"),
        ("low_res", None, within(1, 2048), "train an upsampler from N pixels a side to --image-size"),
        ("batch", 128, within(1, 10**6), "images in an update, of all ranks together"),
        ("seed", 0, within(0, 2**32 - 1), "the seed of all randomness"),
    ],
    "process": [
        ("schedule", "cosine", dict(choices=SCHEDULES), "the noise schedule"),
        ("T", 4000, within(2, 10**5), "the number of timesteps"),
        ("variance", "learned", dict(choices=("learned", "small", "large")), "the variance of a step, p(x_{t-1} | x_t)"),
    ],
    "network": [
        ("channels", 128, within(1, 4096), "width at the full resolution"),
        ("channel_mult", (1, 2, 2, 2), wholes, "channels of each resolution, in units of --channels"),
        ("num_res_blocks", 3, within(1, 100), "blocks at each resolution"),
        ("attention_resolutions", (16, 8), wholes, "resolutions with attention, or none; the middle always attends"),
        ("num_heads", 4, within(1, 4096), "heads of attention"),
    ],
    "training": [
        ("objective", "hybrid", dict(choices=("simple", "hybrid", "vlb")), "the loss"),
        ("t_sampler", "uniform", dict(choices=T_SAMPLERS), "which t to train on"),
        ("lr", 1e-4, share, "AdamW's learning rate"),
        ("warmup", 0, within(0, 10**9), "updates in which the learning rate rises to --lr"),
        ("ema", 0.9999, share, "final decay of the averaged weights"),
        ("grad_clip", 0.0, within(0, 1e9, float), "scale larger gradients down to this norm; 0 for never"),
        ("dropout", 0.3, within(0, 0.99, float), "the probability of dropout"),
        ("label_dropout", 0.0, share, "share of images shown without a class, for --guidance"),
        ("flip", True, SWITCH, "mirror images at random"),
        ("init", None, dict(metavar="FILE|DIR"), "weights to start a new run from"),
    ],
    "pace (may change when a run is resumed)": [
        ("steps", 500_000, whole, "updates in all"),
        ("accum", 1, whole, "parts of the batch to compute in turn, to save memory"),
        ("compile", False, SWITCH, "compile the network with torch.compile"),
        ("log_every", 100, whole, "updates between rows of log.csv"),
        ("sample_every", 10_000, within(0, 10**9), "updates between grids of samples; 0 for none"),
        ("save_every", 1_000, whole, "updates between checkpoints"),
    ],
    "bits per dimension": [
        ("eval_only", False, SWITCH, "measure --ckpt on images of --data; no training"),
        ("ckpt", None, dict(metavar="FILE|DIR"), "the checkpoint to measure (default: the one in --out)"),
        ("eval_images", 10_000, whole, "the most images to measure"),
        ("eval_steps", None, whole, "measure the process in N of its steps (default: all)"),
        ("eval_calls", 10, within(5, 10**6), "about so many network calls an image; from the number of steps on, every term is computed"),
        ("spacing", 1.0, within(1, 10, float), "spacing of --eval-steps: 1 is even, 3 is denser near t = 0"),
    ],
}  # fmt: skip
GROUPS = {title: {name for name, *_ in rows} for title, rows in FLAGS.items()}
SHAPE = GROUPS["network"] | {"image_size", "low_res"}  # fixed by the weights
PROCESS = ("schedule", "T", "variance", "time_scale")  # time_scale: other than None in OpenAI's

# What differs for other data than CIFAR-10.
DIGITS = dict(
    image_size=16, class_cond=True, label_dropout=0.1, flip=False, T=1000, channels=32,
    channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(8,), dropout=0.0, steps=1200,
    batch=64, lr=2e-3, warmup=100, ema=0.995, grad_clip=1.0, log_every=40, sample_every=400,
    save_every=200,
)  # fmt: skip
FOLDER = dict(image_size=64, dropout=0.0, steps=1_500_000)
PRESETS = {"digits": DIGITS, "cifar10": {}}


# ---- Training ----------------------------------------------------------------------------------


def train(config, state, network, device, dtype):
    """Train a network (a UNetConfig) until config.steps updates are made.

    state  the checkpoint of the run to resume, the weights to start from, or nothing: {}
    """
    # The data and the network.
    images, labels, classes = load_data(config, network if "unet" in state else None)
    network.num_classes, network.class_names = classes and len(classes), classes
    network.label_dropout = config.label_dropout
    torch.manual_seed(config.seed)
    model = UNet(network).to(device)

    # The process, and what trains the network. All that has a state goes into the checkpoint.
    process = {name: getattr(config, name) for name in PROCESS}
    diffusion = Diffusion(**process).to(device)
    few = Diffusion(**(process | few_steps(config.T, config.image_size))).to(device)  # for grids
    t_sampler = T_SAMPLERS[config.t_sampler](config.T).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    params, averages = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(params, config.lr, weight_decay=0.0, fused=True)
    fp16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if fp16 else 1.0)
    start, log = state.get("step", 0), Log(config, state, device)
    stateful = dict(model=model, ema=average, optimizer=optimizer, t_sampler=t_sampler)
    stateful |= {"scaler": scaler} if fp16 else {}
    if start >= config.steps:
        say(f"{config.out} has made {start} updates: give a larger --steps to make more")
    elif start:
        say(f"resuming {config.out} after update {start} of {config.steps}")
    if (before := state.get("images", len(images))) != len(images):
        now = f"now there are {len(images):,}"
        say(f"ATTENTION: {config.out} was trained on {before:,} images; {now}")
    for name in stateful.keys() & state.keys():
        stateful[name].load_state_dict(state.pop(name))
    about = dict(config=vars(config), unet=vars(network), diffusion=process, images=len(images))
    net = torch.compile(model) if config.compile else model
    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    ckpt, stop = os.path.join(config.out, "ckpt.pt"), catch_signals()

    for step in range(start, config.steps):
        # Learning rate and batch. All that is random follows from the seed and the step.
        lr = config.lr * min(1, (step + 1) / max(config.warmup, 1))
        optimizer.param_groups[0]["lr"] = lr
        x0, y, t, weights, noise = load_batch(config, images, labels, t_sampler, step, device)
        seed_dropout(config.seed, step)

        # Gradients, one part of the batch after the other.
        losses = []
        n = len(x0)
        for k in range(config.accum):
            part = slice(k * n // config.accum, (k + 1) * n // config.accum)
            y_part = None if y is None else y[part]
            net_part = give_low_res(net, x0[part], config.low_res)
            if WORLD > 1:  # the ranks exchange gradients only in the last part
                net.require_backward_grad_sync = part.stop == n
            with autocast(device, dtype):
                loss, vlb = diffusion.losses(
                    net_part, x0[part], t[part], y_part, noise[part], config.objective
                )
            # The mean over the whole batch, once DDP has divided by the number of ranks.
            scaler.scale(weights[part] @ loss * (WORLD / config.batch)).backward()
            losses.append(torch.stack([loss.detach(), vlb]))
        losses = torch.cat(losses, dim=1)  # (2, n): the loss and T·L_t of each image

        # The weights, their average, and which t to draw next. Unlike the paper's, the average's
        # decay rises to --ema (to 0.9999 by update 90,000), to forget the initial weights.
        norm = update_weights(params, optimizer, scaler, config.grad_clip, fp16)
        get_ema_multi_avg_fn(min(config.ema, (1 + step) / (10 + step)))(averages, params, None)
        t_sampler.update(t, losses[0])
        log.add(losses @ weights * (WORLD / config.batch), norm)

        # Now and then: a row of the log, a checkpoint, a grid of samples (in this order, so that a
        # grid that kills the run costs nothing).
        done = step + 1
        last = done == config.steps
        stopping = 0 if last else int(gather(stop).max())  # on the CPU: no wait
        if last or done % config.log_every == 0:
            log.write_row(done, lr, diffusion.prior(x0).mean())
        draws = config.sample_every and (last or done % config.sample_every == 0)
        if last or stopping or draws or done % config.save_every == 0:
            states = {name: each.state_dict() for name, each in stateful.items()} | log.state(done)
            if RANK == 0:
                save_checkpoint(ckpt, about | states)
        if RANK == 0 and draws and not stopping:
            draw_samples(config, done, average, few, images, labels, device, dtype)
        if stopping:
            gather(stop)  # the other ranks wait until rank 0 has saved
            say(f"saved {ckpt} after update {done} of {config.steps}")
            raise SystemExit(128 + stopping)
    report(ckpt)


# ---- What the loop calls -----------------------------------------------------------------------


def seed_dropout(seed, step):
    """Seed torch's global generator, from which dropout alone draws: each rank on its own."""
    torch.manual_seed(generator(seed, step * WORLD + RANK, stream="dropout").initial_seed())


def give_low_res(net, x0, size):
    """The network; if it is an upsampler, with the small images, x0 averaged down to size."""
    return partial(net, low_res=F.interpolate(x0, size, mode="area")) if size else net


def update_weights(params, optimizer, scaler, grad_clip, fp16):
    """One step of AdamW -> the norm of the gradient. If a gradient is not finite, the scaler (also
    one of scale 1) makes the optimizer skip the step, on the device: the host need not wait."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or 1e30)  # 1e30 only measures it
    scaler.step(optimizer)
    scaler.update(None if fp16 else 1.0)  # float16 alone needs a scale that adapts
    optimizer.zero_grad()
    return norm


class Log:
    """The rows of log.csv: means over the updates since the last row. bits_per_dim is from the
    losses, which do not clip x0 (--eval-only does). The sums stay on the device, so that the host
    waits for it only once a row."""

    def __init__(self, config, state, device):
        self.path, start = os.path.join(config.out, "log.csv"), state.get("step", 0)
        self.begin = time.monotonic() - state.get("seconds", 0)
        # Loss, bits/dim, norm, updates, skipped updates; and how many of those in a row.
        self.sums = state.get("sums", torch.zeros(6)).to(device)
        if RANK == 0:  # a killed run may have written rows after its last checkpoint
            rows = open(self.path).readlines()[1:] if os.path.exists(self.path) else []
            rows = [row for row in rows if re.fullmatch(r"\d+(\.\d+)?(,[^,\n]+){6}\n", row)]
            rows = [row for row in rows if float(row.split(",")[0]) <= start]
            text = "step,loss,bits_per_dim,grad_norm,lr,skipped,seconds\n" + "".join(rows)
            write(self.path, lambda file: file.write(text.encode()))
        self.bar = tqdm(total=config.steps, initial=start, unit=" updates", disable=not TTY or RANK)

    def add(self, means, norm):
        """Count an update: its mean loss and bits/dim (2,), and the norm of its gradient."""
        taken = norm.isfinite().float()
        values = torch.stack([*means, norm]).nan_to_num(0, 0, 0) * taken
        self.sums[:5] += torch.stack([*values, taken, 1 - taken])
        self.sums[5] = (self.sums[5] + 1) * (1 - taken)
        self.bar.update()

    def write_row(self, step, lr, prior):
        """Write the means since the last row; prior is the L_T that completes the bound. Raises
        ValueError after 100 skipped updates in a row."""
        loss, bits, norm, taken, skipped, in_a_row = gather(self.sums[None]).mean(0).tolist()
        loss, bits, norm = (value / max(taken, 1) for value in (loss, bits, norm))
        bits, seconds = bits + prior.item(), time.monotonic() - self.begin
        left = tqdm.format_interval(seconds / step * (self.bar.total - step))
        self.sums[:5].zero_()
        if RANK == 0:
            row = f"{step},{loss:.6g},{bits:.6g},{norm:.6g},{lr:.6g},{skipped:.0f},{seconds:.1f}\n"
            with open(self.path, "a") as file:
                file.write(row)
        say(f"step {step}: loss {loss:.4f}, {bits:.3f} bits/dim, {seconds:.0f} s, {left} left")
        if in_a_row >= 100:
            found = f"no finite gradient in the last {in_a_row:.0f} updates"
            raise ValueError(f"{found}: try a lower --lr, with another --out")

    def state(self, step):
        """What a checkpoint holds of the log. All ranks must call."""
        sums = gather(self.sums[None]).mean(0)
        return dict(step=step, sums=sums, seconds=time.monotonic() - self.begin)


def catch_signals():
    """-> a tensor that becomes the number of the first signal to stop; the second stops at once."""
    stop, first = torch.zeros(1, dtype=torch.int64), []

    def handle(number, frame):
        if not first:
            first.append(time.monotonic())
            stop.fill_(number)
            say("stopping after this update; send the signal again to stop at once")
        elif time.monotonic() > first[0] + 1:  # sooner, torchrun passes on the same Ctrl-C
            raise SystemExit(128 + number)

    on_stop(handle)
    return stop


def draw_samples(config, step, average, diffusion, images, labels, device, dtype):
    """Write a grid of samples. For an upsampler, each stands between its small image and the true
    one. They are drawn in parts of the size that training uses. A failure does not end the run."""
    path = os.path.join(config.out, "samples", f"{step:07}.png")
    say(f"drawing {path}")
    n, columns = (16, 12) if config.low_res else (64, 8)
    tiles = []
    try:
        for part in torch.arange(n).split(config.batch // WORLD // config.accum):
            x0, y = to_device(images, labels, part.numpy() % len(images), device)
            if y is not None and not config.low_res:
                y = part.to(device) % average.config.num_classes
            generators = [generator(config.seed, i, device) for i in part.tolist()]
            noise = randn(x0.shape[1:], generators)
            net = give_low_res(average, x0, config.low_res)
            with autocast(device, dtype):
                x = diffusion.sample(net, noise, y, **FEW_STEPS_SAMPLER, generators=generators)
            if config.low_res:
                small = F.interpolate(x0, config.low_res, mode="area")
                small = F.interpolate(small, config.image_size)
                x = torch.stack([small, x, x0], dim=1).flatten(0, 1)
            tiles.append(to_pixels(x))
        grid = draw_grid(torch.cat(tiles), columns)
        write(path, partial(grid.save, format="png"))
    except (OSError, RuntimeError, MemoryError) as error:
        say(f"no grid of samples at step {step}: {first_line(error)}")


# ---- Data --------------------------------------------------------------------------------------


def load_batch(config, images, labels, t_sampler, step, device):
    """This rank's part of the batch of a step -> x0, y, t, weights, noise.

    Each rank draws the randomness of the whole batch anew from (seed, step): neither the number of
    ranks nor a restart changes the flip, t and noise of an image of the batch.
    """
    B, N = config.batch, len(images)
    mine = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD)
    places = range(step * B, step * B + B)[mine]  # in the endless sequence of epochs
    rows = np.array([epoch_order(config.seed, p // N, N)[p % N] for p in places])
    g = generator(config.seed, step, device)
    t, weights = t_sampler.sample(B, g)
    noise = torch.randn(B, *images.shape[1:], generator=g, device=device)[mine]
    flip = torch.rand(B, 1, 1, 1, generator=g, device=device)[mine] < 0.5 * config.flip
    drop = torch.rand(B, generator=g, device=device)[mine] < config.label_dropout
    x0, y = to_device(images, labels, rows, device)
    y = None if y is None else torch.where(drop, -1, y)  # -1: no class
    return torch.where(flip, x0.flip(3), x0), y, t[mine], weights[mine], noise


@lru_cache(2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, epoch, stream="order")).numpy()


def to_device(images, labels, rows, device):
    """The images of some rows, as float32 in [-1, 1], and their labels or None."""

    def move(array):
        tensor = torch.from_numpy(np.asarray(array))
        if device.type == "cuda":  # from pinned memory, the host need not wait for the device
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return move(images[rows]).float() / 127.5 - 1, None if labels is None else move(labels[rows])


def load_data(config, network=None, held_out=False):
    """-> uint8 images (N, 3, S, S), int64 labels (N,) or None, the names of class 0, 1, … or None.

    Says what was found and what was left out. The classes are those of `network`, the UNetConfig of
    a trained network, if it is given. Raises ValueError if the data do not fit.
    """
    size, notes, labels = config.image_size, "", None
    if config.data == "digits":
        seed = config.seed + (2**32 if held_out else 0)  # no run has the seed of held-out digits
        images, names = draw_digits(20_000, size, seed)
    elif config.data == "cifar10":
        images, names = load_cifar10(held_out)
    elif config.data.lower().endswith(".npz"):
        images, names = load_npz(config.data)
        notes = "; the labels are for --class-cond" if names and not config.class_cond else ""
    else:
        images, names, notes = load_folder(config.data, size, config)
    if images.shape[2:] != (size, size):
        found = f"--data {config.data} has {images.shape[-1]} pixels a side"
        raise ValueError(f"{found}, and --image-size is {size}")
    found, classes = f"{len(images):,} images", None
    if config.class_cond:
        if names is None:
            raise ValueError(f"--class-cond: {config.data} has no labels")
        names = [printable(name) for name in names]
        present = set(names)
        classes = number_classes(present, network, config.data)
        number = {name: k for k, name in enumerate(classes)}
        labels = np.array([number[name] for name in names])
        found += f" in {len(present)} classes: {some([f'{c} ({k})' for c, k in number.items()])}"
        if absent := [name for name in classes if name not in present]:
            found += f"; no images of {some(absent)}"
    say(found + notes)
    agree(len(images), f"images in {config.data}: wait until it is complete, then start again")
    return images, labels, classes


def number_classes(found, network, data):
    """The names of class 0, 1, …: the network's, or those found, in natural order (2 before 10)."""
    if network is None:
        return tuple(sorted(found, key=natural))
    # OpenAI's files and our older ones hold no class names: their classes are numbered in plain
    # order. In an .npz file without names, the labels are such numbers already.
    known, numbers = network.num_classes, tuple(map(str, range(network.num_classes)))
    numbered = data.lower().endswith(".npz") and found <= set(numbers)
    names = network.class_names or (numbers if numbered else tuple(sorted(found)))
    if len(names) != known:
        raise ValueError(f"--data {data} has {len(names)} classes, the network has {known}")
    if unknown := sorted(found - set(names)):
        raise ValueError(f"--data {data} has a class {unknown[0]}; the network's are {some(names)}")
    return names


def natural(name):
    """A key for sorting by the numbers in names: text and numbers take turns."""
    parts = enumerate(re.split("([0-9]+)", name))
    return [int(part) if k % 2 else part for k, part in parts], name


@lru_cache(2**16)
def printable(name):
    """A file's name in one line: characters that cannot be printed are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def draw_digits(n, size, seed):
    """n pictures of a digit, at least half as high as the image, in any place, on any colour."""
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size=height * 1.4) for height in range(size // 2, size - 2)]
    images, digits = np.empty((n, size, size, 3), np.uint8), rng.integers(10, size=n).astype(str)
    for i, digit in enumerate(digits):
        paper = rng.integers(256, size=3)
        ink = "white" if paper @ [0.299, 0.587, 0.114] < 128 else "black"
        image = Image.new("RGB", (size, size), tuple(paper.tolist()))
        font = fonts[rng.integers(len(fonts))]
        left, top, right, bottom = font.getbbox(digit)
        x, y = rng.integers((0, 0), (size + 1 - right + left, size + 1 - bottom + top))
        ImageDraw.Draw(image).text((x - left, y - top), digit, ink, font)
        images[i] = image
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), digits.tolist()


def load_cifar10(held_out):
    """The training or the test images of CIFAR-10, and the name of the class of each."""
    from torchvision.datasets import CIFAR10  # here, as this import takes longer than torch's

    try:
        with one_rank_first(), contextlib.redirect_stdout(sys.stderr):
            data = CIFAR10("data", train=not held_out, download=True)
    except (OSError, RuntimeError) as error:
        file = f"cifar-10-python.tar.gz, from {CIFAR10.url},"
        raise OSError(f"no CIFAR-10 ({error}): put {file} into data/") from error
    return data.data.transpose(0, 3, 1, 2), [data.classes[k] for k in data.targets]


def load_folder(root, size, config):
    """All images below root -> memory-mapped (N, 3, size, size), the class of each, notes. They are
    decoded once, into data/cache, and again if a file was added, removed or changed."""
    os.makedirs("data/cache", exist_ok=True)
    ours = ["data/cache", config.out, os.path.join(config.out, "samples")]
    listing, folders, left_out, others = list_images(root, leave_out=ours)
    paths = [path for path, *_ in listing]
    if config.class_cond and (loose := [path for path in paths if os.sep not in path]):
        raise ValueError(f"{loose[0]} in {root} is in no subfolder and so has no class")
    key = hashlib.sha256(repr((os.path.realpath(root), size, listing)).encode()).hexdigest()[:16]
    cache = f"data/cache/{os.path.basename(os.path.abspath(root))[:40]}-{size}-{key}"
    with one_rank_first(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that costs no pixel
        good, broken = decode(root, size, paths, cache)
    notes = ""
    if bad := sorted((left_out | broken).items()):
        named = some([f"{printable(path)} ({why})" for path, why in bad], 5)
        notes += f"; {len(bad)} left out: {named}"
    if others:
        notes += f"; {len(others)} not looked at ({some(sorted(set(others)), 5)})"
    names = [path.split(os.sep)[0] for path in good]
    if config.class_cond and (empty := sorted(folders - set(names) - set(left_out))):
        notes += f"; no images in {some([printable(name) for name in empty])}"
    if not good:
        raise ValueError(f"--data {root}: no readable image there{notes}")
    images = np.memmap(f"{cache}.u8", np.uint8, "r", shape=(len(good), 3, size, size))
    return images, names, notes


def decode(root, size, paths, cache):
    """Decode images into the file cache.u8 -> the paths that were read, {path: reason} of others.

    cache.npy lists the paths. If both are there, only what could not be read is tried again.
    """
    read = partial(read_image, root, size)
    with contextlib.suppress(OSError, ValueError, EOFError):
        good = np.load(f"{cache}.npy").tolist()
        broken = {path: read(path) for path in sorted(set(paths) - set(good))}
        complete = good and os.path.getsize(f"{cache}.u8") == len(good) * 3 * size * size
        if complete and all(isinstance(reason, str) for reason in broken.values()):
            return good, broken
    good, broken = [], {}
    with tempfile.TemporaryDirectory(dir="data/cache", suffix=".tmp") as work:
        with open(f"{work}/images", "wb") as file, ThreadPool() as pool:
            bar = progress_bar(pool.imap(read, paths), f"reading {root}", len(paths))
            for path, image in zip(paths, bar):
                if isinstance(image, str):
                    broken[path] = image
                else:
                    file.write(image.tobytes())
                    good.append(path)
            file.flush()
            os.fsync(file.fileno())
        np.save(f"{work}/paths.npy", good)
        with contextlib.suppress(FileNotFoundError):  # else a kill may leave a wrong list
            os.remove(f"{cache}.npy")
        os.replace(f"{work}/images", f"{cache}.u8")
        os.replace(f"{work}/paths.npy", f"{cache}.npy")
    return good, broken


def list_images(root, leave_out):
    """What lies below root, links followed -> [(path, size, times)] of the images, the folders in
    root, {path: reason} of what was left out, the suffixes of files that Pillow does not open.

    Not entered are hidden names, the folders in leave_out, other runs, links that lead back to a
    folder which contains them, and any folder of a class for a second time.
    """
    suffixes = {s for s, name in Image.registered_extensions().items() if name in Image.OPEN}
    suffixes.add(".mpo")  # which Pillow opens as a JPEG
    listing, left_out, others, entered = [], {}, [], set()
    leave_out = {os.path.realpath(path) for path in leave_out}
    outer = os.path.join(os.path.realpath(root), "")

    def enter(inside):
        real = os.path.realpath(os.path.join(root, inside))
        place = inside.split(os.sep)[0], real  # two classes may link to one folder
        leads_back = inside and outer.startswith(os.path.join(real, ""))
        if leads_back or place in entered or (inside and real in leave_out):
            return
        entered.add(place)
        if inside and os.path.exists(os.path.join(real, "ckpt.pt")):
            left_out[inside] = "a run"
            return
        for entry in os.scandir(os.path.join(root, inside)):
            path = os.path.join(inside, entry.name)
            if entry.name[0] == ".":
                continue
            try:
                info, suffix = entry.stat(), os.path.splitext(path)[1].lower()
                if entry.is_dir():
                    enter(path)
                elif suffix not in suffixes:
                    others.append(printable(suffix) or "no suffix")
                elif entry.is_file():
                    listing.append((path, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
                else:
                    left_out[path] = "not a regular file"
            except OSError as error:
                left_out[path] = error.strerror

    enter("")
    return sorted(listing), {name for name, _ in entered if name}, left_out, others


def read_image(root, size, path):
    """The centre square of an image file as uint8 (3, size, size), or why there is none: a str."""
    path = os.path.join(root, path)
    try:
        image = ImageOps.fit(read_picture(path, size), (size, size), Image.Resampling.BICUBIC)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")
    return np.asarray(image).transpose(2, 0, 1)


# ---- Bits per dimension ------------------------------------------------------------------------


def evaluate(config, model, device, dtype):
    """Print a network's bound on the images of --data, and write the mean of each L_t.

    Of digits and cifar10, these are images that no run trains on. The ranks share the images.
    Unless every term is computed, two independent estimates of each image's bound are made: their
    difference shows the error due to the timesteps and the noise.
    """
    process = {name: getattr(config, name) for name in PROCESS}
    diffusion = Diffusion(**process, steps=config.eval_steps, spacing=config.spacing).to(device)
    agree(checksum(model), f"weights in {config.ckpt}: the file has changed, start again")
    images, labels, _ = load_data(config, model.config, held_out=True)
    rows = epoch_order(config.seed, 0, len(images))[: config.eval_images]
    n, mine = len(rows), rows[RANK::WORLD]
    model.to(device)
    torch.manual_seed(generator(config.seed, RANK).initial_seed())  # each rank has its own noise
    exact = config.eval_calls >= diffusion.num_steps
    if not exact:  # two estimates of 1 + calls, and a pilot of about one call for each image
        calls, points = (config.eval_calls - 3) // 2, 32
        pilots = rows[: min(max(1, n // WORLD // points), config.batch)]
        x0, y = to_device(images, labels, pilots, device)
        with autocast(device, dtype):  # p is how often to draw each t
            p = diffusion.pilot(give_low_res(model, x0, config.low_res), x0, y, points)

    # For each image the bound, half the difference of the estimates, and the prior. For each t the
    # sum of all L_t, and their number.
    bounds, sums = [torch.zeros(0, 3)], torch.zeros(2, diffusion.num_steps).double()
    bar = progress_bar(range(0, len(mine), config.batch), "bits/dim")
    for start in bar:
        x0, y = to_device(images, labels, mine[start : start + config.batch], device)
        net = give_low_res(model, x0, config.low_res)
        with autocast(device, dtype):
            if exact:
                terms, prior = diffusion.bits_per_dim(net, x0, y, progress=TTY and RANK == 0)
                total = other = terms.sum(1) + prior
            else:
                total, terms, prior = diffusion.estimate_bits_per_dim(net, x0, p, calls, y)
                other, more, _ = diffusion.estimate_bits_per_dim(net, x0, p, calls, y)
                terms = torch.cat([terms, more])
        bounds.append(torch.stack([(total + other) / 2, (total - other) / 2, prior], 1).cpu())
        sums += torch.stack([terms.nansum(0), (~terms.isnan()).sum(0)]).cpu()
        bar.set_postfix_str(f"{torch.cat(bounds)[:, 0].mean():.3f}", refresh=False)
    bound, half, prior = gather(torch.cat(bounds).double()).unbind(1)
    sums, draws = gather(sums[None]).sum(0)

    # The mean bound and its standard errors, its parts, and a file of its terms.
    errors = "every term computed" if exact else f"± {half.norm() / n:.4f} (timesteps and noise)"
    if n > 1:
        errors += f", ± {bound.std() / n**0.5:.4f} (including the choice of images)"
    else:
        errors += ", one image gives no error for the choice of images"
    report(f"bits/dim {bound.mean():.4f} on {n} images, {errors}")
    L_t = sums / draws
    kls = (bound - prior).mean() - L_t[0]
    report(f"L_0 {L_t[0]:.4f}, KLs {kls:.4f}, L_T {prior.mean():.6f}")
    t = draws.nonzero().flatten()
    table, head = torch.stack([t, L_t[t], draws[t]], 1).numpy(), "t,bits_per_dim,draws"
    run = config.ckpt if os.path.isdir(config.ckpt) else os.path.dirname(config.ckpt)
    path = os.path.join(run, "terms.csv")
    try:
        if RANK == 0:
            write(path, partial(np.savetxt, X=table, fmt="%d,%.6g,%d", header=head, comments=""))
        say(f"wrote {path}")
    except OSError as error:  # beside a checkpoint that others own, say
        say(str(error))


# ---- From the command line to the run ----------------------------------------------------------

MEASURE = GROUPS["bits per dimension"]
PACE = GROUPS["pace (may change when a run is resumed)"]
MAY_CHANGE = MEASURE | PACE | GROUPS["where (may change when a run is resumed)"]
NOT_MEASURED = PACE | GROUPS["training"]  # what --eval-only has no use for
OLDER = dict(label_dropout=0.0, low_res=None)  # of runs that are older than these flags
# channel_mult of a folder's image size; 64 is the paper's ImageNet-64 network.
MULTS = {16: (1, 2, 2), 32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4),
         256: (1, 1, 2, 2, 4, 4)}  # fmt: skip


def configure(argv):
    """-> the configuration (a Namespace), the dict of the checkpoint to start from or {}, and the
    network of --ckpt or --init, or None. Raises ValueError for flags that contradict each other or
    the run."""
    usage = "[torchrun] train.py [--data digits|cifar10|DIR|X.npz] [flags]"
    given, preset = parse_flags(usage, FLAGS, argv, preset_of)
    name = os.path.basename(os.path.abspath(given.get("data", "digits"))).removesuffix(".npz")
    out = given.get("out", os.path.join("runs", name))
    ckpt = os.path.join(out, "ckpt.pt")

    # run: values that the run to resume, or a checkpoint, stores. fixed: those no flag may change.
    run, fixed, state, model = {}, set(), {}, None
    source = given.get("ckpt", ckpt) if given.get("eval_only") else given.get("init")
    if os.path.exists(ckpt) and not given.get("eval_only"):
        state = read_checkpoint(ckpt)
        if not isinstance(state.get("config"), dict):
            raise ValueError(f"{ckpt} holds weights, but no run to resume: take another --out")
        run, fixed = OLDER | state["config"], preset.keys() - MAY_CHANGE
        whose, data, old = f"the run in {out}", given.get("data", run["data"]), run["data"]
        if where(data) != where(old):
            if "out" not in given and (old in PRESETS or os.path.exists(old)):
                raise ValueError(f"--data {data}, but {whose} has {old}: give another --out")
            say(f"{whose} had the data {old}; now it has {data}")
    elif source:
        plain = {name: given.get(name) for name in ("schedule", "T", "num_heads")}
        model, process = load_checkpoint(source, **plain)
        run = process | {name: getattr(model.config, name) for name in SHAPE}
        run["class_cond"] = model.config.num_classes is not None
        fixed, whose = SHAPE | {"class_cond"}, source
        if given.get("eval_only"):
            stored = read_checkpoint(source)
            if "data" not in given and "format" not in stored:
                raise ValueError(f"{source} does not say its data: give --data")
            run["data"] = stored.get("config", {}).get("data", "digits")
            if "data" not in given and run["data"] not in PRESETS:
                say(f"measuring on the training images, {run['data']}: give --data to use others")
        else:
            values = model.state_dict()
            state = dict(unet=vars(model.config), model=values, ema=values)

    for name in sorted(given.keys() & fixed):
        if given[name] != (held := run.get(name, preset[name])):
            wrong = f"{flag(name)} {spelt(given[name])}: {whose} has {spelt(held)}"
            raise ValueError(f"{wrong}; leave the flag out, or give another --out or checkpoint")
    run |= {"ckpt": ckpt, "out": out}  # where the run is, not where it was
    config = Namespace(**(preset | {"time_scale": None} | run | given))
    config.label_dropout *= config.class_cond
    if model and config.variance == "learned" and model.config.out_channels == 3:
        raise ValueError(f"--variance learned: {whose} predicts no variance")
    check(config, given)
    return config, state, model


def where(data):
    """What tells one --data from another: a folder is the same however its path is written."""
    return data if data in PRESETS else os.path.realpath(data)


def preset_of(given):
    """The values that --data sets instead of the paper's. Adds a slash to a folder in `given`."""
    data = given.get("data", "digits")
    preset = PRESETS.get(data, FOLDER)
    size = preset.get("image_size", 32)
    if data.lower().endswith(".npz"):
        size = load_npz(data)[0].shape[-1]
    elif data not in PRESETS:
        given["data"] = os.path.join(os.path.normpath(data), "")  # ./cifar10 is not the data set
    size = given.get("image_size", size)
    mult = given.get("channel_mult", preset.get("channel_mult", MULTS.get(size, MULTS[64])))
    sizes = [size >> level for level in range(len(mult))]
    usual = [side for side in preset.get("attention_resolutions", (16, 8)) if side in sizes]
    attention = tuple(usual or [side for side in sizes if 8 <= side <= 16])
    return preset | dict(image_size=size, channel_mult=mult, attention_resolutions=attention)


def check(config, given):
    """Refuse flags that contradict each other, and say which have no effect, before images are
    drawn or decoded."""
    if not config.eval_only and (unused := given.keys() & MEASURE - {"eval_only"}):
        raise ValueError(f"{flag(min(unused))} is for --eval-only")
    if config.eval_only and (unused := sorted(given.keys() & NOT_MEASURED)):
        say(f"--eval-only has no use for {', '.join(map(flag, unused))}")
    if config.eval_steps and config.eval_steps > config.T:
        raise ValueError(f"--eval-steps {config.eval_steps}: the process has T = {config.T}")
    if config.data == "cifar10" and config.image_size != 32:
        raise ValueError(f"cifar10 has 32 pixels a side, not --image-size {config.image_size}")
    if config.objective == "hybrid" and config.variance != "learned" and not config.eval_only:
        needs = f"--variance {config.variance} needs --objective simple or vlb"
        raise ValueError(f"--objective hybrid, the default, trains a variance: {needs}")
    if config.batch < WORLD * config.accum and not config.eval_only:
        raise ValueError(f"--batch {config.batch} is below --accum {config.accum} × {WORLD} ranks")
    if config.objective == "simple" and config.variance == "learned" and not config.eval_only:
        say("--objective simple trains no variance: take --variance large or small")
    if given.get("label_dropout") and not config.class_cond:
        raise ValueError("--label-dropout needs --class-cond")


def shape_network(config, state, device):
    """The UNetConfig of a run. Raises ValueError for a wrong shape, before any image is read."""
    shape = {name: getattr(config, name) for name in SHAPE}
    shape["out_channels"] = 6 if config.variance == "learned" else 3
    network = UNetConfig(**(shape | state.get("unet", {}) | {"dropout": config.dropout}))
    with torch.device("meta"):
        millions = sum(p.numel() for p in UNet(network).parameters()) / 1e6
    if device.type == "cpu" and millions > 20:
        say(f"{millions:.0f}M parameters on a CPU take days: README.md has flags for a laptop")
    return network


def main():
    config, state, model = configure(sys.argv[1:])
    if config.data not in PRESETS and not os.path.exists(config.data):
        data = os.path.normpath(config.data)
        raise ValueError(f"--data {data} is not a folder, an .npz file, digits or cifar10")
    if config.eval_only and config.dtype == "auto":
        config.dtype = "fp32"  # bf16 biases bits/dim by about 0.02
    unused = (NOT_MEASURED | {"out"} if config.eval_only else MEASURE) | {"eval_only"}
    values = {name: value for name, value in vars(config).items() if name not in unused}
    say(" ".join(f"{name}={value}" for name, value in values.items() if value is not None))
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    # Resuming to the bit is claimed for CPUs alone; elsewhere the fastest algorithms are taken.
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if config.eval_only:
        return evaluate(config, model, device, dtype)
    network = shape_network(config, state, device)
    os.makedirs(os.path.join(config.out, "samples"), exist_ok=True)
    start = state.get("step", 0)
    agree(start, "checkpoints: nodes must share --out")
    with open(os.path.join(config.out, ".lock"), "w") as file:
        if RANK == 0:
            lock(file, config.out)
        train(config, state, network, device, dtype)


def lock(file, out):
    """Refuse to write where another run does. Where nothing can be locked, say so and go on."""
    try:
        import fcntl  # which Windows does not have

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {out}: take another --out") from error
    except (OSError, ImportError) as error:
        say(f"{file.name} cannot be locked ({error}): do not start a second run there")


if __name__ == "__main__":
    run_script(main)
