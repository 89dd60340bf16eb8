"""Train Improved DDPM, or measure its bits per dimension.

    python train.py                                      drawn digits, a few minutes on a laptop
    torchrun train.py --data cifar10                     the paper's CIFAR-10 run on one GPU
    torchrun --nproc-per-node 8 train.py --data cifar10  the same run on eight
    python train.py --data DIR --image-size 64           your own folder of images
    python train.py --eval-only --data DIR --ckpt FILE   bits/dim of a checkpoint on held-out images

The same command again goes on from the last checkpoint, on any number of processes.
"""

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from functools import lru_cache
from multiprocessing.pool import ThreadPool

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # for log_ndtr
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for resuming to the bit

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchvision.datasets import CIFAR10
from torchvision.utils import save_image
from tqdm import tqdm

from diffusion import Diffusion, estimate_error, generator
from model import (
    UNet, UNetConfig, load_checkpoint, pick_device, read_checkpoint, save_checkpoint,
)  # fmt: skip
from sampler import T_SAMPLERS, gather

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TTY = sys.stderr.isatty()


def say(message):
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)


def fail(message, status=1):
    say(f"train.py: error: {message}")
    raise SystemExit(status)


# ---- The command line --------------------------------------------------------------------------

# The flags' own defaults are the paper's CIFAR-10 run. What other data change:
DIGITS = dict(
    image_size=16, class_cond=True, flip=False, T=1000, channels=32, channel_mult=(1, 2, 2),
    num_res_blocks=1, attention=(8,), dropout=0.0, steps=1200, batch=64, lr=1e-3, warmup=100,
    ema=0.995, log_every=20, sample_every=400, save_every=200,
)  # fmt: skip
FOLDER = dict(image_size=64, dropout=0.0, steps=1_500_000)
MULTS = {16: (1, 2, 2), 32: (1, 2, 2, 2), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
NETWORK = "image_size channels channel_mult num_res_blocks num_heads dropout".split()
# What may differ when a run goes on: where, how long and how fast it computes, not what.
FREE = "steps accum device dtype compile log_every sample_every save_every out init".split()
# Numbers are at least 1 if whole, 0 … 1 if not, but for these.
LIMITS = dict(T=(2, 10**5), seed=(0, 2**32 - 1), warmup=(0, 10**9), grad_clip=(0, 1e9),
              dropout=(0, 0.99), eval_calls=(4, 10**6))  # fmt: skip


def integers(text):
    return tuple(int(part) for part in text.split(",") if part != "none")


def parse(argv):
    """-> the defaults for the --data in argv, and the flags that argv gives: two dicts."""
    flags = argparse.ArgumentParser(
        usage="[torchrun] train.py [--data digits|cifar10|DIR] [flags]", add_help=False,
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, 2, 26, 100),
    )  # fmt: skip
    flags.error = lambda message: fail(message, 2)
    switch = argparse.BooleanOptionalAction
    add = flags.add_argument_group("data").add_argument
    add("--data", default="digits", metavar="WHAT", help="digits, cifar10 or a folder of images")
    add("--image-size", type=int, default=32, metavar="N", help="pixels a side, for a folder")
    add("--class-cond", action=switch, default=False, help="classes: a folder's subfolders")
    add("--flip", action=switch, default=True, help="mirror images at random")
    add = flags.add_argument_group("process").add_argument
    add("--objective", choices=["simple", "hybrid", "vlb"], default="hybrid", help="loss")
    add("--schedule", choices=["cosine", "linear"], default="cosine", help="of the noise")
    add("--T", type=int, default=4000, metavar="N", help="timesteps")
    add("--variance", choices=["learned", "small", "large"], default="learned", help="of p")
    add("--t-sampler", choices=list(T_SAMPLERS), default="uniform", help="which t to train on")
    add = flags.add_argument_group("network").add_argument
    add("--channels", type=int, default=128, metavar="N", help="width at the full resolution")
    add("--channel-mult", type=integers, default=(1, 2, 2, 2), metavar="N,N", help="× --channels")
    add("--num-res-blocks", type=int, default=3, metavar="N", help="blocks at each resolution")
    add("--attention", type=integers, default=(16, 8), metavar="N,N", help="resolutions, or none")
    add("--num-heads", type=int, default=4, metavar="N", help="heads of attention")
    add("--dropout", type=float, default=0.3, metavar="P", help="probability")
    add = flags.add_argument_group("training").add_argument
    add("--out", metavar="DIR", help="run directory (runs/ and the name of the data)")
    add("--steps", type=int, default=500_000, metavar="N", help="updates in all")
    add("--batch", type=int, default=128, metavar="N", help="images an update, of all processes")
    add("--accum", type=int, default=1, metavar="N", help="parts a process computes its share in")
    add("--lr", type=float, default=1e-4, metavar="X", help="AdamW's learning rate")
    add("--warmup", type=int, default=0, metavar="N", help="updates until it is reached")
    add("--ema", type=float, default=0.9999, metavar="X", help="decay of the averaged weights")
    add("--grad-clip", type=float, default=0.0, metavar="X", help="largest norm, 0: any")
    add("--seed", type=int, default=0, metavar="N", help="of all randomness")
    add("--init", metavar="FILE", help="checkpoint whose weights to start from")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of matrix products")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--log-every", type=int, default=100, metavar="N", help="updates a row of log.csv")
    add("--sample-every", type=int, default=10_000, metavar="N", help="updates a grid of samples")
    add("--save-every", type=int, default=1_000, metavar="N", help="updates a checkpoint")
    add = flags.add_argument_group("bits per dimension").add_argument
    add("--eval-only", action="store_true", help="measure --ckpt on images of --data")
    add("--ckpt", metavar="FILE", help="what to measure (ckpt.pt in --out)")
    add("--eval-images", type=int, default=10_000, metavar="N", help="images at most")
    add("--eval-steps", type=int, metavar="N", help="steps of the process to measure (T)")
    add("--eval-calls", type=int, default=10, metavar="N", help="network calls an image, T: exact")
    add("-h", "--help", action="store_true", help="print this, for the --data given")

    unset = argparse.Namespace(**dict.fromkeys(vars(flags.parse_args([]))))
    given = {k: v for k, v in vars(flags.parse_args(argv, unset)).items() if v is not None}
    if given.get("data", "digits") == "digits":
        flags.set_defaults(**DIGITS)
    elif given["data"] != "cifar10":
        mult = MULTS.get(given.get("image_size"), (1, 2, 3, 4))
        flags.set_defaults(**FOLDER, channel_mult=mult)
    if "help" in given:
        flags.print_help()
        raise SystemExit
    for name, values in given.items():
        for value in values if isinstance(values, tuple) else (values,):
            low, high = LIMITS.get(name, (0, 1) if isinstance(value, float) else (1, 10**9))
            if type(value) in (int, float) and not low <= value <= high:
                fail(f"--{name.replace('_', '-')} must be {low} … {high}, not {value}", 2)
    defaults = vars(flags.parse_args([]))
    del defaults["help"]
    return defaults, given


def configure(argv):
    """-> the configuration (a Namespace), and the checkpoint to go on from, or None."""
    defaults, given = parse(argv)
    name, state = os.path.basename(os.path.abspath(given.get("data", "digits"))), None
    out = given.setdefault("out", os.path.join("runs", name))
    path = os.path.join(out, "ckpt.pt")
    if "eval_only" in given:
        return argparse.Namespace(**defaults | {"ckpt": path} | given), None
    if "ckpt" in given:
        fail("--ckpt is for --eval-only: training goes on in --out, or starts from --init", 2)
    if os.path.exists(path):
        state = read_checkpoint(path)
        if "config" not in state:
            fail(f"{path} holds weights, but no run to go on with: take another --out")
        defaults |= state["config"]
        for name in given.keys() - FREE:
            if given[name] != defaults[name]:
                fail(f"--{name.replace('_', '-')} {given[name]}: the run in {out} has"
                     f" {defaults[name]}; leave it out, or take another --out", 2)  # fmt: skip
    elif "init" in given:
        net = dataclasses.asdict(load_checkpoint(given["init"])[0].config)
        defaults |= {name: net[name] for name in NETWORK}
        defaults["attention"] = net["attention_resolutions"]
    return argparse.Namespace(**defaults | given), state


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
        corner = rng.integers((0, 0), (size + 1 - right + left, size + 1 - bottom + top))
        place = (corner[0] - left, corner[1] - top)
        ImageDraw.Draw(image).text(place, digit, tuple(ink.tolist()), font)
        images[i] = image
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def read_image(path, size):
    """The centre square of an image file as uint8 (3, size, size), or None if it is broken."""
    try:
        with Image.open(path) as image:
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


def list_images(root):
    """Sorted paths, relative to root, of the image files below it; links are followed once."""
    paths, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        files = (f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        paths += [os.path.relpath(os.path.join(folder, file), root) for file in files]
    return sorted(paths)


@contextlib.contextmanager
def one_at_a_time(path):
    """Processes of this machine that name the same path wait for each other."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load_folder(root, size):
    """All images below root -> memory-mapped (N, 3, size, size), and their paths.

    The first process decodes them into data/cache, anew if a file was added, removed or changed.
    """
    paths = list_images(root)
    files = [os.lstat(os.path.join(root, path)) for path in paths]
    listing = [(path, file.st_size, file.st_mtime_ns) for path, file in zip(paths, files)]
    key = hashlib.sha256(json.dumps([listing, size]).encode()).hexdigest()[:12]
    cache = f"data/cache/{os.path.basename(os.path.abspath(root))}-{size}-{key}"
    with one_at_a_time(cache):
        if not os.path.exists(cache):
            shutil.rmtree(cache + ".tmp", ignore_errors=True)  # left by a process that was killed
            os.mkdir(cache + ".tmp")
            good = []
            with open(f"{cache}.tmp/images.u8", "wb") as file, ThreadPool(os.cpu_count()) as pool:
                decode = pool.imap(lambda path: read_image(os.path.join(root, path), size), paths)
                bar = tqdm(decode, f"reading {root}", len(paths), unit=" images", disable=not TTY)
                for path, image in zip(paths, bar):
                    if image is not None:
                        file.write(image.tobytes())
                        good.append(path)
            if broken := sorted(set(paths) - set(good)):
                some = ", ".join(broken[:5]) + ", …" * (len(broken) > 5)
                say(f"left out {len(broken)} of {len(paths)} images, which are broken: {some}")
            with open(f"{cache}.tmp/paths.json", "w") as file:
                json.dump(good, file)
            os.rename(cache + ".tmp", cache)
    with open(f"{cache}/paths.json") as file:
        paths = json.load(file)
    if not paths:
        fail(f"--data {root}: no readable image there ({' '.join(SUFFIXES)})")
    return np.memmap(f"{cache}/images.u8", np.uint8, "r", shape=(len(paths), 3, size, size)), paths


def load_data(config, held_out=False):
    """-> images (N, 3, S, S) uint8, labels (N,) int64 or None, number of classes or None."""
    classes = 10
    if config.data == "digits":
        images, labels = draw_digits(20_000, config.image_size, config.seed + 2**32 * held_out)
    elif config.data == "cifar10":
        try:
            with one_at_a_time("data/cifar10"), contextlib.redirect_stdout(sys.stderr):
                data = CIFAR10("data", train=not held_out, download=True)
        except (OSError, RuntimeError) as error:
            fail(f"cannot download CIFAR-10 ({error}); put cifar-10-python.tar.gz into data/")
        images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
        labels = np.array(data.targets)
    elif os.path.isdir(config.data):
        images, paths = load_folder(config.data, config.image_size)
        folders = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        names, labels = np.unique(folders, return_inverse=True)
        if config.class_cond and not names[0]:
            fail(f"--class-cond: {paths[labels.argmin()]} in {config.data} is in no subfolder")
        classes = len(names)
    else:
        fail(f"--data {config.data}: neither digits, nor cifar10, nor a folder", 2)
    return images, *((labels, classes) if config.class_cond else (None, None))


@lru_cache(2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, 2**31 + epoch)).numpy()


def to_x0(images, device):
    """uint8 -> float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(images)).to(device).float() / 127.5 - 1


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
    x0 = to_x0(images[rows], device)
    y = None if labels is None else torch.from_numpy(labels[rows]).to(device)
    return torch.where(flip, x0.flip(3), x0), y, t[mine], weights[mine], noise


# ---- Training ----------------------------------------------------------------------------------

COLUMNS = "step,loss,bits_per_dim,grad_norm,lr,skipped,images_per_second,seconds\n"


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


def draw_samples(config, diffusion, ema, classes, device, autocast):
    """A grid's 64 images, shared out among the processes -> (64, 3, S, S) in [-1, 1]."""
    x = torch.zeros(64, 3, config.image_size, config.image_size, device=device)
    mine = torch.arange(64, device=device)[RANK::WORLD]
    if len(mine):
        generators = [generator(config.seed, i, device) for i in mine.tolist()]
        noise = [torch.randn(x.shape[1:], generator=g, device=device) for g in generators]
        y = mine % classes if classes else None
        with autocast:
            x[RANK::WORLD] = diffusion.sample(ema, torch.stack(noise), y, generators=generators)
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def train(config, state, device, autocast):
    """Train to config.steps, from the checkpoint `state` or from the start."""
    images, labels, classes = load_data(config)
    process = {name: getattr(config, name) for name in ("schedule", "T", "variance")}
    shape = {name: getattr(config, name) for name in NETWORK}
    shape |= dict(attention_resolutions=config.attention, num_classes=classes)
    torch.manual_seed(config.seed)
    try:
        model = UNet(UNetConfig(out_channels=6 if config.variance == "learned" else 3, **shape))
        diffusion = Diffusion(**process).to(device)
        preview = Diffusion(**process, steps=min(config.T, 100)).to(device)
        if config.init and not state:
            model.load_state_dict(load_checkpoint(config.init)[0].state_dict())
    except (ValueError, RuntimeError) as error:
        fail(" ".join(str(error).split())[:300], 2)
    ema = copy.deepcopy(model.to(device)).eval().requires_grad_(False)
    params, averages = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(params, config.lr, weight_decay=0.0, fused=True)
    t_sampler = T_SAMPLERS[config.t_sampler](config.T).to(device)
    stateful = {"model": model, "ema": ema, "optimizer": optimizer, "t_sampler": t_sampler}
    # Of this process since the last row of the log: loss, bits/dim, gradient norm, steps, skipped.
    sums, skipped_in_a_row = torch.zeros(5, device=device), torch.zeros((), device=device)
    start, before, rows = 0, 0.0, COLUMNS
    if state:
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        start, before, rows = state["step"], state["seconds"], state["log"]
        sums += state["sums"].to(device) * (RANK == 0)
    if (gather(torch.tensor([start])) != start).any():
        fail("not all processes see the same checkpoint: nodes must share the storage of --out")
    net = torch.compile(model) if config.compile else model
    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    stop = catch_signals()
    bar = tqdm(total=config.steps, initial=start, unit="step", disable=not TTY or RANK > 0)
    batch = load_batch(config, images, labels, t_sampler, start, device)
    begin = marked = told = time.monotonic()
    mark = start
    for step in range(start, config.steps + 1):  # so many steps are done
        stopping = stop.clone()
        if WORLD > 1:
            dist.all_reduce(stopping, dist.ReduceOp.MAX)  # on the CPU: the device does not wait
        stopping, last, new = int(stopping), step == config.steps, step > start
        logs = new and (last or step % config.log_every == 0)
        saves = new and (last or stopping or step % config.save_every == 0)
        if WORLD > 1 and (logs or saves):
            dist.all_reduce(sums)
            sums *= RANK == 0
        if logs:
            now = time.monotonic()
            loss, bits, norm, good, bad = sums.tolist()
            loss, bits, norm = (value / max(good, 1) for value in (loss, bits, norm))
            bits += diffusion.prior(x0).mean().item()
            rate, seconds = (step - mark) * config.batch / (now - marked), before + now - begin
            row = f"{step},{loss:.6g},{bits:.6g},{norm:.6g},{lr:.6g},{bad:.0f},"
            rows += row + f"{rate:.1f},{seconds:.1f}\n"
            if RANK == 0:
                with open(os.path.join(config.out, "log.csv"), "w") as file:
                    file.write(rows)
            sums.zero_()
            mark, marked = step, now
            bar.set_postfix_str(f"loss {loss:.4f}, {bits:.3f} bits/dim, {rate:.0f} img/s")
            if not TTY and (now > told + 10 or last):
                told, left = now, (config.steps - step) * config.batch / rate / 60
                say(f"step {step}/{config.steps}: {bar.postfix}, {left:.0f} min left")
            if skipped_in_a_row >= 100:
                fail(f"no finite gradient in the 100 steps before {step}: try a smaller --lr")
        if new and not stopping and (last or step % config.sample_every == 0):
            x = draw_samples(config, preview, ema, classes, device, autocast).cpu()
            if RANK == 0:
                path = os.path.join(config.out, "samples", f"{step:07}.png")
                x = F.interpolate(x, scale_factor=float(max(1, 64 // config.image_size)))
                save_image(x, path + ".tmp", normalize=True, value_range=(-1, 1), format="png")
                os.replace(path + ".tmp", path)
        if saves and RANK == 0:
            state = {name: part.state_dict() for name, part in stateful.items()} | dict(
                step=step, seconds=before + time.monotonic() - begin, sums=sums, log=rows,
                config=vars(config), unet=dataclasses.asdict(model.config), diffusion=process,
            )  # fmt: skip
            try:
                save_checkpoint(os.path.join(config.out, "ckpt.pt"), state)
            except OSError as error:
                if last or stopping:
                    raise
                say(f"{error}; training goes on, the last checkpoint is whole")
        if last or stopping:
            break

        lr = config.lr * min(1, (step + 1) / max(config.warmup, 1))
        optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(generator(config.seed, step * WORLD + RANK).initial_seed())  # dropout
        x0, y, t, weights, noise = batch
        losses, n = [], len(x0)
        for part in range(config.accum):
            s = slice(part * n // config.accum, (part + 1) * n // config.accum)
            net.require_backward_grad_sync = part == config.accum - 1  # DDP sums gradients once
            y_part = None if y is None else y[s]
            with autocast:
                loss, vlb = diffusion.losses(net, x0[s], t[s], y_part, noise[s], config.objective)
            (weights[s] @ loss * (WORLD / config.batch)).backward()  # DDP divides by WORLD
            losses.append(torch.stack([loss.detach(), vlb]))
        norm = get_total_norm([p.grad for p in params])
        if config.grad_clip > 0:
            clip_grads_with_norm_(params, config.grad_clip, norm)
        # A gradient that is not finite, on any process, is not used: the fused optimizer then does
        # nothing, and the host need not look.
        bad = (~norm.isfinite()).float()
        optimizer.grad_scale, optimizer.found_inf = None, bad
        optimizer.step()
        optimizer.zero_grad()
        # The ramp keeps the initial weights out of the average of a short run.
        torch._foreach_lerp_(averages, params, 1 - min(config.ema, (1 + step) / (10 + step)))
        losses = torch.cat(losses, 1)
        t_sampler.update(t, losses[0])
        skipped_in_a_row = (skipped_in_a_row + bad) * bad
        means = torch.stack([*(losses @ weights / config.batch), norm / WORLD]) * (1 - bad)
        sums[:3] += means.nan_to_num(0, 0, 0)
        sums[3:] += torch.stack([1 - bad, bad]) / WORLD
        batch = load_batch(config, images, labels, t_sampler, step + 1, device)
        bar.update()
    bar.close()
    if stopping:
        raise SystemExit(128 + stopping)
    if RANK == 0:
        print(os.path.join(config.out, "ckpt.pt"))


# ---- Bits per dimension ------------------------------------------------------------------------


def evaluate(config, device, autocast):
    """Print the bound on held-out images and its parts; write every L_t to terms.csv.

    Interrupted, it prints what was measured, and then raises KeyboardInterrupt.
    """
    model, process = load_checkpoint(config.ckpt)
    diffusion = Diffusion(**process | {"steps": config.eval_steps}).to(device)
    model.to(device)
    config.image_size, config.class_cond = model.config.image_size, bool(model.config.num_classes)
    images, labels, _ = load_data(config, held_out=True)
    n = min(config.eval_images, len(images))
    rows = np.linspace(0, len(images) - 1, n).round().astype(int)  # from all parts of a folder
    exact, calls = config.eval_calls >= diffusion.num_steps, config.eval_calls - 2

    def load(rows):
        x0 = to_x0(images[rows], device)
        return x0, torch.from_numpy(labels[rows]).to(device) if config.class_cond else None

    found, done, weights = [], False, torch.ones(diffusion.num_steps, device=device)
    bar = tqdm(range(RANK, n, config.batch * WORLD), "bits/dim", disable=not TTY or RANK > 0)
    with autocast, contextlib.suppress(KeyboardInterrupt):
        torch.manual_seed(config.seed)
        if not exact:  # a pilot, the same for all processes, of at most one call an image
            p = diffusion.pilot(model, *load(rows[:: max(1, n // 16)][: max(1, n // 32)]))
            weights[1:] = 1 / (calls * p[1:])
        torch.manual_seed(generator(config.seed, RANK).initial_seed())
        for i in bar:
            x0, y = load(rows[i : i + config.batch * WORLD : WORLD])
            if exact:
                _, terms, prior = diffusion.bits_per_dim(model, x0, y, progress=not bar.disable)
                t = torch.arange(diffusion.num_steps, device=device).expand_as(terms)
            else:
                terms, t, prior = diffusion.bits_per_dim_draws(model, x0, p, calls, y)
            found.append((terms, t, prior))
            terms, t, prior = map(torch.cat, zip(*found))
            total, error = (terms.sum(1) + prior).mean(), estimate_error(terms)
            bar.set_postfix_str(f"{total:.3f}" if exact else f"{total:.3f} ± {error:.3f}")
        done = True
    if not found:
        raise KeyboardInterrupt
    terms, t = (gather(value.flatten()).view(-1, terms.shape[1]).cpu() for value in (terms, t))
    prior, weights = gather(prior).cpu(), weights.cpu()
    total = terms.sum(1) + prior
    if RANK == 0:
        L_0, L_T, error = terms[t == 0].mean(), prior.mean(), estimate_error(terms)
        error = "every term computed" if exact else f"± {error:.4f} by the choice of t and noise"
        print(f"bits/dim {total.mean():.4f} on {len(total)} images, {error},"
              f" ± {total.std() / len(total) ** 0.5:.4f} with that of images")  # fmt: skip
        print(f"L_0 {L_0:.4f}, KLs {total.mean() - L_0 - L_T:.4f}, L_T {L_T:.6f}")
        path = os.path.join(os.path.dirname(config.ckpt), "terms.csv")
        t, L_t = t.flatten(), (terms / weights[t]).flatten()
        number, sums = torch.bincount(t), torch.bincount(t, L_t)
        with open(path, "w") as file:
            file.write("t,bits_per_dim,images\n")
            for i in number.nonzero().flatten().tolist():
                file.write(f"{i},{sums[i] / number[i]:.6g},{number[i]}\n")
        say(f"wrote {path}")
    if not done:
        raise KeyboardInterrupt


def main():
    config, state = configure(sys.argv[1:])
    say(" ".join(f"{name}={value}" for name, value in vars(config).items() if value is not None))
    device, autocast = pick_device(config.device, config.dtype)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)  # for resuming to the bit
    torch.utils.deterministic.fill_uninitialized_memory = False
    if config.eval_only:
        return evaluate(config, device, autocast)
    if config.batch < WORLD * config.accum:
        fail(f"--batch {config.batch} is no image for each of {WORLD} processes × {config.accum}"
             " parts (--accum)", 2)  # fmt: skip
    os.makedirs(os.path.join(config.out, "samples"), exist_ok=True)
    with open(os.path.join(config.out, ".lock"), "w") as lock:
        try:
            if RANK == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing to {config.out}: take another --out")
        train(config, state, device, autocast)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        fail(str(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
