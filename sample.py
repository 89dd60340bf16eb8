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
import sys

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from diffusion import Diffusion, generator
from model import load_checkpoint, pick_device

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TTY = sys.stderr.isatty()


def say(message):
    if RANK == 0:
        print(message, file=sys.stderr)


def fail(message, status=1):
    say(f"sample.py: error: {message}")
    raise SystemExit(status)


def parse(argv):
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
    add("--eta", type=float, default=0.0, metavar="X", help="noise of DDIM, 0 … 1")
    add("--class", type=int, dest="label", metavar="K", help="class from 0 (each in turn)")
    add("--seed", type=int, default=0, metavar="N", help="of the images")
    add("--batch", type=int, default=64, metavar="N", help="images at a time, a process")
    add("--out", default="samples.png", metavar="PATH", help="X.png, X.gif, X.npz or a folder")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of matrix products")
    add = flags.add_argument_group("for a plain state dict, which does not say").add_argument
    add("--T", type=int, metavar="N", help="timesteps it was trained on")
    add("--schedule", choices=["cosine", "linear"], help="noise schedule")
    add("--time-scale", type=float, metavar="X", help="of t for the network (1000/T)")
    add("--num-heads", type=int, default=4, metavar="N", help="heads of attention")
    args = flags.parse_args(argv)
    for name, low, high in (
        ("n", 1, 10**8), ("steps", 1, 10**6), ("eta", 0, 1), ("seed", 0, 2**32 - 1),
        ("label", 0, 10**6), ("batch", 1, 10**6), ("T", 2, 10**6), ("time_scale", 0, 1e6), ("num_heads", 1, 10**4),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            name = name.replace("label", "class").replace("_", "-")
            fail(f"--{name} must be between {low} and {high}, not {value}", 2)
    if args.eta and args.method != "ddim":
        fail("--eta is for --method ddim", 2)
    return args


def find_checkpoint(path):
    """The file that --ckpt names; without it, that of the newest run, or the one in assets/."""
    if path is None:
        here = os.path.dirname(os.path.abspath(__file__))
        runs = sorted(glob.glob("runs/*/ckpt.pt"), key=os.path.getmtime)
        found = runs or sorted(glob.glob(os.path.join(here, "assets", "*.pt")))
        if not found:
            fail("no checkpoint in runs/ or assets/: run train.py first, or give --ckpt")
        return found[-1]
    return os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), on the CPU."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return x.permute(0, 2, 3, 1).cpu()


def make_grid(images):
    """uint8 (N, H, W, C) -> one nearly square Image; small images are enlarged to be seen."""
    n, h, w, c = images.shape
    columns = math.ceil(n**0.5)
    rows = math.ceil(n / columns)
    cells = np.zeros((rows * columns, h + 1, w + 1, c), np.uint8)
    cells[:n, :h, :w] = images
    grid = cells.reshape(rows, columns, h + 1, w + 1, c).swapaxes(1, 2)
    grid = grid.reshape(rows * (h + 1), columns * (w + 1), c)[:-1, :-1]
    zoom = max(1, 64 // h)
    return Image.fromarray(grid.repeat(zoom, 0).repeat(zoom, 1))


def write(path, save):
    """save(file), then give the file its name, so that no half of it ever has it."""
    try:
        with open(path + ".tmp", "wb") as file:
            save(file)
        os.replace(path + ".tmp", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".tmp")


def write_png(path, image, about):
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, value)
    write(path, lambda file: image.save(file, "png", pnginfo=info))


def is_done(path, about):
    """Whether an earlier call drew this file. Fails if it did so with other settings."""
    if os.path.exists(path):
        with Image.open(path) as image:
            for key, value in about.items():
                if image.info.get(key) != value:
                    fail(f"{path} was drawn with another {key}: take another --out")
    return os.path.exists(path)


def main():
    args = parse(sys.argv[1:])
    kind = os.path.splitext(args.out)[1].lower()
    if kind not in (".png", ".gif", ".npz", ""):
        fail(f"--out {args.out} must end in .png, .gif or .npz, or be a folder", 2)
    if kind and os.path.isdir(args.out):
        fail(f"--out {args.out} is a folder", 2)
    if kind == ".npz" and os.path.exists(args.out):
        fail(f"--out {args.out} exists: remove it, or take another name")
    if kind in (".png", ".gif") and args.n > 4096:
        fail(f"--n {args.n} is too much for a picture: take --out X.npz or a folder", 2)
    path = find_checkpoint(args.ckpt)
    model, process = load_checkpoint(path, args.schedule, args.T, args.time_scale, args.num_heads)
    classes, size = model.config.num_classes, model.config.image_size
    steps = args.steps or min(250, process["T"])
    if args.label is not None and args.label >= (classes or 0):
        fail(f"--class {args.label}: the network has {classes or 'no'} classes, from 0", 2)
    device, autocast = pick_device(args.device, args.dtype)
    diffusion = Diffusion(**process | {"steps": steps}).to(device)
    model.to(device)
    say(f"{path}: {args.n} images in {steps} steps on {device}")
    if WORLD > 1:
        dist.init_process_group("gloo")  # for finished images; drawing them needs no exchange

    labels = torch.arange(args.n) % (classes or 1)
    labels = labels if args.label is None else torch.full_like(labels, args.label)
    about = dict(checkpoint=path, seed=args.seed, steps=steps, method=args.method, eta=args.eta)
    about = {key: str(value) for key, value in (about | {"class": args.label}).items()}
    todo = list(range(args.n))
    files = [os.path.join(args.out, f"{i:06}.png") for i in todo]
    if not kind:
        os.makedirs(args.out, exist_ok=True)
        todo = [i for i in todo if not is_done(files[i], about)]
    todo, batch = todo[RANK::WORLD], args.n if kind == ".gif" else args.batch
    images, frames = torch.zeros(args.n if kind else 0, size, size, 3, dtype=torch.uint8), []
    starts = range(0, len(todo), batch)
    bar = tqdm(total=len(starts) * steps, unit="step", disable=not TTY or RANK > 0)
    for start in starts:
        indices = todo[start : start + batch]
        generators = [generator(args.seed, i, device) for i in indices]
        noise = [torch.randn(3, size, size, generator=g, device=device) for g in generators]
        y = labels[indices].to(device) if classes else None
        with autocast:
            for i, x, _ in diffusion.trajectory(
                model, torch.stack(noise), y, args.method, args.eta, generators=generators
            ):  # fmt: skip
                if kind == ".gif" and i % math.ceil(steps / 40) == 0:
                    frames.append(make_grid(to_uint8(x)))
                bar.update()
        if kind:
            images[indices] = to_uint8(x)
        else:
            for i, image in zip(indices, to_uint8(x).numpy()):
                write_png(files[i], Image.fromarray(image), about)
    bar.close()
    if WORLD > 1:
        dist.all_reduce(images)
        dist.destroy_process_group()
    if RANK > 0:
        return
    if kind == ".png":
        write_png(args.out, make_grid(images.numpy()), about)
    elif kind == ".npz":
        arrays = [images.numpy()] + ([labels.numpy()] if classes else [])
        write(args.out, lambda file: np.savez(file, *arrays))
    elif kind == ".gif":
        times = [60] * (len(frames) - 1) + [2000]  # milliseconds; the last stays
        rest = dict(save_all=True, append_images=frames[1:], duration=times, loop=0)
        write(args.out, lambda file: frames[0].save(file, "gif", **rest))
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        fail(str(error))
