"""Draw images from a checkpoint.

    python sample.py --n 64                        a grid, from the newest run or the one in assets/
    python sample.py --class 7 --guidance 2        class 7 alone, with guidance
    python sample.py --sampler ancestral           the paper's sampler, in 250 steps
    python sample.py --n 16 --out denoising.gif    from noise to image, as a film
    python sample.py --low-res small.npz           an upsampler's large images of small ones
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out DIR    or X.npz; DIR is resumed

Up to rounding, image i of a seed is the same whatever the batch and the number of ranks. torchrun
would take --n for a flag of its own: hence the -- before sample.py.
"""

import argparse
import glob
import os
import sys
import unicodedata
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from diffusion import (
    SAMPLERS, VARIANCES, Diffusion, few_steps, generator, guided, randn_like, start_upsampling,
)  # fmt: skip
from model import (
    DEVICES, DTYPES, RANK, WORLD, autocast, load_checkpoint, load_npz, make_picture, number,
    pick_device, pick_dtype, to_pixels,
)  # fmt: skip

positive = number(int, 1)
parser = argparse.ArgumentParser(
    allow_abbrev=False, description=__doc__, usage="[torchrun] sample.py [flags]",
    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 34, 100),
)  # fmt: skip
add = parser.add_argument
add("--ckpt", metavar="FILE|DIR", help="(default: the newest run in runs/, else assets/digits.pt)")
add("--n", type=positive, help="images (default: 64; with --low-res, one for each small image)")
add("--sampler", choices=SAMPLERS, default="dpm++", help="(default: dpm++; the learned variance "
    "serves only ancestral, and bits/dim)")  # fmt: skip
add("--steps", type=positive, help="calls of the network, at most (default: 25; ancestral: 250)")
add("--eta", type=number(float, 0, 1), help="share of noise, for ddim (default: 0)")
add("--variance", choices=VARIANCES, help="for ancestral (default: as trained)")
add("--class", dest="label", metavar="NAME|K", help="the class (default: all classes in turn)")
add("--guidance", type=number(float, 0), default=1, help="scale of guidance (default: 1, for none)")
add("--low-res", metavar="X.npz", help="the small images that an upsampler enlarges")
add("--seed", type=number(int, 0), default=0, help="the seed of all images (default: 0)")
add("--batch", type=positive, default=64, help="images at a time, on each rank (default: 64)")
add("--device", choices=DEVICES, default="auto", help="where to compute (default: auto)")
add("--dtype", choices=DTYPES, default="auto", help="precision of matrix products (default: auto)")
add("--out", metavar="PATH", default="samples.png", help="X.png, a grid; X.gif, the denoising; "
    "X.npz; or a folder, with a picture of each image (default: samples.png)")  # fmt: skip

def main():
    # What to draw, with what, and where it goes.
    args = parser.parse_args()
    args.ckpt = args.ckpt or newest_checkpoint()
    try:
        model, ckpt = load_checkpoint(args.ckpt)
    except ValueError as error:
        parser.error(str(error))
    diffusion, walk = choose_sampler(args, model.config, ckpt["diffusion"])
    small, labels = choose_inputs(args, model.config, ckpt)
    kind = kind_of_output(args.out)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, diffusion = model.to(device), diffusion.to(device)
    net = guided(model, args.guidance) if args.guidance != 1 else model
    if RANK == 0:
        print(f"{args.ckpt}: {args.n} images in {diffusion.num_steps} steps on {device}")

    # Each rank draws its share of the images; of a folder, those that are not there yet.
    mine, last = range(RANK, args.n, WORLD), diffusion.num_steps - 1
    if kind == "folder":
        mine = [i for i in mine if not os.path.exists(f"{args.out}/{i:06}.png")]
    shown = {round(i) for i in np.linspace(last, 0, 40)} if kind == ".gif" else {0}
    shape = model.config.in_channels, model.config.image_size, model.config.image_size
    drawn = torch.zeros(0 if kind == "folder" else args.n, len(shown), *shape, dtype=torch.uint8)
    for start in tqdm(range(0, len(mine), args.batch), "batches", disable=RANK > 0 or None):
        part = list(mine[start : start + args.batch])
        generators = [generator(args.seed, i, device) for i in part]
        noise = randn_like(torch.empty(len(part), *shape, device=device), generators)
        y = None if labels is None else labels[part].to(device)
        net_part = net
        if small is not None:
            low_res = small[part].to(device)
            net_part = partial(net, low_res=low_res)
            if args.sampler == "dpm++":
                noise = start_upsampling(diffusion, low_res, noise)
        with autocast(device, dtype):
            steps = walk(diffusion, net_part, noise, y, generators=generators)
            frames = [x for i, x, _ in steps if i in shown]
        try:
            pixels = torch.stack([to_pixels(x, part) for x in frames], dim=1)
        except FloatingPointError as error:
            sys.exit(f"{args.ckpt}: {error}")
        if kind == "folder":
            for i, image in zip(part, pixels[:, 0].permute(0, 2, 3, 1).numpy()):
                save(f"{args.out}/{i:06}.png", Image.fromarray(image).save, format="png")
        else:
            drawn[part] = pixels

    # One file of the images of all ranks: the last frames, or a film of all frames.
    if WORLD > 1:
        dist.all_reduce(drawn)  # the images of other ranks are 0 here
    if RANK == 0 and kind == ".npz":
        arrays = dict(arr_0=drawn[:, 0].permute(0, 2, 3, 1), arr_1=labels)
        arrays["class_names"] = ckpt["classes"]
        save(args.out, np.savez, **{k: array for k, array in arrays.items() if array is not None})
    elif RANK == 0 and kind != "folder":
        K = model.config.num_classes or 0  # if the classes come in turn, each has a column
        in_turn = 0 < K <= 20 and args.n % K == 0 and args.label is None and not args.low_res
        film = [make_picture(frame, K if in_turn else None) for frame in drawn.unbind(1)]
        times = [60] * (len(film) - 1) + [2000]  # milliseconds
        gif = dict(format="gif", save_all=True, append_images=film[1:], loop=0, duration=times)
        save(args.out, film[0].save, **(gif if kind == ".gif" else dict(format="png")))
    if RANK == 0:
        print(args.out)
    if WORLD > 1:
        dist.destroy_process_group()

# ---- Inputs ------------------------------------------------------------------------------------

def newest_checkpoint():
    """The newest run's under runs/, else the one in assets/."""
    assets = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "digits.pt")
    return max(glob.glob("runs/*/ckpt.pt"), key=os.path.getmtime, default=os.path.relpath(assets))

def choose_sampler(args, config, process):
    """The Diffusion with the timesteps to run, and one of SAMPLERS with its options."""
    if args.eta is not None and args.sampler != "ddim":
        parser.error("--eta is for --sampler ddim")
    if args.variance and args.sampler != "ancestral":
        parser.error("--variance is for --sampler ancestral")
    if args.variance == "learned" and config.out_channels == config.in_channels:
        parser.error(f"--variance learned: {args.ckpt} predicts no variance")
    T, steps = process["T"], args.steps or (250 if args.sampler == "ancestral" else 25)
    if args.steps and args.steps > T:
        parser.error(f"--steps {steps}: {args.ckpt} has {T} timesteps")
    timesteps = min(steps, T)
    if args.sampler == "dpm++":
        size, schedule = config.image_size, process["schedule"]
        timesteps = few_steps(T, size, steps, schedule, bool(config.low_res))
    process = process | ({"variance": args.variance} if args.variance else {})
    options = {"eta": args.eta} if args.eta else {}
    return Diffusion(**process, steps=timesteps), partial(SAMPLERS[args.sampler], **options)

def choose_inputs(args, config, ckpt):
    """The small images (n, 3, s, s) or None, and the labels (n,) or None. Sets args.n by them."""
    classes = ckpt["classes"] or [str(k) for k in range(config.num_classes or 0)]
    small, chosen = None, classes
    if bool(args.low_res) != bool(config.low_res):
        parser.error(f"--low-res NPZ: {args.ckpt} is {'an' if config.low_res else 'no'} upsampler")
    if args.low_res:
        try:
            small, chosen = load_npz(args.low_res)
        except ValueError as error:
            parser.error(f"--low-res: {error}")
        if small.shape[-1] != config.low_res:
            parser.error(f"--low-res: {small.shape[-1]} pixels, not the network's {config.low_res}")
        small = torch.from_numpy(small) / 127.5 - 1
    args.n = args.n or (len(small) if args.low_res else 64)
    small = small[torch.arange(args.n) % len(small)] if args.low_res else None
    if not classes:
        if args.label is not None or args.guidance != 1:
            parser.error(f"--class and --guidance: {args.ckpt} knows no classes")
        return small, None
    if args.guidance != 1 and not ckpt["config"].get("label_dropout"):
        parser.error(f"--guidance: {args.ckpt} was trained without --label-dropout")
    chosen = chosen if args.label is None else [unicodedata.normalize("NFC", args.label)]
    # A class is meant by its name, or else by its number.
    index = {str(k): k for k in range(len(classes))} | {name: k for k, name in enumerate(classes)}
    if not chosen:
        parser.error(f"--class is needed: {args.low_res} has none")
    if unknown := [name for name in chosen if name not in index]:
        parser.error(f"class {unknown[0]}: {args.ckpt} has {', '.join(classes)}")
    labels = torch.tensor([index[name] for name in chosen])
    return small, labels[torch.arange(args.n) % len(labels)]

# ---- Outputs -----------------------------------------------------------------------------------

def kind_of_output(out):
    """What --out asks for: ".png", ".gif", ".npz" or "folder", which is made before work begins."""
    kind = os.path.splitext(out)[1].lower()
    kind = "folder" if kind == "" or os.path.isdir(out) else kind
    if "://" in out or kind not in ("folder", ".png", ".gif", ".npz"):
        parser.error(f"--out {out} must be X.png, X.gif, X.npz or a folder")
    try:
        os.makedirs(out if kind == "folder" else os.path.dirname(out) or ".", exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}")
    return kind

def save(path, write, **options):
    """Have write(file, **options) write a file, which gets its name once it is complete."""
    with open(f"{path}.tmp", "wb") as file:
        write(file, **options)
    os.replace(f"{path}.tmp", path)

if __name__ == "__main__":
    main()
