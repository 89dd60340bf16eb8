"""Draw images from a checkpoint.

    python sample.py --n 64                        a grid, from the newest run or the one in assets/
    python sample.py --class 7 --guidance 2        class 7 alone, with guidance
    python sample.py --order 1 --steps 250         the paper's sampler; with --method ddim, DDIM
    python sample.py --n 16 --out denoising.gif    from noise to image, as a film
    python sample.py --low-res small.npz           an upsampler's large images of small ones
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out DIR    or X.npz; DIR is resumed

Up to rounding, image i of a seed is the same whatever the batch and the number of ranks. torchrun
would take --n for a flag of its own: hence the -- before sample.py.
"""

import contextlib
import glob
import os
import signal
import sys
import tempfile
import zlib
from argparse import Namespace
from functools import partial

if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # Ctrl-C ends without a traceback
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion import (
    FEW_STEPS, FEW_STEPS_SAMPLER, FEW_STEPS_SPACING, METHODS, SCHEDULES, Diffusion, few_steps,
    generator, guided, randn,
)  # fmt: skip
from model import (
    DEVICES, DTYPES, RANK, WORLD, agree, autocast, checksum, draw_grid, load_checkpoint, load_npz,
    parse_flags, pick_device, pick_dtype, progress_bar, read_picture, report, run_script, say, some,
    to_pixels, within, write,
)  # fmt: skip
from sampler import gather

whole = within(1, 10**8)
FLAGS = {
    "what to draw": [
        ("ckpt", None, dict(metavar="FILE|DIR"), "checkpoint (default: the newest in runs/, else in assets/)"),
        ("n", None, whole, "images (default: 64; with --low-res, one for each small image)"),
        ("class", None, dict(metavar="NAME|K"), "the class to draw (default: all classes in turn)"),
        ("guidance", 1.0, within(0, 100, float), "scale of classifier-free guidance; 1 for none, 0 for no class"),
        ("low_res", None, dict(metavar="PATH"), "an upsampler's small images: X.npz, picture, folder"),
        ("seed", 0, within(0, 2**32 - 1), "the seed of the images"),
        ("out", "samples.png", dict(metavar="PATH"), "X.png (a grid), X.gif, X.npz or a folder (resumed)"),
    ],
    "the sampler": [
        ("steps", None, whole, f"the most network calls an image (default: {FEW_STEPS})"),
        ("spacing", None, within(1, 10, float), f"spacing of the steps: 1 is even, 3 is denser near t = 0 (default: {FEW_STEPS_SPACING}; with --order 1: 1)"),
        ("method", FEW_STEPS_SAMPLER["method"], dict(choices=METHODS), "sampler"),
        ("order", FEW_STEPS_SAMPLER["order"], within(1, 2), "1, or 2, which is more exact and takes no more calls"),
        ("eta", 0.0, within(0, 1, float), "noise of DDIM; 1 is as much as --variance small"),
        ("variance", None, dict(choices=("learned", "small", "large")), "variance of a step, for --order 1 (default: the checkpoint's)"),
        ("batch", 64, whole, "images at a time, on each rank"),
        ("device", "auto", DEVICES, "where to compute"),
        ("dtype", "auto", DTYPES, "precision of matrix products"),
    ],
    "what a plain state dict does not say": [
        ("T", None, within(2, 10**5), "timesteps that it was trained on"),
        ("schedule", None, dict(choices=SCHEDULES), "its noise schedule"),
        ("time_scale", None, within(0, 1e6, float), "the network is given t·X (default: t·1000/T)"),
        ("num_heads", None, within(1, 4096), "heads of attention (default: 4)"),
    ],
}  # fmt: skip


def main():
    given, preset = parse_flags("[torchrun] sample.py [flags]", FLAGS, sys.argv[1:], lambda _: {})
    args = Namespace(**preset | given)
    path = args.ckpt = args.ckpt or newest_checkpoint()
    model, process = load_checkpoint(path, args.schedule, args.T, args.time_scale, args.num_heads)
    check(args, model.config, process)
    small, labels = choose_inputs(args, model.config)
    few = few_steps(process["T"], model.config.image_size)
    if args.order == 1:  # the paper's sampler begins at the last timestep, and its steps are even
        few |= {"min_alpha_bar": 0.0, "spacing": 1.0}
    typed = {name: vars(args)[name] for name in ("steps", "spacing", "variance")}
    process |= few | {name: value for name, value in typed.items() if value is not None}
    diffusion, weights = Diffusion(**process), checksum(model)
    about = describe(args, process, weights, model.config.class_names, labels, small)
    kind = kind_of_output(args)
    device = pick_device(args.device)
    agree(weights, f"weights in {path}: the file has changed, start again")
    say(f"{path}: {args.n} images in {diffusion.num_steps} steps on {device}")

    # Each rank draws its own share of the images; a folder is resumed where it was left.
    mine = list(range(RANK, args.n, WORLD))
    last = diffusion.num_steps - 1
    shown = {round(i) for i in np.linspace(last, 0, 40)} if kind == ".gif" else {0}
    if kind == "folder":
        names = [f"{i:06}.png" for i in range(args.n)]
        paths = {i: os.path.join(args.out, names[i]) for i in mine}
        mine = [i for i in mine if not is_done(paths[i], about(i))]
        if there := int(gather(torch.tensor([len(paths) - len(mine)])).sum()):
            say(f"{args.out} holds {there} of these images already")
        others = sorted(set(os.listdir(args.out)) - set(names))
        if others := [name for name in others if not name.endswith(".tmp")]:
            say(f"{args.out} holds {len(others)} other files: {some(others, 3)}")
    drawn = draw(args, model.to(device), diffusion.to(device), small, labels, mine, shown)
    if kind == "folder":
        for i, frames in drawn:
            save_png(paths[i], Image.fromarray(frames[-1].permute(1, 2, 0).numpy()), about(i))
    else:
        size = model.config.image_size
        pixels = torch.zeros(args.n, len(shown), 3, size, size, dtype=torch.uint8)
        for i, frames in drawn:
            pixels[i] = frames
        if WORLD > 1:
            dist.all_reduce(pixels)  # the images of other ranks are 0 here
        if RANK == 0:
            save_together(args.out, kind, pixels, labels, model.config.class_names, about(None))
    gather(torch.zeros(1))  # the other ranks have drawn their share, too
    report(args.out)


def draw(args, model, diffusion, small, labels, indices, shown):
    """Yield (i, frames) for each index: uint8 (F, 3, H, W), a frame for each step in `shown`."""
    device, size = diffusion.alphas_bar.device, model.config.image_size
    dtype = pick_dtype(args.dtype, device)
    net = guided(model, args.guidance) if args.guidance != 1 else model
    bar = progress_bar(total=len(indices), unit=" images")
    for start in range(0, len(indices), args.batch):
        part = indices[start : start + args.batch]
        generators = [generator(args.seed, i, device) for i in part]
        noise = randn((3, size, size), generators)
        y = None if labels is None else labels[part].to(device)
        net_part = net if small is None else partial(net, low_res=small[part].to(device))
        walk = diffusion.trajectory(
            net_part, noise, y, args.method, args.eta, args.order, generators=generators
        )
        with autocast(device, dtype):
            frames = [to_pixels(x) for step, x, _ in walk if step in shown]
        yield from zip(part, torch.stack(frames, dim=1))
        bar.update(len(part))


# ---- What is drawn, and where it goes ------------------------------------------------------------


def check(args, config, process):
    """Refuse flags that contradict each other or the checkpoint."""
    if args.variance == "learned" and config.out_channels == 3:
        raise ValueError("--variance learned: the checkpoint predicts no variance")
    if args.eta and args.method != "ddim":
        raise ValueError("--eta is for --method ddim")
    if args.variance and (args.order == 2 or args.method == "ddim"):
        raise ValueError("--variance needs --order 1 and --method ancestral")
    if args.steps and args.steps > process["T"]:
        raise ValueError(f"--steps {args.steps}: {args.ckpt} has T = {process['T']}")


def kind_of_output(args):
    """What --out asks for: ".png", ".gif", ".npz" or "folder", which is made. Refuses what could
    not be drawn or written, before anything is drawn."""
    suffix = os.path.splitext(args.out)[1].lower()
    kind = suffix if suffix in (".png", ".gif", ".npz") else "folder"
    if kind == "folder" and "." in os.path.basename(args.out) and not os.path.isdir(args.out):
        raise ValueError(f"--out {args.out} must be X.png, X.gif or X.npz, or a folder")
    if args.n > 4096 and kind in (".png", ".gif"):
        raise ValueError(f"--n {args.n} is too much for a picture: take --out X.npz or a folder")
    if kind == ".npz" and os.path.exists(args.out):
        raise ValueError(f"--out {args.out} exists: remove it, or take another name")
    folder = args.out if kind == "folder" else os.path.dirname(os.path.abspath(args.out))
    if kind != "folder" and os.path.isdir(args.out):
        raise ValueError(f"--out {args.out} is a folder, not a file to write")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out {args.out}: cannot write there ({error.strerror})") from error
    return kind


def newest_checkpoint():
    """The file of the newest run under runs/, else the one in assets/."""
    assets = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "digits.pt")
    found = filter(os.path.exists, glob.glob("runs/*/ckpt.pt"))
    return max(found, key=os.path.getmtime, default=os.path.relpath(assets))


def choose_inputs(args, config):
    """The small images (n, 3, s, s) or None, and the labels (n,) or None. Sets args.n by them."""
    known = config.class_names or tuple(map(str, range(config.num_classes or 0)))
    small, asked = None, vars(args)["class"]
    names = known  # of the classes of image 0, 1, …, in turn
    if (args.low_res is None) != (config.low_res is None):
        needs = "needs" if config.low_res else "has no use for"
        raise ValueError(f"{args.ckpt} {needs} --low-res")
    if args.low_res is not None:
        small, names = load_small(args.low_res, config.low_res)
        args.n = args.n or len(small)
        small = small[torch.arange(args.n) % len(small)]
    args.n = args.n or 64
    if not known:
        if asked is not None or args.guidance != 1:
            raise ValueError(f"--class, --guidance: {args.ckpt} knows no classes")
        return small, None
    if args.guidance != 1 and not config.label_dropout:
        raise ValueError(f"--guidance: {args.ckpt} was trained without --label-dropout")
    names = names if asked is None else [asked]
    if names is None:
        raise ValueError(f"--class is needed: {args.low_res} has no classes, as .npz files may")
    # A class is meant by its name, or else by its number.
    number = {str(k): k for k in range(len(known))} | {name: k for k, name in enumerate(known)}
    if unknown := [name for name in names if name not in number]:
        where = args.low_res if asked is None else "--class"
        raise ValueError(f"{where} {unknown[0]}: {args.ckpt} has the classes {some(known)}")
    labels = torch.tensor([number[name] for name in names])
    return small, labels[torch.arange(args.n) % len(labels)]


def load_small(path, size):
    """Small images (N, 3, size, size) in [-1, 1] of an .npz file, a picture or a folder of
    pictures, and the names of their classes, which only an .npz file has, or None."""
    if path.lower().endswith(".npz"):
        images, names = load_npz(path)
    else:
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, f) for f in sorted(os.listdir(path)) if f[0] != "."]
        images, names = [np.asarray(read_picture(f)).transpose(2, 0, 1) for f in files], None
    wrong = [image.shape for image in images if image.shape != (3, size, size)]
    if wrong or not len(images):
        found = f"{wrong[0][2]} × {wrong[0][1]}" if wrong else "none"
        raise ValueError(f"--low-res {path}: images must be {size} × {size}; found {found}")
    return torch.from_numpy(np.stack(images)).float() / 127.5 - 1, names


def describe(args, process, weights, names, labels, small):
    """A function of i: what a PNG says of the image that it holds, {key: text}."""
    settings = {name: vars(args)[name] for name in ("seed", "method", "order", "eta", "guidance")}
    settings |= process | {"weights": f"{weights:08x}"}

    def about(i):
        label = {}
        if i is not None and labels is not None:
            label = {"label": int(labels[i])}
            label |= {"class": names[labels[i]]} if names else {}
        if i is not None and small is not None:
            label |= {"low_res": f"{zlib.crc32(small[i].contiguous().numpy()):08x}"}
        return {key: str(value) for key, value in (settings | label).items()}

    return about


def is_done(path, about):
    """Whether an earlier call drew this PNG. ValueError if it did so with other settings."""
    with contextlib.suppress(OSError, SyntaxError), Image.open(path) as image:
        image.load()  # a picture that was cut short is drawn again
        for key, value in about.items():
            if image.info.get(key) != value:
                was = f"{path} was drawn with another {key}: {image.info.get(key)}, now {value}"
                raise ValueError(f"{was}; take another --out")
        return True
    return False


def save_png(path, picture, about):
    """Write a picture with what is known of it."""
    notes = PngInfo()
    for key, value in about.items():
        notes.add_itxt(key, value)
    write(path, partial(picture.save, format="png", pnginfo=notes))


def save_together(path, kind, pixels, labels, names, about):
    """Write images uint8 (N, F, C, H, W) to one file: the last frame, or all F as a film."""
    if kind == ".png":
        save_png(path, draw_grid(pixels[:, -1]), about)
    elif kind == ".gif":
        film = [draw_grid(frame) for frame in pixels.unbind(1)]
        times = [60] * (len(film) - 1) + [2000]  # milliseconds
        save = partial(film[0].save, format="gif", save_all=True, append_images=film[1:])
        write(path, partial(save, loop=0, duration=times))
    else:
        arrays = dict(arr_0=pixels[:, -1].permute(0, 2, 3, 1), arr_1=labels, class_names=names)
        known = {name: array for name, array in arrays.items() if array is not None}
        write(path, lambda file: np.savez(file, **known))


if __name__ == "__main__":
    run_script(main)
