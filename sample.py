"""Draw images from a checkpoint.

    python sample.py --n 64                        a grid, from the newest run or the one in assets/
    python sample.py --class 7 --steps 20          class 7 alone, in few steps
    python sample.py --method ddim --steps 50      DDIM
    python sample.py --n 16 --out denoising.gif    the way there
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out DIR    or X.npz; DIR can go on

Image i of a seed is the same whatever the batch and the number of processes.
"""

import argparse
import contextlib
import glob
import math
import os
import signal
import sys
import zlib
from datetime import timedelta
from functools import partial

signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # no traceback, not of these imports either

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from diffusion import SCHEDULES, Diffusion, generator, randn
from model import load_checkpoint, pick_device, write

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TTY = sys.stderr.isatty()


def say(message):
    if RANK == 0:
        print(message, file=sys.stderr)


def fail(message, status=1):
    if RANK == 0 or dist.is_initialized():  # from then on what is wrong may be so on one alone
        print(f"sample.py: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse(argv):
    """-> the flags, and the ending of --out, which says what to make."""
    flags = argparse.ArgumentParser(
        usage="[torchrun] sample.py [flags]",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, 2, 26, 100),
    )
    flags.error = lambda message: fail(message, 2)
    add = flags.add_argument
    add("--ckpt", metavar="FILE|DIR", help="checkpoint or run (the newest in runs/, or assets/)")
    add("--n", type=int, default=64, metavar="N", help="images")
    add("--steps", type=int, metavar="N", help="of the sampler (250, or the T of the process)")
    add("--method", choices=["ancestral", "ddim"], default="ancestral", help="sampler")
    add("--variance", choices=["learned", "small", "large"], help="of p (the checkpoint's)")
    add("--eta", type=float, default=0.0, metavar="X", help="noise of DDIM, 0 … 1")
    add("--class", type=int, metavar="K", help="class from 0 (each in turn)")
    add("--seed", type=int, default=0, metavar="N", help="of the images")
    add("--batch", type=int, default=64, metavar="N", help="images at a time, a process")
    add("--out", default="samples.png", metavar="PATH", help="X.png, X.gif, X.npz or a folder")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of matrix products")
    add = flags.add_argument_group("what a plain state dict does not say").add_argument
    add("--T", type=int, metavar="N", help="timesteps it was trained on (the checkpoint's)")
    add("--schedule", choices=list(SCHEDULES), help="noise schedule (the checkpoint's)")
    add("--time-scale", type=float, metavar="X", help="of t for the network (the checkpoint's)")
    add("--num-heads", type=int, default=4, metavar="N", help="heads of attention")
    args = flags.parse_args(argv)
    limits = {"eta": (0, 1), "seed": (0, 2**32 - 1), "class": (0, 10**6), "T": (2, 10**5),
              "time_scale": (0, 1e6)}  # fmt: skip
    for name, value in vars(args).items():
        low, high = limits.get(name, (1, 10**8))
        if isinstance(value, int | float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must be {low} … {high}, not {value}", 2)
    kind = os.path.splitext(args.out)[1].lower()
    if args.eta and args.method != "ddim":
        fail("--eta is for --method ddim", 2)
    if not args.out or kind not in (".png", ".gif", ".npz", "") or kind and os.path.isdir(args.out):
        fail(f"--out {args.out} must be X.png, X.gif or X.npz, or a folder", 2)
    if kind == ".npz" and os.path.exists(args.out):
        fail(f"--out {args.out} exists: remove it, or take another name")
    if kind in (".png", ".gif") and args.n > 4096:
        fail(f"--n {args.n} is too much for a picture: take --out X.npz or a folder", 2)
    return args, kind


def newest_checkpoint():
    """The file of the newest run under runs/, else the one in assets/."""
    found = sorted(glob.glob("runs/*/ckpt.pt"), key=os.path.getmtime)
    found = found or glob.glob(os.path.join(os.path.dirname(__file__), "assets", "*.pt"))
    if not found:
        fail("no checkpoint in runs/ or assets/: run train.py first, or give --ckpt")
    return os.path.relpath(found[-1])


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> uint8 array (N, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def make_grid(images):
    """uint8 (N, H, W, C) -> one nearly square Image; small images are enlarged to be seen."""
    n, h, w, c = images.shape
    columns = math.ceil(n**0.5)
    cells = np.pad(images, ((0, -n % columns), (0, 1), (0, 1), (0, 0)))
    grid = cells.reshape(-1, columns, h + 1, w + 1, c).swapaxes(1, 2)
    grid = grid.reshape(-1, columns * (w + 1), c)[:-1, :-1]
    zoom = max(1, 64 // h)
    return Image.fromarray(grid.repeat(zoom, 0).repeat(zoom, 1))


def is_done(path, about):
    """Whether an earlier call drew this PNG. Fails if it did so with other settings."""
    with contextlib.suppress(OSError), Image.open(path) as image:
        for key, value in about.items():
            if image.info.get(key) != value:
                fail(f"{path} was drawn with another {key}: take another --out")
        return True
    return False


def main():
    args, kind = parse(sys.argv[1:])
    path = args.ckpt or newest_checkpoint()
    model, process = load_checkpoint(path, args.schedule, args.T, args.time_scale, args.num_heads)
    classes, size = model.config.num_classes, model.config.image_size
    weights = zlib.crc32(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    steps = args.steps or min(250, process["T"])
    labels = torch.arange(args.n) % (classes or 1)
    if (label := vars(args)["class"]) is not None:
        labels.fill_(label)
        if label >= (classes or 0):
            fail(f"--class {label}: the network has {classes or 'no'} classes, from 0", 2)
    device, autocast = pick_device(args.device, args.dtype)
    process |= {"variance": args.variance or process["variance"], "steps": steps}
    diffusion = Diffusion(**process).to(device)
    model.to(device)
    say(f"{path}: {args.n} images in {steps} steps on {device}")
    if WORLD > 1:
        # For finished images; drawing them needs no exchange, and may take one process days longer.
        dist.init_process_group("gloo", timeout=timedelta(days=9))

    about = {key: str(vars(args)[key]) for key in ("seed", "method", "eta", "class")}
    about |= {"weights": f"{weights:08x}"} | {key: str(value) for key, value in process.items()}
    png = PngInfo()
    for key, value in (about | {"checkpoint": path}).items():
        png.add_text(key, value)
    files = [os.path.join(args.out, f"{i:06}.png") for i in range(args.n)]
    folder = os.path.dirname(os.path.abspath(args.out if kind else files[0]))
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        fail(f"--out {args.out}: cannot write there")
    mine = [i for i in range(RANK, args.n, WORLD) if kind or not is_done(files[i], about)]
    if kind == ".gif":  # its frames hold all images
        mine, args.batch = list(range(args.n)) * (RANK == 0), args.n
    images, frames = np.zeros((args.n if kind else 0, size, size, 3), np.uint8), []
    starts = range(0, len(mine), args.batch)
    screen = sys.stderr if TTY and RANK == 0 else open(os.devnull, "w")
    bar = tqdm(total=len(starts) * steps, unit="step", file=screen)
    for start in starts:
        indices = mine[start : start + args.batch]
        generators = [generator(args.seed, i, device) for i in indices]
        noise = randn((3, size, size), generators)
        y = labels[indices].to(device) if classes else None
        walk = diffusion.trajectory(model, noise, y, args.method, args.eta, generators=generators)
        with autocast:
            for i, x, _ in walk:
                if kind == ".gif" and i % math.ceil(steps / 40) == 0:
                    frames.append(make_grid(to_uint8(x)))
                bar.update()
        for i, image in zip(indices, to_uint8(x)):
            if kind:
                images[i] = image
            else:
                write(files[i], partial(Image.fromarray(image).save, format="png", pnginfo=png))
        if not TTY:
            say(str(bar))
    bar.close()
    if WORLD > 1:
        dist.all_reduce(torch.from_numpy(images))
        dist.destroy_process_group()
    if RANK > 0:
        return
    if kind == ".png":
        write(args.out, partial(make_grid(images).save, format="png", pnginfo=png))
    elif kind == ".npz":
        arrays = [images, labels.numpy()] if classes else [images]
        write(args.out, lambda file: np.savez(file, *arrays))
    elif kind == ".gif":
        times = [60] * (len(frames) - 1) + [2000]  # ms
        write(args.out, partial(frames[0].save, format="gif", save_all=True, loop=0,
                                append_images=frames[1:], duration=times))  # fmt: skip
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        fail(str(error))
