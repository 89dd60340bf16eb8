"""Draw images from a checkpoint.

    python sample.py --n 64                        a grid, from the newest run or the one in assets/
    python sample.py --class 7 --guidance 2        class 7 alone, more of its kind
    python sample.py --order 1 --steps 250         the paper's sampler; --method ddim for DDIM
    python sample.py --n 16 --out denoising.gif    the way there
    python sample.py --low-res small.npz           an upsampler's large images of small ones
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out DIR    or X.npz; DIR is resumed

Image i of a seed is the same whatever the batch and the number of ranks.
"""

import contextlib
import glob
import os
import signal
import sys
import zlib
from argparse import Namespace
from datetime import timedelta
from functools import partial

signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # no traceback, not of these imports either

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from diffusion import (
    FEW_STEPS, FEW_STEPS_SAMPLER, SCHEDULES, Diffusion, generator, guided, randn,
)  # fmt: skip
from model import (
    RANK, TTY, WORLD, UsageError, autocast, draw_grid, join_ranks, load_checkpoint, make_parser,
    pick_device, pick_dtype, report, run_script, say, to_pixels, within, write,
)  # fmt: skip

whole = within(1, 10**8)
FLAGS = {
    "what to draw": [
        ("ckpt", None, "FILE|DIR", "checkpoint or run; the newest in runs/, or the one in assets/"),
        ("n", 64, whole, "images; with --low-res, one for each small image if not given"),
        ("class", None, "NAME|K", "the class of all images, by name or number; each in turn"),
        ("guidance", 1.0, within(0, 100, float), "scale of classifier-free guidance; 1: none"),
        ("low_res", None, "PATH", "an upsampler's small images: X.npz, a picture or a folder"),
        ("seed", 0, within(0, 2**32 - 1), "of the images"),
        ("out", "samples.png", "PATH", "X.png (a grid), X.gif, X.npz or a folder"),
    ],
    "the sampler": [
        ("steps", FEW_STEPS["steps"], whole, "steps, each one call of the network"),
        ("spacing", FEW_STEPS["spacing"], within(1, 10, float), "of the steps: 1 even, 3 cubic"),
        ("method", FEW_STEPS_SAMPLER["method"], ("ancestral", "ddim"), "sampler"),
        ("order", FEW_STEPS_SAMPLER["order"], (1, 2), "2: extrapolate from the step before"),
        ("eta", 0.0, within(0, 1, float), "noise of DDIM; 1: as much as ancestral"),
        ("variance", None, ("learned", "small", "large"), "of p; the checkpoint's"),
        ("batch", 64, whole, "images at a time, on each rank"),
        ("device", "auto", ("auto", "cpu", "cuda", "mps"), "where to compute"),
        ("dtype", "auto", ("auto", "fp32", "bf16", "fp16"), "of matrix products"),
    ],
    "what a plain state dict does not say": [
        ("T", None, within(2, 10**5), "timesteps it was trained on; the checkpoint's"),
        ("schedule", None, tuple(SCHEDULES), "noise schedule; the checkpoint's"),
        ("time_scale", None, within(0, 1e6, float), "of t for the network; the checkpoint's"),
        ("num_heads", 4, within(1, 4096), "heads of attention"),
    ],
}  # fmt: skip
FORMATS = {".png": "grid", ".gif": "film", ".npz": "arrays", "": "folder"}


def main():
    args = parse(sys.argv[1:])
    path = args.ckpt or newest_checkpoint()
    model, process = load_checkpoint(path, args.schedule, args.T, args.time_scale, args.num_heads)
    small, labels = choose_inputs(args, model.config)
    steps = min(args.steps, process["T"])
    process |= {"variance": args.variance or process["variance"]}
    about = describe(args, model, process | {"steps": steps}, labels)
    check_out(args)
    device = pick_device(args.device)
    join_ranks(device, timedelta(days=9))  # drawing needs no exchange, and ranks may be days apart
    begin = FEW_STEPS["min_alpha_bar"] if args.order == 2 else 0.0
    diffusion = Diffusion(**process, steps=steps, spacing=args.spacing, min_alpha_bar=begin)
    say(f"{path}: {args.n} images in {steps} steps on {device}")

    # Each rank draws the images of its own; a folder is resumed where it was left.
    mine = range(RANK, args.n, WORLD)
    if args.kind == "folder":
        mine = [i for i in mine if not is_done(png_path(args, i), about(i))]
    shown = {0}  # the steps after which an image is kept
    if args.kind == "film":
        shown = {round(i) for i in np.linspace(diffusion.num_steps - 1, 0, 40)}
    drawn = draw(args, model.to(device), diffusion.to(device), small, labels, mine, shown)
    if args.kind == "folder":
        for i, frames in drawn:
            save_png(png_path(args, i), frames[-1], about(i))
    else:
        size = model.config.image_size
        pixels = torch.zeros(args.n, len(shown), 3, size, size, dtype=torch.uint8)
        for i, frames in drawn:
            pixels[i] = frames
        if WORLD > 1:
            dist.all_reduce(pixels)
        if RANK == 0:
            save_together(args, pixels, labels, model.config.class_names, about(None))
    report(args.out)


def draw(args, model, diffusion, small, labels, indices, shown):
    """Yield (i, frames) for each index: uint8 (F, C, H, W), one frame for each step in `shown`."""
    device, size = diffusion.alphas_bar.device, model.config.image_size
    net = guided(model, args.guidance) if args.guidance != 1 else model
    bar = tqdm(total=len(indices), unit=" images", disable=not TTY or RANK > 0)
    for start in range(0, len(indices), args.batch):
        part = list(indices[start : start + args.batch])
        generators = [generator(args.seed, i, device) for i in part]
        noise = randn((model.config.in_channels, size, size), generators)
        y = None if labels is None else labels[part].to(device)
        net_part = net if small is None else partial(net, low_res=small[part].to(device))
        walk = diffusion.trajectory(
            net_part, noise, y, args.method, args.eta, args.order, generators=generators
        )
        with autocast(device, pick_dtype(args.dtype, device)):
            frames = [to_pixels(x) for i, x, _ in walk if i in shown]
        yield from zip(part, torch.stack(frames, dim=1))
        bar.update(len(part))


# ---- What is drawn -----------------------------------------------------------------------------


def parse(argv):
    """The flags, as a Namespace; `kind` is what --out asks for."""
    preset = {name: value for rows in FLAGS.values() for name, value, *_ in rows}
    parser = make_parser("[torchrun] sample.py [flags]", FLAGS, preset)
    given = vars(parser.parse_args(argv))
    if "help" in given:
        parser.print_help()
        raise SystemExit
    args = Namespace(**preset | given, n_given="n" in given)
    args.kind = FORMATS.get(os.path.splitext(args.out)[1].lower())
    if not args.out or args.kind is None or (args.kind != "folder" and os.path.isdir(args.out)):
        raise UsageError(f"--out {args.out} must be X.png, X.gif or X.npz, or a folder")
    if args.eta and args.method != "ddim":
        raise UsageError("--eta is for --method ddim")
    if args.n > 4096 and args.kind in ("grid", "film"):
        raise UsageError(f"--n {args.n} is too much for a picture: take --out X.npz or a folder")
    return args


def newest_checkpoint():
    """The file of the newest run under runs/, else the one in assets/."""
    found = sorted(glob.glob("runs/*/ckpt.pt"), key=os.path.getmtime)
    assets = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "digits.pt")
    return found[-1] if found else os.path.relpath(assets)


def choose_inputs(args, config):
    """The small images (n, 3, s, s) in [-1, 1] or None, and the labels (n,) or None; sets args.n."""
    small = labels = None
    if (args.low_res is None) != (config.low_res is None):
        what = "needs --low-res" if config.low_res else "is no upsampler: leave out --low-res"
        raise UsageError(f"the network {what}")
    if args.low_res is not None:
        small, labels = load_small(args.low_res, config.low_res)
        args.n = args.n if args.n_given else len(small)
        places = torch.arange(args.n) % len(small)
        small, labels = small[places], None if labels is None else labels[places]
    classes, name = config.num_classes, vars(args)["class"]
    if name is None and args.guidance == 1 and not classes:
        return small, None
    if not classes:
        raise UsageError(f"{'--guidance' if name is None else '--class'}: the network has no classes")
    if args.guidance != 1 and not config.label_dropout:
        raise UsageError("--guidance: the network was trained without --label-dropout")
    names = list(config.class_names or map(str, range(classes)))
    if name is None:
        if labels is not None and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{args.low_res} has labels beyond the network's {classes} classes")
        if small is not None and labels is None:
            raise UsageError(f"--class: {args.low_res} does not tell the class of its images")
        return small, torch.arange(args.n) % classes if labels is None else labels
    k = names.index(name) if name in names else int(name) if name.isdecimal() else classes
    if k >= classes:
        known = ", ".join(names[:10]) + ", …" * (classes > 10)
        raise UsageError(f"--class {name}: the network's {classes} classes are {known}")
    return small, torch.full((args.n,), k)


def load_small(path, size):
    """Small images (N, 3, size, size) in [-1, 1] of an .npz file, a picture or a folder of
    pictures, and the labels that the file holds, or None."""
    labels = None
    if path.endswith(".npz"):
        with np.load(path) as file:
            images = file["arr_0"]
            labels = torch.from_numpy(file["arr_1"]) if "arr_1" in file else None
    else:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [""]
        files = [os.path.join(path, name) if name else path for name in names if name[:1] != "."]
        images = []
        for file in files:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB")))
    for image in images:
        if image.shape != (size, size, 3):
            found = f"{image.shape[1]} × {image.shape[0]}"
            raise ValueError(f"--low-res {path}: images must be {size} × {size}, not {found}")
    if not len(images):
        raise ValueError(f"--low-res {path}: no images there")
    small = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return small.float() / 127.5 - 1, labels


# ---- Where it goes -----------------------------------------------------------------------------


def describe(args, model, process, labels):
    """A function of i: what a PNG says of the image that it holds, {key: text}."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    settings = {name: vars(args)[name] for name in ("seed", "method", "order", "eta", "guidance")}
    settings |= process | {"spacing": args.spacing, "weights": f"{zlib.crc32(flat.numpy()):08x}"}
    names = model.config.class_names

    def about(i):
        label = {}
        if i is not None and labels is not None:
            label = {"label": int(labels[i])}
            label |= {"class": names[labels[i]]} if names else {}
        return {key: str(value) for key, value in (settings | label).items()}

    return about


def check_out(args):
    """Make the folder of --out; refuse what could not be written, before anything is drawn."""
    if args.kind == "arrays" and os.path.exists(args.out):
        raise ValueError(f"--out {args.out} exists: remove it, or take another name")
    folder = args.out if args.kind == "folder" else os.path.dirname(os.path.abspath(args.out))
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise OSError(f"--out {args.out}: cannot write there")


def png_path(args, i):
    return os.path.join(args.out, f"{i:06}.png")


def is_done(path, about):
    """Whether an earlier call drew this PNG. ValueError if it did so with other settings."""
    with contextlib.suppress(OSError), Image.open(path) as image:
        for key, value in about.items():
            if image.info.get(key) != value:
                raise ValueError(f"{path} was drawn with another {key}: take another --out")
        return True
    return False


def save_png(path, pixels, about):
    """Write an image, uint8 (C, H, W), or a picture, with what is known of it."""
    notes = PngInfo()
    for key, value in about.items():
        notes.add_itxt(key, value)
    picture = pixels if isinstance(pixels, Image.Image) else to_pil_image(pixels)
    write(path, partial(picture.save, format="png", pnginfo=notes))


def save_together(args, pixels, labels, names, about):
    """Write images uint8 (N, F, C, H, W) to one file: the last frame, or all F as a film."""
    if args.kind == "grid":
        save_png(args.out, draw_grid(pixels[:, -1]), about)
    elif args.kind == "film":
        film = [draw_grid(frame) for frame in pixels.unbind(1)]
        times = [60] * (len(film) - 1) + [2000]  # milliseconds
        save = partial(film[0].save, format="gif", save_all=True, append_images=film[1:])
        write(args.out, partial(save, loop=0, duration=times))
    else:
        arrays = {"arr_0": pixels[:, -1].permute(0, 2, 3, 1).numpy()}
        arrays |= {} if labels is None else {"arr_1": labels.numpy()}
        arrays |= {} if labels is None or not names else {"class_names": np.array(names)}
        write(args.out, lambda file: np.savez(file, **arrays))


if __name__ == "__main__":
    run_script(main)
