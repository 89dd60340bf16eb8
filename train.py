"""Train Improved DDPM, or measure its bits per dimension.

    python train.py                                      drawn digits, a few minutes on a laptop
    torchrun train.py --data cifar10                     the paper's CIFAR-10 run on one GPU
    torchrun --nproc-per-node 8 train.py --data cifar10  the same run on eight
    python train.py --data DIR --image-size 64           your own folder of images
    python train.py --data DIR --low-res 16              an upsampler from 16 pixels a side
    python train.py --eval-only --data DIR --ckpt FILE   bits/dim of a checkpoint on other images

The same command again resumes the run from its last checkpoint, on any number of ranks.
"""

import argparse
import contextlib
import copy
import errno
import functools
import glob
import hashlib
import math
import os
import signal
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # MPS has no log_ndtr (for bits/dim)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from diffusion import (
    SCHEDULES, VARIANCES, Diffusion, estimate_bits_per_dim, few_steps, generator, randn_like,
    select_timesteps, start_upsampling,
)  # fmt: skip
from model import (
    DEVICES, DTYPES, LOCAL_RANK, RANK, WORLD, UNet, UNetConfig, autocast, load_checkpoint, load_npz,
    make_picture, number, pick_device, pick_dtype, to_pixels,
)  # fmt: skip
from sampler import T_SAMPLERS, gather

# ---- Flags: the defaults are the paper's CIFAR-10 run; here is what differs for other data -------

DIGITS = dict(
    image_size=16, class_cond=True, label_dropout=0.1, T=1000, channels=32, channel_mult=(1, 2, 2),
    num_res_blocks=1, attention_resolutions=(8,), dropout=0.0, steps=1200, batch=64, lr=2e-3,
    warmup=100, ema=0.995, grad_clip=1.0, log_every=40, sample_every=400, save_every=200,
)  # fmt: skip
FOLDER = dict(image_size=64, dropout=0.0, steps=1_500_000, flip=True)
PRESETS = {"digits": DIGITS, "cifar10": {}}
# The channel_mult of an image size; of all others, 64 among them, (1, 2, 3, 4).
MULTS = {16: (1, 2, 2), 32: (1, 2, 2, 2), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}

def numbers(text):
    return () if text == "none" else tuple(map(number(int, 1), text.split(",")))

positive, natural, share = number(int, 1), number(int, 0), number(float, 0, 1)
switch = argparse.BooleanOptionalAction
data_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
data_parser.add_argument("--data", default="digits", help="digits, cifar10, a folder or X.npz")
parser = argparse.ArgumentParser(
    parents=[data_parser], allow_abbrev=False, description=__doc__.splitlines()[0],
    usage="[torchrun] train.py [--data WHAT] [flags]",
    formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, 2, 32, 100),
)  # fmt: skip
add = parser.add_argument_group("images").add_argument
add("--image-size", type=number(int, 8), default=32, help="pixels a side")
add("--class-cond", action=switch, default=False, help="learn the classes: subfolders or labels")
add("--low-res", type=positive, help="train an upsampler of images this many pixels a side")
add("--flip", action=switch, default=False, help="mirror half of the images")
add("--batch", type=positive, default=128, help="images in an update, those of all ranks together")
add("--seed", type=natural, default=0, help="the seed of all randomness")
add = parser.add_argument_group("process").add_argument
add("--schedule", choices=SCHEDULES, default="cosine", help="the noise schedule")
add("--T", type=number(int, 2), default=4000, help="the number of timesteps")
add("--variance", choices=VARIANCES, default="learned", help="the variance of a denoising step")
add = parser.add_argument_group("network").add_argument
add("--channels", type=positive, default=128, help="width at the full resolution")
add("--channel-mult", type=numbers, help="multiples of --channels, as 1,2,2; None: by image size")
add("--num-res-blocks", type=positive, default=3, help="blocks at each resolution")
add("--attention", type=numbers, dest="attention_resolutions", help="resolutions with "
    "attention, as 16,8, or none; the middle always has it (None: all from 8 to 16)")  # fmt: skip
add("--num-heads", type=positive, default=4, help="heads of attention")
add("--dropout", type=share, default=0.3, help="probability of dropout")
add = parser.add_argument_group("training").add_argument
add("--objective", choices=["simple", "hybrid", "vlb"], default="hybrid", help="the loss; simple "
    "trains no variance: give it --variance small or large")  # fmt: skip
add("--t-sampler", choices=T_SAMPLERS, default="uniform", help="which timesteps to train on")
add("--lr", type=share, default=1e-4, help="AdamW's learning rate")
add("--warmup", type=natural, default=0, help="updates in which the rate rises to --lr")
add("--ema", type=share, default=0.9999, help="the final decay of the averaged weights")
add("--grad-clip", type=number(float, 0), default=0, help="largest norm of a gradient; 0: no limit")
add("--label-dropout", type=share, default=0.0, help="share of classes hidden, for guidance")
add("--init", metavar="FILE", help="begin a new run with the averaged weights of this checkpoint")
add = parser.add_argument_group("the run (these may change when it is resumed)").add_argument
add("--out", metavar="DIR", help="the run's directory; None: runs/ and the data's name")
add("--device", choices=DEVICES, default="auto", help="where to compute")
add("--dtype", choices=DTYPES, default="auto", help="precision of matrix products")
add("--compile", action=switch, default=False, help="compile the network with torch.compile")
add("--steps", type=positive, default=500_000, help="updates in all")
add("--decay", type=share, default=0.0, help="last share of --steps, in which the rate falls to 0")
add("--accum", type=positive, default=1, help="parts of a batch, computed in turn to save memory")
add("--log-every", type=positive, default=100, help="updates between rows of log.csv")
add("--sample-every", type=natural, default=10_000, help="updates between grids; 0: no grids")
add("--save-every", type=positive, default=1_000, help="updates between checkpoints")
add = parser.add_argument_group("bits per dimension").add_argument
add("--eval-only", action="store_true", help="measure a checkpoint on images; no training")
add("--ckpt", metavar="FILE", help="the checkpoint to measure; None: the one in --out")
add("--eval-images", type=positive, default=10_000, help="the most images to measure")
add("--eval-steps", type=positive, help="steps of the process to measure; None: all")
add("--eval-calls", type=number(int, 4), default=10, help="calls of the network for each image")
add("--spacing", type=number(float, 1), default=1.0, help="1: even --eval-steps; 3: denser near 0")

# ---- Training ----------------------------------------------------------------------------------

def train(args, network, process, ckpt, device, dtype):
    """Train a network until args.steps updates are made. network and process: UNetConfig's and
    Diffusion's arguments. ckpt: the run to resume, the weights to begin with, or {}."""
    # The data and the network.
    known = network.get("num_classes")
    images, labels, classes = load_data(args, ckpt.get("classes"), num_classes=known)
    network |= dict(num_classes=classes and len(classes))
    torch.manual_seed(args.seed)
    model = UNet(UNetConfig(**network)).to(device)

    # The process, and what trains the network. All that has a state goes into the checkpoint.
    diffusion = Diffusion(**process).to(device)
    timesteps = few_steps(args.T, args.image_size, 25, args.schedule, bool(args.low_res))
    few = Diffusion(**process, steps=timesteps).to(device)  # for grids
    t_sampler = T_SAMPLERS[args.t_sampler](args.T).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, args.lr, weight_decay=0.0, fused=True)
    fp16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if fp16 else 1.0)
    stateful = dict(model=model, ema=average, optimizer=optimizer, t_sampler=t_sampler)
    stateful |= {"scaler": scaler} if fp16 else {}
    for name in stateful.keys() & ckpt.keys():
        stateful[name].load_state_dict(ckpt.pop(name))
    about = dict(config=vars(args), unet=network, diffusion=process, classes=classes)
    start, begin = ckpt.get("step", 0), time.monotonic() - ckpt.get("seconds", 0)
    # Sums since the last row: loss, norm, updates taken and skipped; then all skipped ones.
    sums = ckpt.get("sums", torch.zeros(5)).to(device)
    begin_log(args, start, len(images))
    print(f"{args.out} begins" if start == 0 else f"{args.out} goes on after update {start}")
    net = torch.compile(model) if args.compile else model
    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    stop = catch_signals()

    for step in tqdm(range(start, args.steps), "updates", disable=RANK > 0 or None):
        # Learning rate and batch. All that is random follows from the seed and the step: dropout
        # and the terms of the log's bound are drawn from torch's global generator.
        rise = (step + 1) / max(args.warmup, 1)
        fall = (args.steps - step) / max(args.decay * args.steps, 1)
        lr = args.lr * min(1, rise, fall)
        optimizer.param_groups[0]["lr"] = lr
        x0, y, t, weights, noise = load_batch(args, images, labels, t_sampler, step, device)
        own = generator(args.seed, step * WORLD + RANK, stream="dropout")
        torch.manual_seed(own.initial_seed())

        # Gradients, one part of the batch after the other.
        losses, n = [], len(x0)
        for k in range(args.accum):
            part = slice(k * n // args.accum, (k + 1) * n // args.accum)
            y_part = None if y is None else y[part]
            net_part = give_low_res(net, x0[part], args.low_res)
            if WORLD > 1:  # the ranks exchange gradients only in the last part
                net.require_backward_grad_sync = part.stop == n
            with autocast(device, dtype):
                inputs = x0[part], t[part], y_part, noise[part]
                loss, _ = diffusion.losses(net_part, *inputs, args.objective)
            # The mean over the whole batch, once DDP has divided by the number of ranks.
            scaler.scale(weights[part] @ loss * (WORLD / args.batch)).backward()
            losses.append(loss.detach())
        losses = torch.cat(losses)

        # The weights, their average, and which t to draw next. Unlike the paper's, the average's
        # decay rises to --ema (to 0.9999 by update 90,000), to forget the initial weights.
        norm = update_weights(params, optimizer, scaler, args.grad_clip, fp16)
        blend = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
        blend(list(average.parameters()), params, None)
        for mean, buffer in zip(average.buffers(), model.buffers()):
            mean.copy_(buffer)
        t_sampler.update(t, losses)
        taken = norm.isfinite().float()
        means = torch.stack([weights @ losses * (WORLD / args.batch), norm]).nan_to_num(0, 0, 0)
        sums += torch.stack([*means * taken, taken, 1 - taken, 1 - taken])

        # Now and then: a row of the log, a checkpoint, a grid of samples (in this order, so that a
        # grid that kills the run costs nothing).
        done, last, seconds = step + 1, step + 1 == args.steps, time.monotonic() - begin
        stopping = 0 if last else int(gather(stop).max())  # on the CPU: no wait
        if last or done % args.log_every == 0:
            bound = estimate_bound(args, model, diffusion, x0, y, dtype)
            write_row(args, done, sums, bound, lr, seconds)
        draws = args.sample_every and (last or done % args.sample_every == 0)
        if last or stopping or draws or done % args.save_every == 0:
            states = {name: each.state_dict() for name, each in stateful.items()}
            states |= dict(step=done, sums=gather(sums[None]).mean(0), seconds=seconds)
            if RANK == 0:
                torch.save(about | states, f"{args.out}/ckpt.pt.tmp")
                os.replace(f"{args.out}/ckpt.pt.tmp", f"{args.out}/ckpt.pt")
        if RANK == 0 and draws and not stopping:
            try:
                draw_samples(args, done, average, few, images, labels, dtype)
            except FloatingPointError as error:
                sys.exit(f"samples {error}; {sums[4]:.0f} of {done} updates were skipped")
        if stopping:
            gather(stop)  # the other ranks wait until rank 0 has saved
            print(f"saved {args.out}/ckpt.pt after update {done} of {args.steps}")
            sys.exit(128 + stopping)
    print(f"{args.out}/ckpt.pt has {max(start, args.steps)} updates")

# ---- What the loop calls -----------------------------------------------------------------------

def catch_signals():
    """A tensor (1,): 0, or the number of the signal that asked the run to stop. The same signal
    again stops at once; under torchrun, which itself sends a Ctrl-C again, it does nothing."""
    stop = torch.zeros(1, dtype=torch.int64)
    again = signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL

    def handle(signum, frame):
        stop.fill_(signum)
        signal.signal(signum, again)

    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as it is under nohup
            signal.signal(getattr(signal, name), handle)
    return stop

def load_batch(args, images, labels, t_sampler, step, device):
    """This rank's part of the batch of a step -> x0, y, t, weights, noise. Each rank draws the
    randomness of the whole batch anew from (seed, step): neither the number of ranks nor a restart
    changes the flip, t and noise of an image of the batch."""
    B, N = args.batch, len(images)
    mine = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD)
    places = range(step * B, step * B + B)[mine]  # in the endless sequence of epochs
    rows = np.array([epoch_order(args.seed, p // N, N)[p % N] for p in places])
    g = generator(args.seed, step, device)
    t, weights = t_sampler.sample(B, g)
    noise = torch.randn(B, *images.shape[1:], generator=g, device=device)[mine]
    flip = torch.rand(B, 1, 1, 1, generator=g, device=device)[mine] < 0.5 * args.flip
    drop = torch.rand(B, generator=g, device=device)[mine] < args.label_dropout
    x0, y = to_device(images, labels, rows, device)
    y = None if y is None else torch.where(drop, -1, y)  # -1: no class
    return torch.where(flip, x0.flip(3), x0), y, t[mine], weights[mine], noise

@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, epoch, stream="order")).numpy()

def to_device(images, labels, rows, device):
    """The images (n, 3, S, S) of n rows, float32 in [-1, 1], and their labels (n,) or None."""
    tensors = [torch.from_numpy(each[rows]) for each in (images, labels) if each is not None]
    if device.type == "cuda":  # from pinned memory, the host need not wait for the device
        tensors = [tensor.pin_memory() for tensor in tensors]
    x0, *y = [tensor.to(device, non_blocking=True) for tensor in tensors]
    return x0.float() / 127.5 - 1, y[0] if y else None

def give_low_res(net, x0, size):
    """The network; if it is an upsampler, with the small images, x0 averaged down to size."""
    return functools.partial(net, low_res=F.interpolate(x0, size, mode="area")) if size else net

def update_weights(params, optimizer, scaler, grad_clip, fp16):
    """One step of AdamW -> the norm of the gradient. If a gradient is not finite, the scaler (also
    one of scale 1) makes the optimizer skip the step, on the device: the host need not wait."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or 1e30)  # not inf: inf / inf is NaN
    scaler.step(optimizer)
    scaler.update(None if fp16 else 1.0)  # float16 alone needs a scale that adapts
    optimizer.zero_grad()
    return norm

def begin_log(args, start, n):
    """Begin log.csv, or cut off the rows that a killed run wrote after its last checkpoint."""
    seen = gather(torch.tensor([[start, n]]))
    if (seen != seen[0]).any():
        sys.exit(f"the ranks see other checkpoints or images: update, images {seen.tolist()}")
    path, rows = f"{args.out}/log.csv", []
    if RANK == 0:
        if start and os.path.exists(path):
            rows = [row for row in open(path).readlines()[1:] if row.count(",") == 6]
            rows = [row for row in rows if int(row.split(",")[0]) <= start]
        with open(path, "w") as file:
            file.writelines(["step,loss,bits_per_dim,grad_norm,lr,skipped,seconds\n", *rows])

def estimate_bound(args, model, diffusion, x0, y, dtype):
    """The bound of the network's own weights on 16 images, in bits per dimension (1,)."""
    x0, y = (None if each is None else each[: max(1, 16 // WORLD)] for each in (x0, y))
    model.eval()
    with autocast(x0.device, dtype):
        net = give_low_res(model, x0, args.low_res)
        total = estimate_bits_per_dim(diffusion, net, x0, y, calls=8)[0]
    model.train()
    return gather(total).mean()

def write_row(args, step, sums, bound, lr, seconds):
    """Write and print the means since the last row, for which the host waits for the device.
    Raises FloatingPointError if no update since the last row had a finite gradient."""
    loss, norm, taken, skipped, _ = gather(sums[None]).mean(0).tolist()
    sums[:4] = 0
    loss, norm, bits = (loss / taken, norm / taken, bound.item()) if taken else [math.nan] * 3
    if RANK == 0:
        with open(f"{args.out}/log.csv", "a") as file:
            row = f"{step},{loss:.6g},{bits:.6g},{norm:.6g},{lr:.6g},{skipped:.0f},{seconds:.1f}"
            print(row, file=file)
    left = tqdm.format_interval(seconds / step * (args.steps - step))
    skips = f", {skipped:.0f} updates skipped" if skipped else ""
    tqdm.write(f"step {step}: loss {loss:.4f}, {bits:.3f} bits/dim{skips}, {left} left")
    sys.stdout.flush()  # into a file, too
    if not taken:
        raise FloatingPointError(f"{skipped:.0f} updates skipped: lower --lr, with another --out")

def draw_samples(args, step, average, diffusion, images, labels, dtype):
    """Write a grid of samples. For an upsampler, each stands between its small image and the true
    one. They are drawn in parts of the size that training uses."""
    device, tiles = diffusion.alphas_bar.device, []
    n, columns = (16, 12) if args.low_res else (64, 8)
    for part in torch.arange(n).split(args.batch // WORLD // args.accum):
        x0, y = to_device(images, labels, part.numpy() % len(images), device)
        if y is not None and not args.low_res:
            y = part.to(device) % average.config.num_classes
        generators = [generator(args.seed, i, device) for i in part.tolist()]
        net, noise = give_low_res(average, x0, args.low_res), randn_like(x0, generators)
        if args.low_res:
            small = net.keywords["low_res"]  # which the network is given
            noise = start_upsampling(diffusion, small, noise)
        with autocast(device, dtype):
            x = diffusion.sample(net, noise, y, "dpm++", generators=generators)
        if args.low_res:
            x = torch.stack([F.interpolate(small, args.image_size), x, x0], dim=1).flatten(0, 1)
        tiles.append(to_pixels(x, part.repeat_interleave(len(x) // len(part)).tolist()))
    os.makedirs(f"{args.out}/samples", exist_ok=True)
    make_picture(torch.cat(tiles), columns).save(f"{args.out}/samples/{step:07}.png")

# ---- Data --------------------------------------------------------------------------------------

@functools.lru_cache(1)  # wanted twice: for --image-size's default, and as data
def read_npz(path):
    try:
        return load_npz(path)
    except ValueError as error:
        parser.error(f"--data: {error}")

def load_data(args, known=None, held_out=False, num_classes=None):
    """The images, uint8 (N, 3, S, S), their labels, int64 (N,) or None, and the classes' names or
    None. known: the names of a trained network's classes, which are to be matched."""
    size, data = args.image_size, args.data
    if LOCAL_RANK > 0:
        gather(torch.zeros(1))  # the first rank of each machine draws, downloads or decodes alone
    if data == "digits":
        images, names = draw_digits(20_000, size, args.seed + held_out * 2**32)
    elif data == "cifar10":
        images, names = load_cifar10(held_out)
    else:
        images, names = read_npz(data) if data.endswith(".npz") else load_folder(data, size)
    if LOCAL_RANK == 0:
        gather(torch.zeros(1))
    print(f"{data}: {len(images):,} images")
    if images.shape[1:] != (3, size, size):
        parser.error(f"--image-size {size}: {data} holds {images.shape[1:]}")
    if not args.class_cond:
        return images, None, None
    if names is None or "" in names:
        parser.error(f"--class-cond: not all images of {data} have a class (a subfolder or label)")
    names = [unicodedata.normalize("NFC", name) for name in names]
    classes = known or sorted(set(names))
    if num_classes not in (None, len(classes)):
        parser.error(f"--data {data} has {len(classes)} classes; the network has {num_classes}")
    if unknown := sorted(set(names) - set(classes)):
        parser.error(f"--data {data}: {unknown[0]} is none of the classes {', '.join(classes)}")
    print(f"classes {', '.join(classes[:20])}{', …' if len(classes) > 20 else ''}")
    index = {name: k for k, name in enumerate(classes)}
    return images, np.array([index[name] for name in names]), classes

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
    from torchvision.datasets import CIFAR10  # here, since this import takes seconds

    try:
        data = CIFAR10("data", train=not held_out, download=True)
    except (OSError, RuntimeError) as error:
        sys.exit(f"no CIFAR-10 ({error}): put {CIFAR10.filename}, from {CIFAR10.url}, into data/")
    return data.data.transpose(0, 3, 1, 2), [data.classes[k] for k in data.targets]

def load_folder(root, size):
    """All pictures below root, memory-mapped (N, 3, size, size), and the class of each: the name of
    its subfolder, or "". They are decoded once, into a file of data/cache that begins with a digest
    of the listing and, for each picture, whether it could be read. Those that could not are tried
    again at each start."""
    listing, others = list_pictures(root)
    paths, place = np.array([path for path, *_ in listing], object), os.path.realpath(root)
    key, digest = (hashlib.sha256(repr(each).encode()).digest() for each in (place, listing))
    cache = f"data/cache/{os.path.basename(place)[:40]}-{size}-{key.hex()[:12]}"
    read, readable = functools.partial(read_picture, root, size), np.zeros(len(paths), bool)
    if os.path.exists(cache) and np.fromfile(cache, np.uint8, len(digest)).tobytes() == digest:
        readable = np.fromfile(cache, bool, len(paths), offset=len(digest))
    if not readable.any() or any(read(path) is not None for path in paths[~readable]):
        readable = decode(cache, digest, paths, read)
    n = int(readable.sum())
    print(f"{root}: left out {len(paths) - n} unreadable pictures, {others} other files or folders")
    if n == 0:
        sys.exit(f"--data {root}: no picture could be read")
    start = len(digest) + len(paths)
    images = np.memmap(cache, np.uint8, "c", start, (n, 3, size, size))  # "c": changes stay private
    return images, [os.path.dirname(path).split(os.sep)[0] for path in paths[readable]]

SERVERS_FOLDERS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found")
Image.MAX_IMAGE_PIXELS = None  # Pillow's limits guard servers; here, large pictures are wanted
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30

def list_pictures(root):
    """[(path below root, size, time)] of all pictures, and the number of other files and folders.
    Links are followed, except to a folder that contains root; within a class, a folder is entered
    once. Hidden names are skipped; not entered are runs, and what file servers keep."""
    suffixes, home = Image.registered_extensions(), os.path.realpath(root)
    listing, others, seen, errors = [], 0, set(), []
    for folder, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        inside, real = os.path.relpath(folder, root), os.path.realpath(folder)
        place = inside.split(os.sep)[0], real
        above = os.path.commonpath([home, real]) == real
        left_out = "ckpt.pt" in files
        if inside != "." and (above or place in seen or left_out):
            folders.clear()
            others += left_out
            continue
        seen.add(place)
        names = sorted(name for name in folders if name[0] != ".")
        folders[:] = [name for name in names if name not in SERVERS_FOLDERS]
        others += len(names) - len(folders)
        for path in (os.path.join(folder, name) for name in files if name[0] != "."):
            if os.path.splitext(path)[1].lower() in suffixes and os.path.isfile(path):
                info = os.stat(path)
                listing.append((os.path.relpath(path, root), info.st_size, info.st_mtime_ns))
            else:
                others += 1
    if errors:  # a folder that cannot be listed may be a whole class
        raise errors[0]
    return sorted(listing), others

def decode(cache, digest, paths, read):
    """Write a cache under a temporary name, then rename it. Returns which paths could be read."""
    os.makedirs(os.path.dirname(cache), exist_ok=True)
    for old in glob.glob(glob.escape(cache) + ".*.tmp"):
        if time.time() - os.path.getmtime(old) > 86_400:  # of a decoding that was killed
            os.remove(old)
    # Two containers that share data/cache can have processes of the same number.
    tmp, readable = f"{cache}.{os.urandom(8).hex()}.tmp", np.zeros(len(paths), bool)
    with open(tmp, "wb") as file, ThreadPoolExecutor() as pool:
        file.write(digest + readable.tobytes())
        for start in tqdm(range(0, len(paths), 256), "decoding", disable=None):
            for i, picture in enumerate(pool.map(read, paths[start : start + 256]), start):
                if picture is not None:
                    file.write(picture.tobytes())
                    readable[i] = True
        file.seek(len(digest))
        file.write(readable.tobytes())
    os.replace(tmp, cache)
    return readable

def read_picture(root, size, path):
    """The centre square of a picture, upright, on white: uint8 (3, size, size), or None."""
    try:
        with Image.open(os.path.join(root, path)) as image:
            image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction
            image.load()
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("32 bits a pixel, whose range is not known")
        with contextlib.suppress(Exception):  # damaged EXIF is no reason to lose the picture
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow has one for every way in which a file can be broken
        of_the_file = (None, errno.EACCES, errno.EINVAL, errno.ENOENT)
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in of_the_file:
            raise  # the machine failed, not this picture alone
        print(f"left out {path!r}: {error}")

# ---- Bits per dimension ------------------------------------------------------------------------

@torch.no_grad()
def evaluate(args, model, process, classes, device, dtype):
    """Print a network's bound on the images of --data, and write the mean of each L_t. For
    digits and cifar10 these are images that no run trains on. Unless every term is computed, each
    image's bound is estimated twice: the difference shows the error due to timesteps and noise."""
    steps = args.eval_steps and select_timesteps(args.eval_steps, args.T - 1, args.spacing)
    diffusion = Diffusion(**process, steps=steps).to(device)
    images, labels, _ = load_data(args, classes, True, model.config.num_classes)
    rows = epoch_order(args.seed, 0, len(images))[: args.eval_images]
    n, mine = len(rows), rows[RANK::WORLD]
    torch.manual_seed(generator(args.seed, RANK, stream="dropout").initial_seed())
    exact, calls = args.eval_calls >= diffusion.num_steps, args.eval_calls // 2 - 1

    # For each image the bound, half the difference of two estimates, the prior, and its index. For
    # each t the sum of all L_t, and how many they are.
    bounds, sums = [torch.zeros(0, 4)], torch.zeros(2, diffusion.num_steps).double()
    for start in tqdm(range(0, len(mine), args.batch), "bits/dim", disable=RANK > 0 or None):
        part = mine[start : start + args.batch]
        x0, y = to_device(images, labels, part, device)
        net = give_low_res(model, x0, args.low_res)
        with autocast(device, dtype):
            if exact:
                terms, prior = diffusion.bits_per_dim(net, x0, y)
                total = other = terms.sum(1) + prior
            else:
                total, terms, prior = estimate_bits_per_dim(diffusion, net, x0, y, calls)
                other, more, _ = estimate_bits_per_dim(diffusion, net, x0, y, calls)
                terms = torch.cat([terms, more])
        parts = (total + other) / 2, (total - other) / 2, prior, torch.from_numpy(part).to(prior)
        bounds.append(torch.stack(parts, 1).cpu())
        sums += torch.stack([terms.nansum(0), (~terms.isnan()).sum(0)]).cpu()
    bound, half, prior, indices = gather(torch.cat(bounds).double()).unbind(1)
    sums, draws = gather(sums[None]).sum(0)
    if bad := indices[~bound.isfinite()].int().tolist():
        which = f"{sorted(bad)[:9]}{' and more' if len(bad) > 9 else ''}"
        sys.exit(f"{args.ckpt}: not finite: the bound of images {which}")

    # The mean bound and its standard errors, its parts, and a file of its terms.
    errors = "every term computed" if exact else f"± {half.norm() / n:.4f} (timesteps and noise)"
    if n > 1:
        errors += f", ± {bound.std() / n**0.5:.4f} (including the choice of images)"
    print(f"bits/dim {bound.mean():.4f} on {n} images, {errors}")
    L_t, t = sums / draws, draws.nonzero().flatten()
    kls = (bound - prior).mean() - L_t[0]
    print(f"L_0 {L_t[0]:.4f}, KLs {kls:.4f}, L_T {prior.mean():.6f}")
    folder = args.ckpt if os.path.isdir(args.ckpt) else os.path.dirname(args.ckpt)
    path = os.path.join(folder, "terms.csv")
    if RANK == 0:
        table = torch.stack([t, L_t[t], draws[t]], 1)
        np.savetxt(path, table, "%d,%.6g,%d", header="t,bits_per_dim,draws", comments="")
    print(f"wrote {path}")

# ---- From the command line to the run ----------------------------------------------------------

PROCESS = {"schedule", "T", "variance"}
SHAPE = {"image_size", "low_res", "class_cond", "channels", "channel_mult", "num_res_blocks",
         "attention_resolutions", "num_heads"}  # fmt: skip
EVAL = {"ckpt", "eval_images", "eval_steps", "eval_calls", "spacing"}
MAY_CHANGE = EVAL | {"data", "out", "device", "dtype", "compile", "steps", "decay", "accum",
                     "log_every", "sample_every", "save_every", "eval_only"}  # fmt: skip

def parse_args(argv):
    """The flags, and the checkpoint to resume, to measure or to begin with ({}: none). A flag's
    value is what is typed, else the checkpoint's, else that of --data, else the paper's. What is
    typed must not contradict what the checkpoint fixes."""
    data = data_parser.parse_known_args(argv)[0].data
    parser.set_defaults(**PRESETS.get(data, FOLDER))
    args = parser.parse_args(argv)
    out = args.out or "runs/" + os.path.basename(os.path.realpath(data)).removesuffix(".npz")
    resumes = os.path.exists(os.path.join(out, "ckpt.pt")) and not args.eval_only
    source = (args.ckpt or out) if args.eval_only else (out if resumes else args.init)
    stored, fixed = {}, {}
    if data.endswith(".npz") and os.path.isfile(data):
        parser.set_defaults(image_size=read_npz(data)[0].shape[-1])
    try:
        ckpt = load_checkpoint(source)[1] if source else {}
    except ValueError as error:
        parser.error(str(error))
    if resumes:
        stored = ckpt["config"]
        fixed = stored.keys() - MAY_CHANGE
        if not args.out and os.path.realpath(data) != os.path.realpath(stored["data"]):
            parser.error(f"--data {data}: {out} has {stored['data']}; give another --out")
    elif source:
        stored = vars(UNetConfig(**ckpt["unet"])) | ckpt["diffusion"]
        stored |= dict(class_cond=stored["num_classes"] is not None)
        stored = {key: stored[key] for key in (SHAPE | PROCESS) & stored.keys()}
        fixed = SHAPE | {"schedule", "T"}
        if args.eval_only:
            stored["data"] = ckpt["config"].get("data")
        keys = ("unet", "diffusion", "classes", "ema")  # the averaged weights alone
        ckpt = {key: ckpt[key] for key in keys} | dict(model=ckpt["ema"])
    parser.set_defaults(**stored | dict(out=out, ckpt=source if args.eval_only else None))
    args = parser.parse_args(argv)
    for key in sorted(fixed):
        if vars(args)[key] != stored[key]:
            flag = f"--{key.removesuffix('_resolutions').replace('_', '-')} {vars(args)[key]}"
            instead = "leave it out, or give another --out" if resumes else "leave it out"
            parser.error(f"{flag}: {source} has {stored[key]}; {instead}")

    # What follows from other flags, and what contradicts them.
    args.channel_mult = args.channel_mult or MULTS.get(args.image_size, (1, 2, 3, 4))
    if args.attention_resolutions is None:
        sides = [args.image_size >> level for level in range(len(args.channel_mult))]
        args.attention_resolutions = tuple(side for side in sides if 8 <= side <= 16)
    there = os.path.isfile if str(args.data).endswith(".npz") else os.path.isdir
    if args.data not in PRESETS and not there(str(args.data)):
        parser.error(f"--data {args.data} must be digits, cifar10, or an existing folder or X.npz")
    if args.data == "cifar10" and args.image_size != 32:
        parser.error(f"--image-size {args.image_size}: cifar10 has 32")
    if args.eval_steps and args.eval_steps > args.T:
        parser.error(f"--eval-steps {args.eval_steps}: the process has {args.T}")
    if args.variance == "learned" and ckpt.get("unet", {}).get("out_channels") == 3:
        parser.error(f"--variance learned: {source} predicts no variance")
    if not args.eval_only:
        if any(vars(args)[key] != parser.get_default(key) for key in EVAL):
            parser.error("--ckpt, --eval-images, --eval-steps and so on need --eval-only")
        if args.objective == "hybrid" and args.variance != "learned":
            parser.error("--objective hybrid trains a variance; give simple or vlb")
        if "://" in args.out:
            parser.error(f"--out {args.out} must be a folder")
        if args.batch < WORLD * args.accum:
            parser.error(f"--batch {args.batch} is below {WORLD} ranks × --accum {args.accum}")
    return args, ckpt

def main():
    args, ckpt = parse_args(sys.argv[1:])
    process = ckpt.get("diffusion", {}) | {key: vars(args)[key] for key in PROCESS}
    network = {key: vars(args)[key] for key in SHAPE - {"class_cond"}}
    network |= dict(out_channels=6 if args.variance == "learned" else 3)
    network |= ckpt.get("unet", {}) | dict(dropout=args.dropout)
    try:
        UNetConfig(**network)
        if not args.eval_only:
            os.makedirs(args.out, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one rank speaks
    print(*(f"{key}={value}" for key, value in vars(args).items()))
    device = pick_device(args.device)
    # Resuming to the bit is claimed for CPUs alone; elsewhere the fastest algorithms are taken.
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if args.eval_only:
        name = "fp32" if args.dtype == "auto" else args.dtype  # in bf16 the bound is 0.02 off
        dtype = pick_dtype(name, device)
        model = UNet(UNetConfig(**network)).to(device).eval()
        model.load_state_dict(ckpt["ema"])
        evaluate(args, model, process, ckpt["classes"], device, dtype)
    else:
        train(args, network, process, ckpt, device, pick_dtype(args.dtype, device))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    main()
