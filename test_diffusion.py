"""What the code claims, and what shows it.

Mathematics is compared with closed forms, float64 arithmetic written anew, Monte Carlo within 4.5
standard errors, or numbers from OpenAI's code. Training is compared with a plain loop, files with
the bytes that they must hold. The scripts run as a user runs them, on tiny networks; two ranks of
torchrun work beside the other tests. GPUs and MPS are hidden: what is claimed to the bit is claimed
for CPUs, and a wrong device must be wrong everywhere.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # one thread: tiny networks

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it: now, not while a test has replaced a function of torch
import torch.distributed as dist
from numpy.testing import assert_allclose
from PIL import Image, ImageDraw, ImageFont
from torch.distributions import Normal, kl_divergence

torch.backends.mps.is_available = functools.cache(lambda: False)

import model as model_file
import train
from diffusion import (
    SAMPLERS, SCHEDULES, Diffusion, ancestral, bits, cosine_betas, ddim, decoder_log_likelihood,
    estimate_bits_per_dim, few_steps, generator, guided, linear_betas, normal_kl, randn_like,
    select_timesteps, start_upsampling,
)  # fmt: skip
from model import (
    Attention, GroupNorm, ResBlock, UNet, UNetConfig, autocast, from_openai,
    load_checkpoint, make_picture, pick_device, pick_dtype, timestep_embedding, to_pixels,
)  # fmt: skip
from sampler import T_SAMPLERS, ImportanceSampler, UniformSampler

LN2 = math.log(2)
PIXELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

def images(n, size=4, seed=0):
    """Random images (n, 3, size, size) on the grid of pixel values, float64."""
    g = torch.Generator().manual_seed(seed)
    return PIXELS[torch.randint(256, (n, 3, size, size), generator=g)]

def randn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(shape, generator=g, dtype=torch.float64)

def enlarged(small, size):
    return torch.nn.functional.interpolate(small, (size, size), mode="bilinear")

def constant_model(*outputs):
    """A model that always returns these ε (and v), whatever it is shown."""
    return lambda x, time, y=None: torch.cat(outputs, dim=1)

def toy(x, time, y=None):
    """A model whose ε and v depend on x and on the time."""
    late = (time / 1000).to(x.dtype).view(-1, 1, 1, 1)
    return torch.cat([(0.3 + 0.6 * late) * x + 0.1 * late, (x + late).tanh()], dim=1)

def watched(model=toy):
    """The model, and a list to which each call adds the x, time and y that it was given."""
    seen = []

    def watched_model(x, time, y=None):
        seen.append((x, time, y))
        return model(x, time, y)

    return watched_model, seen

def steps_seen(diffusion, seen):
    """The t of each image in each call of a watched model -> (calls, N)."""
    return torch.stack([torch.bucketize(time, diffusion.times) for _, time, _ in seen])

def noise_seen(diffusion, x0, seen):
    """The noise in each x_t that a watched model saw -> (calls · N, C·H·W)."""
    a = diffusion.alphas_bar[steps_seen(diffusion, seen)].view(len(seen), -1, 1, 1, 1)
    x_t = torch.stack([x for x, _, _ in seen])
    return ((x_t - a.sqrt() * x0) / (1 - a).sqrt()).flatten(0, 1).flatten(1)

def assert_noise(z):
    """The rows of z (rows, n) are standard normal noise, each row's its own."""
    rows, n = z.shape
    assert (abs(z.mean(1)) < 4.5 / n**0.5).all()
    assert (abs(z.var(1) - 1) < 4.5 * (2 / n) ** 0.5).all()
    assert abs(z.pow(4).mean() - 3) < 4.5 * (96 / z.numel()) ** 0.5
    assert abs(z.double().corrcoef() - torch.eye(rows)).max() < 4.5 / n**0.5

def terms_by_hand(diffusion, t, eps, v, x0, x_t, clip=True):
    """L_t (N,) in bits per dimension for a learned variance, by the paper's formulas and torch's
    normal distribution."""
    a = diffusion.alphas_bar
    before = torch.cat([torch.ones(1), a[:-1]])
    tilde = (1 - a / before) * (1 - before) / (1 - a)
    tilde[0] = tilde[1]  # at t = 0, β̃ is that of t = 1
    a, before, tilde = (table[t].view(-1, 1, 1, 1) for table in (a, before, tilde))
    beta = 1 - a / before

    def posterior_mean(x0):  # eq. 11
        of_x_t = (a / before).sqrt() * (1 - before) / (1 - a)
        return before.sqrt() * beta / (1 - a) * x0 + of_x_t * x_t

    x0_hat = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    mean = posterior_mean(x0_hat.clamp(-1, 1) if clip else x0_hat)
    p = Normal(mean, ((v + 1) / 4 * beta.log() + (1 - v) / 4 * tilde.log()).exp())  # eq. 15
    kl = kl_divergence(Normal(posterior_mean(x0), tilde.sqrt()), p)
    edge = torch.full_like(x0, math.inf)
    upper = p.cdf(torch.where(x0 > 0.999, edge, x0 + 1 / 255))
    lower = p.cdf(torch.where(x0 < -0.999, -edge, x0 - 1 / 255))
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, -(upper - lower).log(), kl)
    return nats.flatten(1).mean(1) / LN2

# ==== diffusion.py: schedules ===================================================================

@pytest.mark.parametrize("T", [10, 100, 1000, 4000])
def test_linear_betas_are_ho_et_als_scaled_to_T(T):
    expected = [1000 / T * (1e-4 + (0.02 - 1e-4) * i / (T - 1)) for i in range(T)]
    assert_allclose(linear_betas(T), np.minimum(expected, 0.999), rtol=1e-12)
    # Index 0 has one step of noise.
    alphas_bar = np.cumprod(1 - np.minimum(expected, 0.999))
    assert_allclose(Diffusion("linear", T).alphas_bar, alphas_bar, rtol=1e-12)
    assert SCHEDULES == {"linear": linear_betas, "cosine": cosine_betas}

@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_cosine_betas_follow_eq_17(T):
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T + 1)]
    assert_allclose(cosine_betas(T), expected, rtol=1e-9)
    # The tables too, which a float32 schedule would miss by 1e-4 of a β: alphas_bar = f(t) / f(0).
    diffusion = Diffusion("cosine", T)
    assert_allclose(diffusion.alphas_bar[:-1], [f(t) / f(0) for t in range(1, T)], rtol=1e-9)
    assert diffusion.alphas_bar[-1].item() == pytest.approx(0.001 * f(T - 1) / f(0), rel=1e-9)
    assert_allclose(diffusion.betas, expected, rtol=1e-9)

def test_skipped_steps_keep_both_ends_and_alphas_bar():
    whole, part = Diffusion("cosine", 1000), Diffusion("cosine", 1000, steps=7)
    steps = [0, 166, 333, 500, 666, 832, 999]  # round(i · 999 / 6), 499.5 to even
    assert (whole.num_steps, part.num_steps, part.T) == (1000, 7, 1000)
    assert part.times.tolist() == steps and torch.equal(part.alphas_bar, whole.alphas_bar[steps])
    ratios = [1 - whole.alphas_bar[b] / whole.alphas_bar[a] for a, b in zip(steps, steps[1:])]
    assert_allclose(part.betas[1:], ratios, rtol=1e-12)  # eq. 19
    assert torch.equal(part.betas[:1], whole.betas[:1])

def test_spacing_lays_the_steps_by_a_power():
    for steps, last, spacing, expected in (
        (5, 99, 2, [0, 6, 25, 56, 99]),  # 99·(0, 1, 4, 9, 16)/16 = 0, 6.19, 24.75, 55.69, 99
        (5, 99, 10, [0, 1, 2, 6, 99]),  # 99·(0, 1e-6, 0.001, 0.056, 1), but no timestep twice
        (9, 8, 10, [*range(9)]), (1, 8, 1, [8]), (2, 8, 3, [0, 8]),
    ):  # fmt: skip
        assert select_timesteps(steps, last, spacing) == expected

def test_steps_and_betas_may_be_of_any_kind():
    for five in (5, np.int64(5), torch.tensor(5)):
        assert Diffusion("linear", 100, steps=five).times.tolist() == [0, 250, 500, 740, 990]
    for row in ([3, 7, 90], (3, 7, 90), np.array([3, 7, 90]), torch.tensor([3, 7, 90])):
        diffusion = Diffusion("linear", 100, steps=row)
        assert diffusion.num_steps == 3 and diffusion.times.tolist() == [30, 70, 900]
    assert Diffusion("linear", 100, steps=range(100)).num_steps == 100
    sigmoid = torch.linspace(-6, 6, 50).sigmoid() * 0.02
    for betas in (sigmoid, sigmoid.numpy(), sigmoid.tolist()):
        diffusion = Diffusion(betas)
        assert diffusion.T == 50 and diffusion.times[-1] == 49 * 1000 / 50
        assert_allclose(diffusion.alphas_bar, np.cumprod(1 - sigmoid.double()), rtol=1e-12)

def test_impossible_processes_are_refused():
    for arguments, message in (
        (dict(schedule="none such"), "schedule .*'linear'"), (dict(variance="fixed"), "variance"),
        (dict(T=0), "T = 0"), (dict(schedule="linear", T=-1), "T = -1"),
        *((dict(steps=steps), "steps") for steps in (
            0, 4001, -1, [], [-1, 5], [4000], [5, 5], [5, 4], [0, 2, 1], np.array([1.0, 2.0]),
            [[1, 2]], np.int64(4001), torch.tensor([3, 1]), [math.nan])),
        *((dict(schedule=betas), "betas") for betas in (
            [0.5, 1.5], [0.0, 0.5], [0.5, 1.0], [0.5, math.nan], [-0.1, 0.5], [[0.1]], [], 0.1,
            [0.5] * 300, [1e-17, 0.1])),  # alphas_bar would be 0, or equal to the one before
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Diffusion(**arguments)

def test_the_tables_move_together_and_are_float32_where_there_is_no_float64(monkeypatch):
    went, process, mps = [], Diffusion(T=20), Diffusion(T=20)
    tables = [name for name, value in vars(process).items() if torch.is_tensor(value)]
    assert process.to("meta") is process and process.betas.dtype == torch.float64
    assert len(tables) > 10 and {str(vars(process)[n].device) for n in tables} == {"meta"}
    # This torch may know no MPS: what would go there is looked at.
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: went.append((self.dtype, device)))
    mps.to("mps")
    assert went == [(torch.float32, "mps")] * len(tables)

def test_the_defaults_do_not_change_unnoticed():
    process = dict(schedule="cosine", T=4000, variance="learned", steps=None, time_scale=None)
    walk = dict(y=None, clip=True, generators=None)
    for function, expected in (
        (cosine_betas, dict(s=0.008)), (select_timesteps, dict(spacing=1.0)),
        (Diffusion, process), (Diffusion.bits_per_dim, dict(y=None, progress=False)),
        (Diffusion.losses, dict(y=None, noise=None, objective="hybrid")),
        (Diffusion.sample, dict(y=None, sampler="ancestral", progress=False)),
        (ancestral, walk), (ddim, walk | dict(eta=0.0, order=1)),
        (few_steps, dict(steps=25, schedule="cosine", upsampler=False)),
        (estimate_bits_per_dim, dict(y=None, calls=8)), (randn_like, dict(generators=None)),
        (generator, dict(device="cpu", stream="noise")), (make_picture, dict(columns=None)),
        (ImportanceSampler, dict(history=10, uniform=0.001)),
    ):  # fmt: skip
        parameters = inspect.signature(function).parameters.values()
        found = {p.name: p.default for p in parameters if p.default is not p.empty}
        assert found == expected, function
    assert list(SAMPLERS) == ["ancestral", "ddim", "dpm++"]
    assert dataclasses.asdict(UNetConfig()) == CIFAR10 | dict(dropout=0.3, norm_groups=0)

def test_the_readme_names_the_function_of_each_equation():
    equations, found = r"eq\. (\d+(?:, \d+)*)", []
    with open(os.path.join(os.path.dirname(train.__file__), "README.md"), encoding="utf-8") as file:
        rows = re.findall(rf"^{equations}: .* \| `(.+)`$", file.read(), re.MULTILINE)
    for numbers, name in rows:
        source = inspect.getsource(eval(name))
        assert set(numbers.split(", ")) <= {*", ".join(re.findall(equations, source)).split(", ")}
        found += map(int, numbers.split(", "))
    assert sorted(found) == [*range(3, 20)]

# ---- q, from data to noise, and p, from noise to data ------------------------------------------

@pytest.mark.parametrize("steps", [None, 10])
def test_add_noise_equals_noising_step_by_step(steps):
    diffusion, mean, variance = Diffusion("cosine", 100, steps=steps), 0.7, 0.0
    for t, beta in enumerate(diffusion.betas.tolist()):  # x_t = sqrt(1-β) x_{t-1} + sqrt(β) ε
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        x0, at = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), torch.tensor([t])
        assert diffusion.add_noise(x0, at, 0 * x0).item() == pytest.approx(mean, rel=1e-9)
        assert diffusion.add_noise(0 * x0, at, 0 * x0 + 1).item() ** 2 == pytest.approx(variance)

@pytest.mark.parametrize("steps, t", [(None, 1), (None, 60), (None, 98), (12, 1), (12, 7)])
def test_posterior_is_bayes_rule(steps, t):
    diffusion = Diffusion("linear", 100, steps=steps)
    x0, x_t, at = 0.4, -0.3, torch.ones(1, 1, 1, 1, dtype=torch.float64)
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    alpha, before = 1 - diffusion.betas[t], diffusion.alphas_bar[t - 1]
    log_p = Normal(before.sqrt() * x0, (1 - before).sqrt()).log_prob(grid)  # q(x_{t-1} | x0)
    log_p = log_p + Normal(alpha.sqrt() * grid, (1 - alpha).sqrt()).log_prob(0 * grid + x_t)
    p = log_p.softmax(0)
    mean, square = (p * grid).sum().item(), (p * grid**2).sum().item()
    found, log_variance = diffusion.posterior(x0 * at, x_t * at, torch.tensor([t]))
    assert found.item() == pytest.approx(mean, abs=1e-8)
    assert log_variance.exp().item() == pytest.approx(square - mean**2, rel=1e-6)

def test_prior_is_the_kl_to_the_standard_normal():
    diffusion, x0 = Diffusion("linear", 1000, steps=20), images(3)
    last = diffusion.alphas_bar[-1]
    kl = kl_divergence(Normal(last.sqrt() * x0, (1 - last).sqrt()), Normal(0 * x0, 1))
    assert_allclose(diffusion.prior(x0), kl.flatten(1).mean(1) / LN2, rtol=1e-9)

def test_timesteps_out_of_range_and_integer_images_are_refused():
    diffusion, x = Diffusion(T=100, steps=9), images(2)
    for t in map(torch.tensor, ([0, 9], [-1, 3], [0.0, 1.0], [3], [1, 2, 3], [[1], [2]], 4)):
        for method, given in (("add_noise", (x, t, x)), ("posterior", (x, x, t)),
                              ("losses", (toy, x, t)), ("reverse", (x, x, x, t)),
                              ("predict", (toy, x, t)), ("vlb_term", (x, x, t, x, x))):  # fmt: skip
            with pytest.raises(ValueError, match=r"\bt must be 0 … 8"):
                getattr(diffusion, method)(*given)
    t, pixels = torch.tensor([1, 8]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for method, given in (("add_noise", (pixels, t, x)), ("losses", (toy, pixels, t, None, x)),
                          ("losses", (toy, pixels, t)), ("prior", (pixels,)),
                          ("bits_per_dim", (toy, pixels)), ("sample", (toy, pixels))):  # fmt: skip
        with pytest.raises(ValueError, match="must be floating-point numbers, not torch.uint8"):
            getattr(diffusion, method)(*given)
    for noise in (x[:1], x[0], x[:, :1]):  # which torch would broadcast: the same for all images
        with pytest.raises(ValueError, match=r"noise is \(.*x0 \(2, 3, 4, 4\)"):
            diffusion.losses(toy, x, t, None, noise)
    for measure in (Diffusion.bits_per_dim, estimate_bits_per_dim):
        with pytest.raises(ValueError, match=r"x0 in \[-1, 1\]"):  # the decoder's pixels
            measure(diffusion, toy, 127.5 * x + 127.5)
    for calls, steps in ((0, 9), (-1, 9), (4, 1)):
        with pytest.raises(ValueError, match="calls must be at least 1, and T 2"):
            estimate_bits_per_dim(Diffusion(T=100, steps=steps), toy, x, calls=calls)

def test_the_mean_is_eq_13_and_learned_variance_lies_between_small_and_large():
    t, x_t, eps = torch.tensor([0, 1, 30]), randn(3, 3, 4, 4), randn(3, 3, 4, 4, seed=1)
    learned, small, large = (Diffusion("linear", 100, v) for v in ("learned", "small", "large"))
    beta, alphas_bar = linear_betas(100)[t], (1 - linear_betas(100)).cumprod(0)
    k = t.clamp(min=1)  # at t = 0, where β̃ is 0, that of t = 1; in the released code in large too
    tilde = linear_betas(100)[k] * (1 - alphas_bar[k - 1]) / (1 - alphas_bar[k])
    none = None, 0.3 + 0 * x_t  # small and large need no v, and ignore one
    for diffusion, v, log in (
        (learned, -1 + 0 * x_t, tilde.log()), (learned, 1 + 0 * x_t, beta.log()),
        (learned, 0.5 + 0 * x_t, 0.75 * beta.log() + 0.25 * tilde.log()),  # eq. 15
        *((small, v, tilde.log()) for v in none),
        *((large, v, torch.cat([tilde[:1], beta[1:]]).log()) for v in none),
    ):  # fmt: skip
        found = diffusion.reverse(x_t, v, x_t, t)[1]
        assert_allclose(found, log.view(3, 1, 1, 1).expand(3, 3, 4, 4), rtol=1e-7)
    weight = (beta / (1 - alphas_bar[t]).sqrt()).view(3, 1, 1, 1)
    mean = (x_t - weight * eps) / (1 - beta).sqrt().view(3, 1, 1, 1)
    assert_allclose(learned.reverse(eps, eps, x_t, t, clip=False)[0], mean, atol=1e-9)  # eq. 13
    alone = Diffusion("linear", 100, steps=1).reverse(x_t, x_t, x_t, 0 * t)[1]
    assert alone.isfinite().all()  # there is no t = 1

def test_the_network_sees_the_original_time_times_1000_over_T():
    (model, seen), x, t = watched(), randn(2, 3, 4, 4), torch.tensor([1, 4])
    for options, times in (
        ({}, [0.25, 1]), (dict(time_scale=0.5), [0.5, 2]),
        (dict(steps=5), [250, 999.75]),  # 0, 1000, 2000, 2999, 3999
        (dict(steps=5, time_scale=1), [1000, 3999]),
    ):  # fmt: skip
        Diffusion("cosine", 4000, **options).predict(model, x, t)
        assert seen[-1][1].tolist() == times and seen[-1][1].dtype == torch.float32

def test_predict_splits_eps_and_v():
    x, t = randn(2, 3, 4, 4), torch.tensor([3, 0])
    one, two = randn(2, 2, 3, 4, 4, seed=1)
    for variance in ("learned", "small", "large"):
        eps, v = Diffusion(variance=variance).predict(constant_model(one, two), x, t)
        assert torch.equal(eps, one) and torch.equal(v, two)
    assert Diffusion(variance="small").predict(constant_model(one), x, t)[1] is None
    for variance, channels in (("learned", 3), ("learned", 9), ("small", 4), ("large", 5)):
        model = constant_model(x.new_zeros(2, channels, 4, 4))
        with pytest.raises(ValueError, match=rf"returned \(2, {channels}, 4, 4\)"):
            Diffusion(variance=variance).predict(model, x, t)
    for shape in ((1, 6, 4, 4), (2, 6, 1, 1), (2, 6, 4, 1)):  # which would be broadcast
        with pytest.raises(ValueError, match=r"returned .* not \[\(2, 6, 4, 4\)\]"):
            Diffusion().predict(constant_model(x.new_zeros(shape)), x, t)

# ---- Losses and likelihood ---------------------------------------------------------------------

@pytest.mark.parametrize("T, steps", [(50, None), (4000, None), (4000, 10)])
def test_hybrid_is_simple_plus_a_thousandth_of_T_times_the_term(T, steps):
    diffusion, x0, noise = Diffusion("cosine", T, steps=steps), images(3), randn(3, 3, 4, 4)
    t, eps, v = torch.tensor([0, 1, 7]), 0.5 * noise, 0.3 * noise
    x_t = diffusion.add_noise(x0, t, noise)
    vlb = (steps or T) * terms_by_hand(diffusion, t, eps, v, x0, x_t, clip=False)
    simple = (0.25 * noise**2).flatten(1).mean(1)
    expected = {"simple": simple, "vlb": vlb, "hybrid": simple + 0.001 * vlb}
    for objective, loss in expected.items():
        model = constant_model(eps, v)
        found, bound = diffusion.losses(model, x0, t, None, noise, objective)
        assert_allclose(found, loss, rtol=1e-6)
        assert_allclose(bound, vlb, rtol=1e-6)  # whatever the objective

def test_fixed_variances_need_no_v_and_know_no_hybrid():
    x0, noise, t = images(2), randn(2, 3, 4, 4), torch.tensor([5, 9])
    for variance in ("small", "large"):
        diffusion, given = Diffusion("linear", 20, variance), (constant_model(0 * noise), x0, t)
        loss, vlb = diffusion.losses(*given, None, noise, "simple")
        assert_allclose(loss, noise.square().flatten(1).mean(1), rtol=1e-9)
        assert (vlb > 0).all() and torch.equal(diffusion.losses(*given, None, noise, "vlb")[0], vlb)
        with pytest.raises(ValueError, match="objective 'hybrid' with variance"):
            diffusion.losses(*given)
    with pytest.raises(ValueError, match="objective 'l1'"):
        Diffusion().losses(toy, x0, t, objective="l1")

def test_hybrid_teaches_eps_by_simple_alone_and_v_by_the_bound_alone():
    diffusion, x0, noise = Diffusion("cosine", 100), images(3), randn(3, 3, 4, 4)
    t, gradients, kept = torch.tensor([0, 20, 60]), {}, {}
    for objective in ("simple", "hybrid", "vlb"):
        eps, v = (0.5 * noise).requires_grad_(), (0.1 * noise).requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss, vlb = diffusion.losses(constant_model(eps, v), x0, t, None, noise, objective)
        assert not vlb.requires_grad
        loss.sum().backward()
        gradients[objective], kept[objective] = (eps.grad, v.grad), len(saved)
    eps, v = gradients["hybrid"]
    simple = (0.5 * noise - noise) * 2 / noise[0].numel()  # d/dε of the mean of (ε - noise)²
    assert torch.allclose(gradients["simple"][0], simple, rtol=1e-12)
    assert torch.allclose(eps, simple, rtol=1e-12) and eps.abs().min() > 0
    assert torch.allclose(v, 0.001 * gradients["vlb"][1], rtol=1e-9) and v.abs().min() > 0
    assert gradients["simple"][1] is None or (gradients["simple"][1] == 0).all()
    assert gradients["vlb"][0].abs().min() > 0  # where x0_hat is clipped, ε would have no gradient
    assert kept["simple"] <= 3 < kept["hybrid"]  # "simple" builds no graph for the bound

def test_losses_draw_noise_of_its_own_for_each_image():
    torch.manual_seed(0)
    diffusion, x0, y = Diffusion("cosine", 100), images(4, size=64), torch.arange(4)
    model, seen = watched(lambda x, time, y: torch.cat([0 * x, 0 * x], dim=1))
    loss, _ = diffusion.losses(model, x0, torch.tensor([40, 40, 3, 70]), y, objective="simple")
    noise = noise_seen(diffusion, x0, seen)
    assert_noise(noise)
    assert_allclose(loss, noise.square().mean(1), rtol=1e-9)
    assert seen[0][2] is y  # the label reaches the network

@pytest.mark.parametrize("measure", [Diffusion.bits_per_dim, estimate_bits_per_dim])
def test_every_term_of_the_bound_is_measured_with_noise_of_its_own_and_x0_hat_clipped(measure):
    # x0_hat is far outside [-1, 1] at large t.
    model, seen = watched(lambda x, time, y: 3 * toy(x, time))
    diffusion, x0, y = Diffusion("linear", 300, steps=60), images(3, size=32), torch.arange(3)
    torch.manual_seed(0)
    *_, terms, prior = measure(diffusion, model, x0, y)
    drawn = steps_seen(diffusion, seen)
    assert terms.shape == (3, 60) and torch.equal(prior, diffusion.prior(x0))
    assert measure == estimate_bits_per_dim or (drawn == torch.arange(60)[:, None]).all()
    for t, (x_t, time, label) in zip(drawn, seen):
        assert torch.equal(label, y) and torch.equal(time, diffusion.times[t])
        expected = terms_by_hand(diffusion, t, *(3 * toy(x_t, time)).chunk(2, dim=1), x0, x_t)
        once = (drawn == t).sum(0) == 1  # t was not drawn again
        assert_allclose(terms.gather(1, t[:, None])[once, 0], expected[once], rtol=1e-6)
    assert_noise(noise_seen(diffusion, x0, seen))

def gaussian_data(diffusion, spread=0.08):
    """Data N(mean, covariance) in 4 dimensions, (N, 1, 2, 2), and the best model of it: ε exact,
    v = -1, so that the variance of p is β̃."""
    root, eye = randn(4, 4, seed=5) * spread, torch.eye(4, dtype=torch.float64)
    covariance = root @ root.T + 0.01 * eye
    mean = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)

    def parts(t):
        """E[x0 | x_t] = mean + gain (x_t - sqrt(ᾱ) mean), with this gain."""
        a = diffusion.alphas_bar[t]
        return a, a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * eye)

    def model(x, time, y):
        a, gain = parts(torch.bucketize(time[0], diffusion.times))
        x0 = mean + (x.flatten(1) - a.sqrt() * mean) @ gain.T
        eps = (x - a.sqrt() * x0.view_as(x)) / (1 - a).sqrt()
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    return mean, covariance, model, parts

def give_noise(monkeypatch, noises):
    """Have Diffusion take these noises in turn -> an iterator of those that it has not taken."""
    left = iter(noises)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(left).view(x.shape))
    return left

@pytest.mark.parametrize("schedule, steps", [("linear", None), ("cosine", None), ("cosine", 50)])
def test_the_bound_on_gaussian_data_is_the_exact_sum_of_kls(schedule, steps, monkeypatch):
    diffusion = Diffusion(schedule, 200, "learned", steps)
    mean, covariance, model, parts = gaussian_data(diffusion)
    exact = []
    for t in range(1, diffusion.num_steps):
        # KL = (c |x0 - E[x0 | x_t]|)² / 2β̃: its mean has the trace of x0's covariance given x_t.
        a, gain = parts(t)
        rest = covariance - a.sqrt() * gain @ covariance
        before, beta = diffusion.alphas_bar[t - 1], diffusion.betas[t]
        c = before.sqrt() * beta / (1 - a)
        tilde = beta * (1 - before) / (1 - a)
        exact.append(c**2 * rest.trace() / (2 * tilde) / 4 / LN2)
    # The KL is a quadratic form in 8 independent standard normal numbers, of which 4 make x0 and 4
    # are the noise: its mean is the sum of what it is where one of them is 1 and the others are 0.
    one = torch.eye(8, dtype=torch.float64)
    x0 = mean + one[:, :4] @ torch.linalg.cholesky(covariance).T
    give_noise(monkeypatch, [one[:, 4:]] * diffusion.num_steps)
    terms, _ = diffusion.bits_per_dim(model, x0.view(8, 1, 2, 2))
    assert_allclose(terms[:, 1:].sum(0), exact, rtol=1e-9)

# ---- Gaussians ---------------------------------------------------------------------------------

def test_normal_kl_is_that_of_torch():
    m1, v1, m2, v2 = randn(4, 1000)
    expected = kl_divergence(Normal(m1, (v1 / 2).exp()), Normal(m2, (v2 / 2).exp()))
    assert_allclose(normal_kl(m1, v1, m2, v2), expected, rtol=1e-9, atol=1e-12)
    # Nearly equal variances: KL = δ²/4 to first order, which exp(δ) - δ - 1 loses in float32.
    zero, delta = torch.zeros(()), torch.tensor(1e-3)
    assert normal_kl(zero, delta, zero, zero).item() == pytest.approx(2.5e-7, rel=1e-2)
    assert bits(torch.tensor([[[LN2, 2 * LN2], [0.0, LN2]]])).tolist() == pytest.approx([1.0])

@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.1, 0.99, 1.2])
@pytest.mark.parametrize("std", [1e-3, 0.02, 0.5, 3.0])
def test_decoder_is_the_gaussian_summed_over_256_bins(mean, std):
    at = torch.full_like(PIXELS, 1.0)
    log_p = decoder_log_likelihood(PIXELS, mean * at, 2 * math.log(std) * at)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    normal = Normal(torch.tensor(mean, dtype=torch.float64), std)
    upper = torch.where(PIXELS == 1, 1, normal.cdf(PIXELS + 1 / 255))
    lower = torch.where(PIXELS == -1, 0, normal.cdf(PIXELS - 1 / 255))
    assert_allclose(log_p.exp(), upper - lower, rtol=1e-6, atol=1e-13)

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_decoder_keeps_its_digits_in_both_tails(dtype, tolerance):
    std, mean = 0.02, 0.1
    x0 = PIXELS[70:211]  # up to 28 standard deviations away
    expected = []
    for x in x0.tolist():  # erfc is exact to the last digits in the right tail: mirror to it
        low, high = sorted([abs(x - mean) - 1 / 255, abs(x - mean) + 1 / 255])
        low, high = (math.erfc(edge / std / math.sqrt(2)) / 2 for edge in (low, high))
        expected.append(math.log(low - high))
    at = torch.ones_like(x0)
    given = x0.to(dtype), (mean * at).to(dtype), (2 * math.log(std) * at).to(dtype)
    assert_allclose(decoder_log_likelihood(*given), expected, rtol=tolerance)

def test_decoder_has_a_finite_gradient_far_from_the_pixel_and_where_it_is_wide():
    # So wide as exp(15) that both edges of a bin have the same float32 probability.
    for log_variance in (-14.0, 30.0):
        mean = torch.zeros(256, requires_grad=True)
        wide = torch.full((256,), log_variance, requires_grad=True)
        log_p = decoder_log_likelihood(PIXELS.float(), mean, wide)
        log_p.sum().backward()
        assert all(each.isfinite().all() for each in (log_p, mean.grad, wide.grad))
        if log_variance < 0:
            assert (mean.grad[:120] < 0).all() and (mean.grad[-120:] > 0).all()

# ---- Samplers: the paper's, DDIM, DPM-Solver++ -------------------------------------------------

def walk_by_hand(diffusion, model, noises, eta=None, order=1, clip=True):
    """Yield x and x0_hat after each step, from the noise of x_T and of each step: eq. 10, 11, 15 if
    eta is None, else eq. 12 and 16 of Song et al. 2021, and Lu et al. 2022's order 2."""
    a_bar, x, last = diffusion.alphas_bar.tolist(), noises[0], None
    half_log_snr = [0.5 * math.log(a / (1 - a)) for a in a_bar]  # Lu et al.'s λ
    for i in reversed(range(len(a_bar))):
        a, before = a_bar[i], a_bar[i - 1] if i else 1.0
        eps, v = model(x, diffusion.times[i].repeat(len(x)), None).chunk(2, dim=1)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        D = x0 = x0.clamp(-1, 1) if clip else x0
        beta, small = 1 - a / before, (1 - before) / (1 - a) * (1 - a / before)
        if eta is None:
            mean = math.sqrt(before) * beta / (1 - a) * x0
            mean = mean + math.sqrt(a / before) * (1 - before) / (1 - a) * x
            variance = small if diffusion.variance == "small" else beta
            if diffusion.variance == "learned" and i > 0:
                variance = torch.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small))
        else:
            if order == 2 and 0 < i < len(a_bar) - 1:  # the first and the last step are of order 1
                then, now, before_now = half_log_snr[i - 1 : i + 2]
                r = (now - before_now) / (then - now)
                D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
            variance = eta**2 * small
            direction = (x - math.sqrt(a) * D) / math.sqrt(1 - a)
            mean = math.sqrt(before) * D + math.sqrt(1 - before - variance) * direction
        x, last = mean, x0
        if i > 0:  # the last step adds no noise
            x = mean + variance**0.5 * noises[len(a_bar) - i]
        yield x, x0

@pytest.mark.parametrize("variance", ["learned", "small", "large"])
@pytest.mark.parametrize(
    "sampler, options, eta, order",
    [("ancestral", {}, None, 1), ("ddim", {}, 0, 1), ("ddim", dict(eta=1.0), 1, 1),
     ("ddim", dict(eta=0.6), 0.6, 1), ("ddim", dict(order=2), 0, 2), ("dpm++", {}, 1, 2)],
)  # fmt: skip
@pytest.mark.parametrize("clip", [True, False])
def test_samplers_take_the_papers_steps(sampler, options, eta, order, variance, clip, monkeypatch):
    diffusion = Diffusion("linear", 1000, variance, steps=[3, 80, 150, 400, 430, 600])
    (model, seen), noises, y = watched(), 2 * randn(6, 3, 3, 9, 9), torch.tensor([5, 7, 1])
    expected = list(walk_by_hand(diffusion, toy, noises, eta, order, clip))
    left = give_noise(monkeypatch, noises[1:])
    found = list(SAMPLERS[sampler](diffusion, model, noises[0], y, clip, **options))
    assert len(list(left)) == (5 if eta == 0 else 0)
    assert [i for i, _, _ in found] == [5, 4, 3, 2, 1, 0]
    for (_, x, x0_hat), (x_by_hand, x0) in zip(found, expected):
        assert_allclose(x, x_by_hand, atol=1e-9)
        assert_allclose(x0_hat, x0, atol=1e-9)
    inside = torch.cat([x0 for _, x0 in expected]).abs()
    assert (inside == 1).sum() > 100 if clip else (inside > 1).sum() > 100
    # A step is one call, at the step's original time.
    assert [time.tolist() for _, time, _ in seen] == [[t] * 3 for t in diffusion.times.flip(0)]
    assert all(label is y for _, _, label in seen)
    give_noise(monkeypatch, noises[1:])  # sample gives the last x, clamped only by clip
    x = diffusion.sample(toy, noises[0], y, sampler, clip=clip, **options)
    assert torch.equal(x, found[-1][1]) and (x.abs().max() <= 1) == clip

@pytest.mark.parametrize(
    "schedule, steps, sampler, options, tolerance",
    [("linear", 400, "ancestral", {}, 0.12), ("cosine", 400, "ancestral", {}, 0.07),
     ("linear", 400, "ddim", {}, 0.06), ("cosine", 400, "ddim", dict(eta=1.0), 0.07),
     ("cosine", 300, "ddim", dict(order=2), 0.02), ("linear", 300, "dpm++", {}, 0.02)],
)  # fmt: skip
def test_samples_are_the_data(schedule, steps, sampler, options, tolerance, monkeypatch):
    if steps < 400:  # begin where λ is no longer huge, as the scripts do
        steps = few_steps(400, 64, steps, schedule)
    diffusion = Diffusion(schedule, 400, "small", steps)
    mean, covariance, model = gaussian_data(diffusion)[:3]
    # The last step gives E[x0 | x_t] of the first timestep: x0 but for what its noise hides.
    noise = (1 / diffusion.alphas_bar[0] - 1) * torch.eye(4, dtype=torch.float64)
    covariance = covariance @ torch.linalg.inv(covariance + noise) @ covariance
    # A sample is linear in the numbers of its noise, x_T's and then each step's. The first sample
    # here has none: it is the mean. Each other has a 1 in one place: it differs from the mean by a
    # column of a root of the covariance.
    n = 4 * diffusion.num_steps
    noises = torch.cat([torch.zeros(1, n), torch.eye(n)]).double().view(n + 1, -1, 1, 2, 2)
    noises = noises.transpose(0, 1).contiguous()
    give_noise(monkeypatch, noises[1:])
    x = diffusion.sample(model, noises[0], None, sampler, clip=False, **options)
    root, scale = (x[1:] - x[0]).flatten(1), covariance.diagonal().sqrt()
    assert (abs(x[0].flatten() - mean) < 0.015 * scale).all()
    assert (abs(root.T @ root - covariance) < tolerance * scale.outer(scale)).all()

def test_order_2_follows_the_probability_flow_with_the_square_of_the_step():
    # The flow keeps x_t's distribution: along each axis of the covariance, (x_t - √ᾱ mean) grows
    # as the standard deviation √(ᾱ s² + 1 - ᾱ). It is compared at the first timestep: the step
    # from there to t = 0 goes to λ = ∞. The timesteps' λ are spread evenly over -2.5 … 2.
    errors, a = {}, np.cumprod(1 - linear_betas(20_000).numpy())
    for calls in (41, 81):
        wanted = np.linspace(2, -2.5, calls)
        steps = [int(abs(np.log(a / (1 - a)) / 2 - each).argmin()) for each in wanted]
        diffusion = Diffusion("linear", 20_000, "small", steps)
        mean, covariance, model, _ = gaussian_data(diffusion, spread=0.4)
        s2, axes = torch.linalg.eigh(covariance)
        first, last = diffusion.alphas_bar[0], diffusion.alphas_bar[-1]
        x = randn(20, 4, seed=3)
        growth = ((first * s2 + 1 - first) / (last * s2 + 1 - last)).sqrt()
        flow = (x - last.sqrt() * mean) @ axes * growth @ axes.T + first.sqrt() * mean
        for order in (1, 2):
            walk = ddim(diffusion, model, x.view(20, 1, 2, 2), clip=False, order=order)
            found = {i: x for i, x, _ in walk}[1]  # the x of t = 0's timestep
            errors[order, calls] = (found.flatten(1) - flow).norm().item()
    assert errors[2, 41] < errors[1, 41] / 20
    for order, factor in ((1, 2), (2, 4)):  # half the step
        assert errors[order, 41] / errors[order, 81] == pytest.approx(factor, rel=0.1)

def test_impossible_samplers_are_refused():
    for wrong, names in (
        (dict(sampler="none"), "sampler must be .*'none'"), (dict(eta=1.1), "eta"),
        (dict(eta=-0.1), "eta"), (dict(order=3), "order"), (dict(order=0), "order"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=names):
            Diffusion(T=9).sample(toy, images(1), **dict(sampler="ddim") | wrong)

@pytest.mark.parametrize("options", [{}, dict(sampler="dpm++"), dict(sampler="ddim", eta=0.5)])
def test_an_image_does_not_depend_on_its_batch(options):
    diffusion, noise = Diffusion("cosine", 20), randn(4, 3, 4, 4).float()

    def draw(rows):
        generators = [generator(9, i) for i in rows]
        return diffusion.sample(toy, noise[rows], generators=generators, **options)

    whole = draw([0, 1, 2, 3])
    assert torch.equal(torch.cat([draw(rows) for rows in ([0], [1, 2], [3])]), whole)
    assert len(whole.unique()) > 50
    for n in (1, 3, 5):
        with pytest.raises(ValueError, match=f"generators: there are {n} for 4 images"):
            diffusion.sample(toy, noise, generators=[generator(9, 0)] * n, **options)

def test_sampling_and_measuring_keep_no_graph_and_show_progress_if_asked(capsys):
    diffusion, x = Diffusion("linear", 50, steps=4), images(2)
    weight = torch.ones((), requires_grad=True)
    model, _ = watched(lambda x, time, y: weight * toy(x, time))
    for sampler in SAMPLERS.values():
        for _, x_next, x0_hat in sampler(diffusion, model, x):
            assert not x_next.requires_grad and not x0_hat.requires_grad
            assert torch.is_grad_enabled()  # for the caller
    found = [*diffusion.bits_per_dim(model, x), *estimate_bits_per_dim(diffusion, model, x)]
    assert not any(each.requires_grad for each in found)
    assert diffusion.losses(model, x, torch.tensor([0, 2]))[0].requires_grad
    assert capsys.readouterr().err == ""
    diffusion.sample(toy, x, progress=True), diffusion.bits_per_dim(toy, x, progress=True)
    assert re.search("sampling(.|\n)*bits/dim", capsys.readouterr().err)

@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_any_precision_are_computed_with_in_float32_at_least(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    diffusion, t = Diffusion("linear", 50, steps=6), torch.tensor([0, 3])
    x0, noise = images(2).to(dtype), randn(2, 3, 4, 4).to(dtype)
    x0[:, :, 0, 0], x0[:, :, 1, 1] = -1, 1  # the open ends of the decoder

    def assert_terms(found, call, t, clip, times=1):
        """The terms found, from x_t as the network saw it and ε and v as it gave them."""
        given = *toy(*call).double().chunk(2, dim=1), x0.double(), call[0].double()
        assert_allclose(found, times * terms_by_hand(diffusion, t, *given, clip), rtol=1e-4)

    model, seen = watched()
    for objective in ("simple", "hybrid", "vlb"):
        loss, vlb = diffusion.losses(model, x0, t, None, noise, objective)
        assert loss.dtype == vlb.dtype == wide
        assert_terms(vlb, seen[-1], t, False, times=6)
    for measure in (Diffusion.bits_per_dim, estimate_bits_per_dim):
        n, found = len(seen), measure(diffusion, model, x0)
        assert_terms(found[-2][:, 0], seen[n], 0 * t, True)
        assert {each.dtype for each in found} == {wide}
        assert_allclose(found[-1], diffusion.prior(x0.double()), rtol=0.01)
    for sampler in SAMPLERS.values():
        for generators in (None, [generator(0, 0), generator(0, 1)]):
            for _, x, x0_hat in sampler(diffusion, model, noise, None, True, generators):
                assert x.dtype == dtype and x0_hat.dtype == wide and x.isfinite().all()
    assert all(x.dtype == dtype and time.dtype == torch.float32 for x, time, _ in seen)
    for each in diffusion.predict(lambda x, time, y: toy(x, time).bfloat16(), x0, t):
        assert each.dtype == wide  # an autocast network's outputs are widened

@pytest.mark.parametrize("dtype", DTYPES)
def test_many_steps_without_noise_do_not_add_up_the_errors_of_16_bits(dtype):
    diffusion = Diffusion(T=1000)  # of data N(0, 0.3²), with the exact ε

    def model(x, time, y):
        a = diffusion.alphas_bar[(time * diffusion.T / 1000).round().long()].view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() / (1 - a + 0.09 * a) * x.double()
        return torch.cat([eps, eps], 1)

    for sampler, how in (("ddim", {}), ("ddim", dict(eta=0.5)), ("dpm++", {}), ("ancestral", {})):
        torch.manual_seed(0)
        x = diffusion.sample(model, randn(4, 3, 16, 16).to(dtype), sampler=sampler, **how)
        assert x.dtype == dtype and abs(x.double().std() - 0.3) < 0.3 * 4.5 / (2 * 3072) ** 0.5

# ---- Beyond the paper: few steps, guidance, the bound from a few calls -------------------------

@pytest.mark.parametrize("T, size, schedule", [(4000, 32, "cosine"), (400, 8, "linear")])
def test_few_steps_begin_where_the_mean_pixel_is_lost_in_noise(T, size, schedule):
    # From the last t with alphas_bar of at least 0.2/(H·W) to the first whose 1 - alphas_bar is at
    # least 0.001. Cosine: alphas_bar[t] = f(t+1) / f(0), with f(t) = cos²((t/T + s)/(1+s)·π/2).
    a = np.cumprod([1 - 1000 / T * (1e-4 + 0.0199 * t / (T - 1)) for t in range(T)])
    if schedule == "cosine":
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        a = f[1:] / f[0]
    for upsampler, start in ((False, 0.2 / size**2), (True, 0.3)):
        last = max(t for t in range(T) if a[t] >= start)
        first = min(t for t in range(T) if 1 - a[t] >= 0.001)
        for n in (10, 25):
            part = [round((i / (n - 1)) ** 1.2 * (last - first)) for i in range(n)]
            found = few_steps(T, size, n, schedule, upsampler)
            assert found == [first + max(i, t) for i, t in enumerate(part)]
            assert 0 < first == found[0] and found[-1] == last < T - 1
        # More steps than are left: all that are left. At least one.
        assert few_steps(T, size, T, schedule, upsampler) == [*range(first, last + 1)]
    assert few_steps(T, 0.4, 25, schedule) == [0]

def test_an_upsampler_starts_from_its_noised_small_images():
    diffusion, z, small = Diffusion(steps=[3, 2500]), randn(2, 3, 8, 8), randn(2, 3, 4, 4, seed=1)
    a = diffusion.alphas_bar[-1]
    expected = a.sqrt() * enlarged(small, 8) + (1 - a).sqrt() * z
    assert_allclose(start_upsampling(diffusion, small, z), expected, rtol=1e-9)

@pytest.mark.parametrize("scale", [0, 1, 3, 0.5])
def test_guidance_goes_from_the_unconditional_to_the_conditional_eps(scale):
    calls = []

    def model(x, time, y, low_res):
        calls.append(y.tolist())
        shift = (y + 2) * time / 100 + low_res.mean((1, 2, 3))
        return toy(x, time) + shift.view(-1, 1, 1, 1)

    x, time, y = randn(2, 3, 4, 4), torch.tensor([70.0, 30.0]), torch.tensor([4, 0])
    small = randn(2, 3, 2, 2, seed=1)
    found = guided(model, scale)(x, time, y, low_res=small)
    assert calls == [[4, 0, -1, -1]]  # one call, of twice the batch
    conditional = model(x, time, y, low_res=small)
    unconditional = model(x, time, 0 * y - 1, low_res=small)
    eps = unconditional[:, :3] + scale * (conditional[:, :3] - unconditional[:, :3])
    assert_allclose(found[:, :3], eps, rtol=1e-12)
    assert torch.equal(found[:, 3:], conditional[:, 3:])  # v
    for labels in (torch.tensor([True, False]), torch.tensor([1, 0], dtype=torch.uint8)):
        guided(model, scale)(x, time, labels, low_res=small)
        assert calls[-1] == [1, 0, -1, -1]  # -1 is True, or 255, in the precision of these
    if scale in (0, 1):  # exactly
        assert torch.equal(found[:, :3], (conditional if scale else unconditional)[:, :3])
    # A network without v whose outputs have 16 bits, and images of any precision.
    narrow = guided(lambda x, time, y: toy(x, time)[:, :3].bfloat16() + y.view(-1, 1, 1, 1), scale)
    for dtype in DTYPES:
        found = narrow(x.to(dtype), time, y)
        assert found.shape == x.shape and found.dtype == torch.promote_types(dtype, torch.float32)

@pytest.mark.parametrize("calls", [1, 5])
def test_an_estimate_is_unbiased_and_draws_in_equal_parts_of_the_mass(calls):
    # The model knows x0, and errs by what t says alone: so the terms do not depend on the noise.
    diffusion, x0 = Diffusion("linear", 1000, steps=40), images(20_000, size=1)
    error, labels = torch.linspace(0.5, 0.1, 40).double(), torch.arange(20_000)

    def know(x, time, y=None):
        t = torch.bucketize(time, diffusion.times)
        a = diffusion.alphas_bar[t].view(-1, 1, 1, 1)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt() + error[t].view(-1, 1, 1, 1)
        return torch.cat([eps, 0 * x], dim=1)

    L = torch.empty(20_000, 40).double()
    for t, a in enumerate(diffusion.alphas_bar):  # with a noise of 0
        given = error[t] + 0 * x0, 0 * x0, x0, a.sqrt() * x0
        L[:, t] = terms_by_hand(diffusion, torch.full((20_000,), t), *given)
    p = torch.arange(1, 41).double() ** -1.2  # of index t it is (t + 1)^-1.2
    p[0] = 0  # L_0 is always computed
    p = 0.95 * p / p.sum() + 0.05 / 39
    torch.manual_seed(0)
    model, seen = watched(know)
    total, terms, prior = estimate_bits_per_dim(diffusion, model, x0, labels, calls)
    t, *drawn = steps_seen(diffusion, seen)
    drawn = torch.stack(drawn, 1)
    assert (t == 0).all() and (drawn > 0).all() and drawn.shape == (20_000, calls)
    assert all(torch.equal(y, labels) for _, _, y in seen)
    assert torch.equal(prior, diffusion.prior(x0))
    was_drawn = (torch.arange(40) == drawn[..., None]).any(1) | (torch.arange(40) == 0)
    assert_allclose(terms, L.where(was_drawn, torch.nan), rtol=1e-6)
    expected = prior + L[:, 0] + (L.gather(1, drawn) / (calls * p[drawn])).sum(1)
    assert_allclose(total, expected, rtol=1e-5)
    error = total - L.sum(1) - prior
    assert abs(error.mean()) < 4.5 * error.std() / 20_000**0.5 < 0.05 * L.sum(1).mean()
    counts, expected = torch.bincount(drawn.flatten(), minlength=40)[1:], drawn.numel() * p[1:]
    assert (abs(counts - expected) < 4.5 * expected.sqrt()).all()
    # Of each image, the k-th smallest t comes from the k-th part of the mass.
    k, up_to, drawn = torch.arange(calls), p[1:].cumsum(0), drawn.sort(1).values
    assert (up_to[drawn - 1] > k / calls - 1e-5).all()
    assert (up_to[drawn - 1] - p[drawn] < (k + 1) / calls + 1e-5).all()
    if calls > 1:  # the parts have random numbers of their own
        assert abs(drawn[:, -2:].T.double().corrcoef()[0, 1]) < 4.5 / 20_000**0.5
    total, terms, prior = estimate_bits_per_dim(Diffusion("linear", 2), toy, x0, calls=1)
    assert_allclose(total, prior + terms.sum(1), rtol=1e-6)  # there is one t ≥ 1

# ---- Randomness --------------------------------------------------------------------------------

def test_generators_of_all_uses_differ():
    streams = "noise", "dropout", "order"
    uses = itertools.product((0, 1, 2, 9999), range(500), ["cpu"], streams)
    seeds = {generator(*use).initial_seed() for use in uses}
    assert len(seeds) == 3 * 4 * 500 and max(seeds) < 2**32  # the CPU looks at 32 bits alone
    assert 0 <= generator(2**32 - 1, 10**6).initial_seed() < 2**32
    starts = sorted(generator(0, 0, stream=stream).initial_seed() for stream in streams)
    assert min(np.diff(starts)) >= 2**30  # the streams stay apart in the longest runs
    for dtype in DTYPES:  # noise is of each image's generator, in the image's precision
        both = randn_like(torch.empty(2, 3, 2, dtype=dtype), [generator(3, 7), generator(3, 8)])
        each = [torch.randn(3, 2, generator=generator(3, i), dtype=dtype) for i in (7, 8)]
        assert torch.equal(both, torch.stack(each)) and both.dtype == dtype

# ==== sampler.py: which timesteps to train on ===================================================

@pytest.mark.parametrize("n, T", [(1, 7), (20, 7), (6, 50), (64, 4000)])
def test_a_batch_of_t_is_stratified_and_each_t_alone_has_its_distribution(n, T):
    uniform, importance, losses = UniformSampler(T), ImportanceSampler(T), 50 / np.arange(1, T + 1)
    for _ in range(10):
        importance.update(torch.arange(T), torch.from_numpy(losses))
    eq_18 = 0.999 * losses / losses.sum() + 0.001 / T
    for sampler, p in ((uniform, np.full(T, 1 / T)), (importance, eq_18)):
        g, batches = generator(n, T), 8000 // n
        drawn = [sampler.sample(n, g) for _ in range(batches)]
        again = sampler.sample(n, generator(n, T))  # all randomness is the generator's
        assert torch.equal(again[0], drawn[0][0]) and again[0].dtype == torch.int64
        assert torch.equal(again[1], drawn[0][1]) and again[1].dtype == torch.float32
        t, weights = (torch.stack(each).numpy() for each in zip(*drawn))
        assert_allclose(weights, 1 / (T * p[t]), rtol=1e-5)  # so that weighted means are unbiased
        # In each n-th part of the mass lies one t, of all that the part touches.
        ends, parts = p.cumsum(), np.arange(n + 1) / n
        first, last = ends.searchsorted(parts[:-1] + 1e-5), ends.searchsorted(parts[1:] - 1e-5)
        ordered = np.sort(t, 1)
        assert ((first <= ordered) & (ordered <= last)).mean() > 0.999
        for place in {0, n // 2, n - 1}:  # the share of draws that are at most t
            for below in range(0, T - 1, -(-T // 8)):
                error = (ends[below] * (1 - ends[below]) / batches) ** 0.5
                assert abs((t[:, place] <= below).mean() - ends[below]) < 5 * error
    uniform.update(torch.arange(T), torch.from_numpy(losses))  # from which it learns nothing
    assert uniform.state_dict() == {} and (uniform.sample(9)[1] == 1).all()
    assert T_SAMPLERS == dict(uniform=UniformSampler, importance=ImportanceSampler)

@pytest.mark.parametrize("T, length, uniform", [(4, 10, 0.001), (3, 2, 0.2)])
def test_importance_sampler_is_uniform_until_every_t_has_its_last_losses(T, length, uniform):
    how = {} if length == 10 else dict(history=length, uniform=uniform)
    rng, sampler = np.random.default_rng(0), ImportanceSampler(T, **how)
    history = [collections.deque(maxlen=length) for _ in range(T)]
    for size in (*[1] * 80, 70, 5, 0, 40, 9, 80, 2):  # with 70, a t occurs more than ten times
        t, losses = rng.integers(T, size=size), rng.uniform(0, 5, size)
        for bad in (np.nan, np.inf, -np.inf, 2e20):  # the last's square is infinite
            losses[rng.uniform(size=size) < 0.1] = bad
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses).requires_grad_())
        assert not sampler.losses.requires_grad
        for i, loss in zip(t, losses):
            history[i] += [loss] if abs(loss) < 1e20 else []
        p = np.full(T, 1 / T)
        if min(map(len, history)) == length:  # eq. 18, and a uniform share
            root = np.array([np.sqrt(np.mean(np.square(h))) for h in history])
            p = (1 - uniform) * root / root.sum() + uniform / T
        assert_allclose(sampler.probabilities(), p, rtol=1e-5)
        drawn, weights = sampler.sample(6, generator(size, 0))
        assert_allclose(weights, 1 / (T * p[drawn]), rtol=1e-5)
        if size == 40:  # a run that is resumed goes on with the same history
            state = {name: value.clone() for name, value in sampler.state_dict().items()}
            sampler = ImportanceSampler(T, **how)
            sampler.load_state_dict(state)
    assert min(map(len, history)) == length
    shapes = {name: (value.shape, value.dtype) for name, value in sampler.state_dict().items()}
    assert shapes == dict(losses=((T, length), torch.float32), counts=((T,), torch.int64))
    sampler.losses.zero_()  # no t is better than another
    assert_allclose(sampler.probabilities(), np.full(T, 1 / T), rtol=1e-6)

# ==== model.py: the network =====================================================================

def small_unet(noise=0.1, **changes):
    """A small UNet whose parameters are all random, also those that start as zeros."""
    config = dict(image_size=8, channels=16, channel_mult=(1, 2), num_res_blocks=1, dropout=0.0,
                  attention_resolutions=(4,), num_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = UNet(UNetConfig(**config | changes))
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()

def test_a_new_network_gives_zero_and_its_blocks_the_identity():
    torch.manual_seed(0)
    config = UNetConfig(image_size=8, channels=16, channel_mult=(1, 2), attention_resolutions=(8,))
    model, x, emb = UNet(config).eval(), torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    before, block = x.clone(), ResBlock(16, 32, config)
    assert (model(torch.randn(2, 3, 8, 8), torch.zeros(2)) == 0).all()
    assert torch.equal(ResBlock(16, 16, config)(x, emb), before)
    assert torch.equal(Attention(16, config)(x), before) and torch.equal(x, before)
    assert torch.equal(block(x, emb), block.skip(x))
    others = [p for n, p in model.named_parameters() if n.endswith(("conv1.weight", "qkv.weight"))]
    assert all(p.abs().min() > 0 for p in others)  # only the last layer of a block is zero

def test_an_image_hears_its_own_time_and_class_and_no_class_adds_nothing():
    model, x = small_unet(num_classes=4), torch.randn(4, 3, 8, 8)
    t, y = torch.tensor([3.0, 9, 70, 400]), torch.tensor([2, -1, 0, -1])
    none, mixed = model(x, t, torch.full((4,), -1)), model(x, t, y)
    for k in range(4):
        assert torch.allclose(mixed[k], model(x[[k]], t[[k]], y[[k]])[0], atol=1e-5)
    assert (mixed - none).flatten(1).abs().max(1)[0][[0, 2]].min() > 1e-3
    mixed.square().sum().backward()
    assert (model.label_emb.weight.grad.abs().sum(1) > 0).tolist() == [True, False, True, False]
    model.label_emb.weight.data.zero_()  # a class whose row is zero adds as little
    assert torch.allclose(none, model(x, t, torch.tensor([0, 1, 2, 3])), atol=1e-6)
    for dtype in DTYPES:  # images of any precision, in that of the weights
        assert torch.allclose(model(x.to(dtype), t, y), none, atol=0.1)
    assert torch.allclose(none.double(), model.double()(x.double(), t, y), atol=1e-5)

def test_impossible_networks_and_inputs_are_refused():
    for changes, message in (
        (dict(image_size=30), "image_size 30"), (dict(channel_mult=()), "image_size 32"),
        (dict(attention_resolutions=(5,)), "attention at 5"), (dict(channels=10), r"\b10\b"),
        (dict(num_heads=3, attention_resolutions=()), "heads"),  # of the middle
        (dict(num_heads=3, channel_mult=(1, 2, 3)), "heads"),
        *((dict(low_res=size), f"low_res {size}") for size in (5, 32, 64)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            UNetConfig(**changes)
    x, small = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)
    model, t, y = small_unet(low_res=4, num_classes=2), torch.ones(2), torch.tensor([1, -1])
    for net, given, missing in (
        (model, (x, t, y), "low_res"), (small_unet(num_classes=2), (x, t, y, small), "low_res"),
        (small_unet(num_classes=2), (x, t), "y"), (small_unet(), (x, t, y), "y"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{missing} must be given if and only if"):
            net(*given)
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for given in ((pixels, t, y, small), (x, t, y, pixels[..., :4, :4])):
        with pytest.raises(ValueError, match="must be floating-point numbers"):
            model(*given)

@pytest.mark.parametrize("p", [0.0, 0.1, 0.7])
def test_dropout_follows_silu_and_is_for_training_alone(p):
    torch.manual_seed(0)
    seen, block = [], ResBlock(32, 32, UNetConfig(dropout=p))
    block.conv2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x, emb = torch.randn(8, 32, 16, 16), torch.randn(8, 512)
    block.train()(x, emb), block.eval()(x, emb)
    dropped, whole = seen
    share = (dropped == 0).double().mean().item()
    assert abs(share - p) < 4.5 * (p * (1 - p) / whole.numel()) ** 0.5 + 1e-9
    assert torch.allclose(dropped, (whole / (1 - p)).where(dropped != 0, 0), rtol=1e-4)
    assert (whole != 0).all()

def test_timestep_embedding_has_cosines_first():
    t = torch.tensor([0.0, 7.25, 999])
    angles = t[:, None].double() * 10_000 ** (-torch.arange(4) / 4)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert_allclose(timestep_embedding(t, 8), expected, atol=1e-4)

def test_norms_have_groups_of_4_channels_or_32_groups():
    found = {c: GroupNorm(c, 0).num_groups for c in (4, 8, 32, 36, 64, 96, 128, 192, 512)}
    assert found == {4: 1, 8: 2, 32: 8, 36: 9, 64: 16, 96: 24, 128: 32, 192: 32, 512: 32}
    assert GroupNorm(64, 32).num_groups == 32  # as improved-diffusion's
    assert GroupNorm(96, 7).num_groups == 6 and GroupNorm(16, 32).num_groups == 16
    for groups in (0, 8):  # the config's choice reaches all norms
        model = small_unet(channels=32, norm_groups=groups)
        norms = [m for m in model.modules() if isinstance(m, GroupNorm)]
        assert len(norms) == 2 * 8 + 4 + 1
        assert all(m.num_groups == (groups or min(32, m.num_channels // 4)) for m in norms)

@pytest.mark.filterwarnings("error")
def test_in_autocast_products_and_attention_have_16_bits_and_norms_32():
    torch.manual_seed(0)
    layer, x = Attention(32, UNetConfig(num_heads=4)), torch.randn(37, 32, 8, 8)
    for each in (layer.qkv, layer.proj):  # so large that attention is far from a mean
        torch.nn.init.normal_(each.weight, std=0.3)
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float32, 1e-6)):
        with autocast(torch.device("cpu"), dtype):
            found, normed, product = layer(x), layer.norm(x.to(dtype) + 100), x @ x
        assert (found - layer(x)).norm() / layer(x).norm() < tolerance and product.dtype == dtype
        expected = layer.norm((x.to(dtype) + 100).float())  # which bfloat16's sums would have lost
        assert normed.dtype == dtype and (normed - expected).abs().max() < 0.02

def test_the_network_compiles_as_one_graph():
    model = small_unet(num_classes=3, channel_mult=(1,), attention_resolutions=())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2]), torch.tensor([0, -1])
    assert torch.allclose(compiled(*given), model(*given), atol=1e-6)

@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_everything_is_on_the_networks_device_and_nothing_waits_for_it():
    # Fake tensors have a device and a shape, but no memory: "cuda" needs no GPU. Operations on two
    # devices at once fail, and so does .item(), for which the host would have to wait.
    from torch._subclasses.fake_tensor import FakeTensorMode

    def on_cuda(*values):
        tensors = [t for t in torch.utils._pytree.tree_leaves(values) if torch.is_tensor(t)]
        return len(tensors) > 0 and all(t.device.type == "cuda" for t in tensors)

    learned, small = Diffusion("linear", 20), Diffusion("linear", 20, "small", steps=4)
    model = small_unet(num_classes=3, low_res=2, channel_mult=(1,), attention_resolutions=())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.train().modules():  # .to() cannot swap parameters for fake ones
            for name, parameter in module._parameters.items():
                there = mode.from_tensor(parameter.detach()).to("cuda")
                module._parameters[name] = torch.nn.Parameter(there)
        x0, y = torch.rand(4, 3, 8, 8, device="cuda"), torch.tensor([0, 1, -1, 2]).to("cuda")
        for wrong in (lambda: x0[0, 0, 0, 0].item(), lambda: x0 + torch.zeros(8)):
            with pytest.raises(Exception, match="local_scalar_dense|same device"):
                wrong()
        learned.to("cuda"), small.to("cuda")
        for t_sampler in (UniformSampler(20).to("cuda"), ImportanceSampler(20).to("cuda")):
            t, weights = t_sampler.sample(4)
            t_sampler.update(t, torch.rand(4, device="cuda"))
            assert on_cuda(t, weights, *t_sampler.buffers())
        inputs = dict(low_res=torch.rand(4, 3, 2, 2, device="cuda"))
        net, guide = (functools.partial(each, **inputs) for each in (model, guided(model, 2.0)))
        for objective in ("simple", "hybrid", "vlb"):
            assert on_cuda(learned.losses(net, x0, t, y, objective=objective))
        for sampler in SAMPLERS:
            assert on_cuda(small.sample(guide, x0, y, sampler))
        assert on_cuda(small.bits_per_dim(toy, x0, y), estimate_bits_per_dim(learned, toy, x0, y))

# ---- Checkpoints, and OpenAI's files -----------------------------------------------------------

def test_a_checkpoint_gives_the_averaged_weights_ready_to_sample(tmp_path, monkeypatch):
    about = dict(T=30, schedule="linear", classes=["cat", "Ü", "b"], label_dropout=0.1)
    model = checkpoint(tmp_path / "ckpt.pt", **about, dropout=0.5, low_res=4)
    os.link(tmp_path / "ckpt.pt", tmp_path / "cifar10_uncond.pt")  # ours, whatever its name
    given = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2]), torch.tensor([0, 2])
    small, load, asked = torch.rand(2, 3, 4, 4), torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **how: asked.append(how) or load(*a, **how))
    for path in (tmp_path / "ckpt.pt", str(tmp_path), tmp_path, tmp_path / "cifar10_uncond.pt"):
        loaded, ckpt = load_checkpoint(path)
        assert loaded.config == model.config and not loaded.training
        assert torch.equal(loaded(*given, small), model(*given, small))
        assert dict(schedule="linear", T=30).items() <= ckpt["diffusion"].items()
        assert ckpt["classes"] == about["classes"] and ckpt["config"] == {"label_dropout": 0.1}
    # A file written on a GPU is read where there is none.
    assert all(str(how["map_location"]) == "cpu" and how["weights_only"] for how in asked)

class Evil:
    def __reduce__(self):  # what is done when it is unpickled
        return open, ("ran", "w")

def test_damaged_and_foreign_files_are_refused(here):
    checkpoint("good")
    good = open("good", "rb").read()
    contents = {"cut": good[:-100], "half": good[: len(good) // 2], "empty": b""}
    contents |= {"text": b"hello", "pickle": pickle.dumps(Evil())}
    for name, content in contents.items():
        put(name, content)
    foreign = {"evil": {"unet": Evil()}, "list": [1, 2], "numbers": {7: 8}, "seven": 7}
    # A file is OpenAI's by its own name, not its folder's.
    foreign["lsun_uncond/mine"] = {"some": torch.ones(1)}
    for name, content in foreign.items():
        put(name)
        torch.save(content, name)
    for name in [*contents, *foreign]:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(name)
    assert not os.path.exists("ran")
    for missing in ("missing", "."):  # a directory without ckpt.pt
        with pytest.raises((OSError, ValueError), match=missing):
            load_checkpoint(missing)

THEIR_NAMES = {
    r"^(up\.\d+\.\d)\.1\.": r"\1.conv.", r"^(down\.\d+\.0)\.(?=\w+$)": r"\1.op.",
    r"^down\.0\.0\.op": "down.0.0", "^down": "input_blocks", "^middle": "middle_block",
    "^up": "output_blocks", "norm1": "in_layers.0", "conv1": "in_layers.2",
    r"\.emb\.": ".emb_layers.1.", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "skip": "skip_connection", "proj": "proj_out",
}  # fmt: skip

def their_shapes(model):
    """{name: shape} of the model's tensors in improved-diffusion's words. What follows from it is
    compared with what is known of its files: so this owes nothing to our code."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in THEIR_NAMES.items():
            name = re.sub(ours, theirs, name)
        attention = re.search(r"qkv|proj_out", name)  # 1×1 convolutions over H·W
        shapes[name] = tuple(tensor.shape)[: 3 if attention else None]
    return shapes

# Outputs of its UNetModel and SuperResModel, run in float64, for weights, images, times and labels
# that formulas give: scale_shift_norm, low_res, the outputs at GOLDEN_AT, the sum of all squares.
GOLDEN_AT = [(0, 0, 0, 7), (0, 3, 7, 6), (1, 2, 2, 1), (1, 4, 6, 6)]
GOLDEN = [
    (True, None, 413.692782262, [-0.92173370108, -1.3212888569, 0.27643216313, 1.2549272601]),
    (False, None, 520.386987271, [-0.55192520973, -0.8581495081, -0.55270835708, 1.1171941409]),
    (True, 4, 421.988953243, [-0.95712426208, -1.111209406, 0.81382112555, 0.93978949465]),
]

def golden_numbers(k, shape):
    """The k-th formula: numbers in [-0.5, 0.5), float64, from integers alone."""
    n = torch.arange(math.prod(shape))
    return (n * (n + 2 * k + 1) % 1009).view(shape).double() / 1009 - 0.5

@pytest.mark.parametrize("scale_shift_norm, low_res, squares, values", GOLDEN)
def test_outputs_are_improved_diffusions(request, scale_shift_norm, low_res, squares, values):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    config = dict(
        image_size=8, channels=64, channel_mult=(1, 2), num_res_blocks=1, num_heads=2,
        attention_resolutions=(4,), num_classes=3, scale_shift_norm=scale_shift_norm,
        low_res=low_res,
    )  # fmt: skip
    state = {}
    for k, (name, shape) in enumerate(sorted(their_shapes(UNet(UNetConfig(**config))).items())):
        fan_in = 1 if name == "label_emb.weight" else math.prod(shape[1:])
        state[name] = 4 * golden_numbers(k, shape) / fan_in**0.5
        if len(shape) == 1:  # the weights of norms are near 1
            state[name] = golden_numbers(k, shape) + name.endswith("weight")
    ckpt = from_openai(state, config, {})
    model = UNet(UNetConfig(**ckpt["unet"])).eval()
    model.load_state_dict(ckpt["ema"])
    x, small = 4 * golden_numbers(0, (2, 3, 8, 8)), 4 * golden_numbers(1, (2, 3, 4, 4))
    t, y = torch.tensor([7.0, 250.0]), torch.tensor([2, 0])
    out = model(x, t, y, *[small] if low_res else [])
    assert [out[at].item() for at in GOLDEN_AT] == pytest.approx(values, rel=1e-9)
    assert out.square().sum().item() == pytest.approx(squares, rel=1e-9)

CIFAR10 = dict(
    image_size=32, in_channels=3, out_channels=6, channels=128, channel_mult=(1, 2, 2, 2),
    num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4, dropout=0.0, num_classes=None,
    scale_shift_norm=True, norm_groups=32, low_res=None,
)  # fmt: skip
SIZE_64 = dict(image_size=64, channel_mult=(1, 2, 3, 4))
SIZE_256 = dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2)
CLASSES = dict(channels=192, num_classes=1000)
LSUN = SIZE_256 | dict(attention_resolutions=(16,), num_heads=1, scale_shift_norm=False)
LINEAR = dict(schedule="linear", time_scale=1.0)
# Files; UNetConfig and Diffusion where they differ from CIFAR-10's; how many tensors and numbers
# the file has; a digest of all names and shapes, as improved-diffusion's code makes them.
RELEASED = [
    ("cifar10_uncond_50M_500K cifar10_uncond_vlb_50M_500K", {}, {},
     446, 52546438, "fa3ff96c7fd390a3"),
    ("imagenet64_uncond_100M_1500K imagenet64_uncond_vlb_100M_1500K", SIZE_64, {},
     450, 121063942, "b9f41325ed292b07"),
    ("imagenet64_cond_270M_250K", SIZE_64 | CLASSES, dict(time_scale=1.0),
     451, 273049350, "94895c44305bd70b"),
    ("upsample_cond_500K", SIZE_256 | CLASSES | dict(low_res=64), LINEAR | dict(T=4000),
     457, 279792390, "cf5b425108335df8"),
    ("lsun_uncond_100M_1200K_bs128 lsun_uncond_100M_2400K_bs64", LSUN, LINEAR | dict(T=1000),
     426, 113676678, "b9d738245e095482"),
]  # fmt: skip

@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("files, config, process, tensors, numbers, digest", RELEASED)
def test_released_files_load(tmp_path, files, config, process, tensors, numbers, digest):
    with torch.device("meta"):  # which takes no memory
        shapes = their_shapes(UNet(UNetConfig(**CIFAR10 | config)))
    assert len(shapes) == tensors and sum(map(math.prod, shapes.values())) == numbers
    assert hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest().startswith(digest)
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}  # a small file
    for file in files.split():
        torch.save(state, tmp_path / f"{file}.pt")
        with torch.device("meta"):
            model, ckpt = load_checkpoint(tmp_path / f"{file}.pt")
        assert dataclasses.asdict(model.config) == CIFAR10 | config and not model.training
        assert ckpt["classes"] is None and ckpt["config"] == {}
        expected = dict(schedule="cosine", T=4000, variance="learned", time_scale=None) | process
        assert dict(variance="learned", time_scale=None) | ckpt["diffusion"] == expected

# ---- The device, precision, pixels and pictures ------------------------------------------------

@pytest.mark.parametrize("has", [None, "avx2", "avx512_bf16", "amx_bf16"])
def test_auto_takes_bf16_only_where_it_is_native(monkeypatch, has):
    native = has in ("avx512_bf16", "amx_bf16")
    known = {name: name == has for name in ("avx2", "avx512_bf16", "amx_bf16")} if has else {}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    devices = [torch.device(name) for name in ("cpu", "cuda", "mps")]
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    best = [bf16 if native else fp32, bf16 if native else fp16, fp32]
    assert [pick_dtype("auto", device) for device in devices] == best
    for device in devices:
        for name, dtype in (("bf16", bf16), ("fp32", fp32), ("fp16", fp16)):
            assert pick_dtype(name, device) == dtype
            assert torch.backends.cudnn.allow_tf32 == (name != "fp32")  # who asks for fp32 gets it

@pytest.mark.parametrize("cuda, mps", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_auto_takes_the_best_device(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = runpy.run_path(model_file.__file__)  # the devices are looked at when it is imported
    names = ["auto", "cpu", *["mps"] * mps, *["cuda"] * cuda]
    assert found["DEVICES"] == names and found["WORLD"] == 1
    taken, joined, join = [], [], "init_process_group"
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(str(device)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.distributed, join, lambda *how, **more: joined.append((how, more)))
    for name in names:  # under torchrun, each rank has its own GPU
        want = names[-1] if name == "auto" else name
        assert str(found["pick_device"](name)) == want + ":1" * (want == "cuda")
    assert taken == ["cuda:1"] * 2 * cuda and not joined
    # Ranks join for hours, since one may have to work alone.
    monkeypatch.setattr(model_file, "WORLD", 2)
    pick_device("cpu"), pick_device("cuda")
    assert [how for how, _ in joined] == [("gloo",), ("cpu:gloo,cuda:nccl",)]
    assert min(more["timeout"].total_seconds() for _, more in joined) >= 6 * 3600

def test_images_become_the_nearest_bytes_unless_they_are_not_finite():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = every.double() / 127.5 - 1
    for near in (x, x.float(), x + 0.4 / 127.5, x - 0.4 / 127.5):
        found = to_pixels(near, [0])
        assert torch.equal(found, every) and found.dtype == torch.uint8
    assert to_pixels(torch.tensor([[[[-9.0, 9.0]]]]), [0]).flatten().tolist() == [0, 255]
    x = images(5).float()
    for bad in (math.nan, math.inf, -math.inf):
        x[1, 2, 3, 3] = x[4, 0, 0, 0] = bad
        with pytest.raises(FloatingPointError, match=r"\b11, 14\b"):
            to_pixels(x, range(10, 15))

@pytest.mark.parametrize(
    "n, size, columns, width, zoom",
    [(5, 8, None, 3, 8), (4, 32, None, 2, 2), (6, 100, 6, 6, 1), (7, 24, 2, 2, 2)],
)
def test_a_picture_holds_the_images_row_by_row_enlarged(n, size, columns, width, zoom):
    pixels = ((images(n, size) + 1) * 127.5).round().byte()
    picture, cell = np.asarray(make_picture(pixels, columns)), size * zoom + 1
    assert picture.shape == (-(-n // width) * cell + 1, width * cell + 1, 3)
    for k in range(n):
        top, left = k // width * cell + 1, k % width * cell + 1
        tile = picture[top : top + cell - 1, left : left + cell - 1]
        large = pixels[k].permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
        assert np.array_equal(tile, large)

ROOT = os.path.dirname(os.path.abspath(model_file.__file__))
CPU = torch.device("cpu")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# ---- How scripts are run -----------------------------------------------------------------------

def load_script(name):
    """The names of a script as it is before its main() is run."""
    return runpy.run_path(os.path.join(ROOT, name))["main"].__globals__

def script(name, *argv, **around):
    """Run a script in this process, as `python name argv` would -> its exit status. `around` may
    replace functions of the script, by functions that are given the original before all else."""
    handlers, stdout = [signal.getsignal(number) for number in SIGNALS], sys.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        try:
            names = load_script(name)
            names |= {key: functools.partial(new, names[key]) for key, new in around.items()}
            names["main"]()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            return 1 if isinstance(stop.code, str) else stop.code or 0
        finally:
            sys.stdout = stdout
            torch.use_deterministic_algorithms(False)
            for number, handler in zip(SIGNALS, handlers):
                signal.signal(number, handler)
    return 0

class Killed(BaseException):
    """What no handler catches: all that is then on disk is what a kill leaves there."""

def kill(*_, **__):
    raise Killed

def at_steps(steps, act):
    """For script(load_batch=...): call act(batch) in the updates after so many others."""
    def load_batch(original, *given):
        batch = original(*given)
        if given[4] in steps:
            act(batch)
        return batch
    return load_batch

# A tiny network on x.npz, and one with all that can be switched on.
SMALL = (
    "--class-cond --channels 8 --channel-mult 1 --num-res-blocks 1 --attention none --num-heads 2"
    " --T 4 --batch 8 --device cpu --dtype fp32 --sample-every 0 --data x.npz"
).split()
FULL = SMALL + (
    "--objective vlb --t-sampler importance --accum 2 --grad-clip 1 --warmup 4 --dropout 0.2"
    " --label-dropout 0.3 --flip --lr 0.01 --ema 0.3 --seed 3 --log-every 3 --save-every 2"
).split()  # fmt: skip

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)

def make_npz(path="x.npz", n=10, size=8):
    """Write n images of random pixels in the classes 0, 1 and 2 -> the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.arange(n) % 3)
    return pixels

@pytest.fixture
def with_arrays(here):
    """A folder to work in that holds x.npz."""
    make_npz()

def put(path, data=b"no picture"):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)

def pictures(colours, size=(8, 8)):
    """Pictures of one colour each: {path: its name}."""
    for path, colour in colours.items():
        put(path)
        Image.new("RGB", size, colour).save(path)

TINY = dict(image_size=8, channels=8, channel_mult=(1,), num_res_blocks=1, num_heads=2,
            attention_resolutions=())  # fmt: skip

def checkpoint(path, T=20, schedule="cosine", noise=0.1, classes=None, label_dropout=0, **changes):
    """Save a tiny network of random weights, as an average of others -> the network."""
    model = small_unet(noise, **TINY | dict(num_classes=classes and len(classes)) | changes)
    process = dict(schedule=schedule, T=T, variance="learned", time_scale=None)
    ema, config = model.state_dict(), dict(label_dropout=label_dropout)
    others = {name: weights + 1 for name, weights in ema.items()}
    put(path)
    torch.save(dict(unet=vars(model.config), ema=ema, model=others, diffusion=process,
                    classes=classes, config=config), path)  # fmt: skip
    return model

def saved(run="run"):
    return torch.load(os.path.join(run, "ckpt.pt"), weights_only=True)

def log(run="run"):
    """The rows of log.csv, as numbers."""
    head, *rows = open(os.path.join(run, "log.csv")).read().splitlines()
    assert head == "step,loss,bits_per_dim,grad_norm,lr,skipped,seconds"
    return [[float(x) for x in row.split(",")] for row in rows]

def states(run="run"):
    """All that changes in a run, but for the time; what is compared to the bit."""
    ckpt = saved(run)
    ckpt["optimizer"] = ckpt["optimizer"]["state"]
    names = "model ema optimizer t_sampler scaler sums step".split()
    return {name: ckpt[name] for name in names if name in ckpt}

same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)

def assert_is_the_same_run(one, other):
    same(states(one), states(other))
    assert [row[:6] for row in log(one)] == [row[:6] for row in log(other)]

@pytest.fixture(scope="module", autouse=True)
def two_ranks(request, tmp_path_factory):
    """Two ranks of torchrun that do what do_two_ranks, below, says, beside the tests that come
    first -> their folder and process."""
    if not any("ranks" in item.fixturenames for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("ranks")
    make_npz(folder / "x.npz")
    checkpoint(folder / "c.pt", classes=["0", "1", "2"], noise=0.3)
    pictures({folder / f"p/{name}/1.png": "red" for name in "abc"})
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --".split()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *sys.path])}
    with open(folder / "output", "w") as output:
        command = [sys.executable, *torchrun, __file__]
        ranks = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=env)
        yield folder, ranks
    ranks.terminate()

# ---- train.py: flags ---------------------------------------------------------------------------

PAPER = dict(
    data="cifar10", image_size=32, class_cond=False, low_res=None, flip=False, batch=128, seed=0,
    schedule="cosine", T=4000, variance="learned", channels=128, channel_mult=(1, 2, 2, 2),
    num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4, dropout=0.3, objective="hybrid",
    t_sampler="uniform", lr=1e-4, warmup=0, ema=0.9999, grad_clip=0, label_dropout=0.0, init=None,
    out="runs/cifar10", device="auto", dtype="auto", compile=False, steps=500_000, decay=0.0,
    accum=1, log_every=100, sample_every=10_000, save_every=1_000, eval_only=False, ckpt=None,
    eval_images=10_000, eval_steps=None, eval_calls=10, spacing=1.0,
)  # fmt: skip
DIGITS = PAPER | dict(
    data="digits", image_size=16, class_cond=True, label_dropout=0.1, T=1000, channels=32,
    channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(8,), dropout=0.0, steps=1200,
    batch=64, lr=2e-3, warmup=100, ema=0.995, grad_clip=1.0, log_every=40, sample_every=400,
    save_every=200, out="runs/digits",
)  # fmt: skip
FOLDER = PAPER | dict(
    data="p", image_size=64, channel_mult=(1, 2, 3, 4), dropout=0.0, steps=1_500_000, flip=True,
    out="runs/p",
)  # fmt: skip
SAVED = FOLDER | TINY | dict(T=20, class_cond=True)  # by checkpoint()

def parsed(*argv):
    return vars(load_script("train.py")["parse_args"]([str(word) for word in argv])[0])

@pytest.mark.parametrize("flags, expected", [
    ("", DIGITS),
    ("--data cifar10", PAPER),
    ("--data p", FOLDER),
    ("--data p --class-cond --label-dropout 0.2 --low-res 16 --no-flip --schedule linear --out o",
     FOLDER | dict(class_cond=True, label_dropout=0.2, low_res=16, flip=False, schedule="linear",
                   out="o")),
    ("--data p/x.npz", FOLDER | dict(  # the size of the arrays
        data="p/x.npz", image_size=24, out="runs/x", attention_resolutions=(12,))),
    ("--attention none --lr 0", DIGITS | dict(attention_resolutions=(), lr=0)),
    ("--eval-only --ckpt c.pt --data p --eval-calls 4 --eval-steps 5 --spacing 3",
     SAVED | dict(eval_only=True, ckpt="c.pt", eval_calls=4, eval_steps=5, spacing=3)),
    ("--init c.pt --data p --dropout 0.1", SAVED | dict(init="c.pt", dropout=0.1)),
])  # fmt: skip
def test_flags_are_the_papers_then_those_of_the_data_then_what_is_typed(flags, expected, here):
    os.makedirs("p")
    make_npz("p/x.npz", size=24)
    checkpoint("c.pt", classes=["a", "b"])
    assert parsed(*flags.split()) == expected

OTHER = dict(  # than in FULL; what a resumed run may not change, and what it may
    image_size=16, class_cond=None, low_res=4, schedule="linear", T=5, channels=16,
    channel_mult="1,1", num_res_blocks=2, attention_resolutions="8", num_heads=4, label_dropout=0.5,
    flip=None, objective="simple", variance="small", t_sampler="uniform", dropout=0.5, batch=5,
    lr=0.5, warmup=9, ema=0.1, grad_clip=2, seed=6, init="c.pt",
)  # fmt: skip
FREE = dict(data="y.npz", device="auto", dtype="bf16", steps=7, decay=0.5, accum=4,
            log_every=1, sample_every=5, save_every=9)  # fmt: skip

def test_a_resumed_run_keeps_what_it_is_and_may_change_how_it_runs(whole, with_arrays, capsys):
    os.rename("x.npz", "y.npz")
    names, config = load_script("train.py"), saved(whole)["config"]
    names["load_checkpoint"], parse = functools.cache(names["load_checkpoint"]), names["parse_args"]
    assert config == parsed(*FULL, "--data", whole / "x.npz", "--steps", 9, "--out", whole)
    more = "out compile eval_only ckpt eval_images eval_steps eval_calls spacing".split()
    assert config.keys() == {*OTHER, *FREE, *more}
    def words(name, value):
        name = "--" + name.removesuffix("_resolutions").replace("_", "-")
        return [name, str(value)] if value is not None else ["--no-" + name[2:]]
    measure = ["--data", "y.npz", "--eval-only", "--ckpt", str(whole)]
    for i, (name, value) in enumerate(OTHER.items()):
        for source in (["--out", str(whole)], measure)[: 1 + (i < 10)]:  # the shape, and T
            with pytest.raises(SystemExit):
                parse([*source, *words(name, value)])
            assert words(name, 0)[0] in capsys.readouterr().err.splitlines()[-1], name
    free = [word for item in FREE.items() for word in words(*item)]
    args, ckpt = parse(["--out", str(whole), "--compile", *free])
    assert vars(args) == config | FREE | dict(compile=True) and ckpt["step"] == 9
    assert parsed("--out", whole) == config  # nothing typed
    parse([*measure, "--variance", "small", "--batch", "3"])
    assert parsed("--out", "new", "--data", "y.npz")["T"] == 4000  # another run
    for size, mult in {16: (1, 2, 2), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}.items():
        assert parsed("--data", ".", "--image-size", size)["channel_mult"] == mult

BAD = """
    train.py --image-size 0; train.py --label-dropout 1.1; train.py --ema nan; train.py --lr -1
    train.py --channel-mult 1,,2; train.py --step 3; train.py --data nowhere
    train.py --data no.npz; train.py --data file; train.py --data cifar10 → --image-size 8
    train.py --eval-steps 3; train.py --low-res 3 → low; train.py --init nowhere → nowhere
    train.py --num-heads 3 → heads; train.py --eval-only --ckpt nowhere → nowhere
    train.py --accum 9 --batch 8 → --batch 8; train.py --objective hybrid --variance small
    train.py --attention 5 → 5; train.py --data float.npz; train.py --data wide.npz → wide
    train.py --data labels.npz; train.py --data names.npz; train.py --T 1
    train.py --channels 5 --channel-mult 4 → channels; sample.py --ckpt no → no
    sample.py --ckpt file → file; sample.py --n 0; sample.py --steps 21; sample.py --class X → X
    sample.py --guidance 2; sample.py --eta 0.5; sample.py --out x.jpg
    sample.py --out s3://b/x.npz; train.py --out s3://b/run; train.py --data halves.npz → names
    sample.py --low-res x.npz; sample.py --variance small; train.py --objective mse
    train.py --accum 0; train.py --init file → file
""".replace("\n", ";").split(";")

@pytest.mark.parametrize("line", [line.strip() for line in BAD if line.strip()])
def test_what_is_typed_wrong_is_refused_by_name_and_leaves_nothing(line, here, capsys):
    pixels = make_npz()
    np.savez("float.npz", arr_0=pixels / 255)
    np.savez("wide.npz", arr_0=pixels[:, 2:])
    np.savez("labels.npz", arr_0=pixels, arr_1=np.arange(9))
    np.savez("halves.npz", arr_0=pixels, arr_1=np.arange(10) / 2)
    np.savez("names.npz", arr_0=pixels, arr_1=np.arange(10) - 1, class_names=list("abcdefghij"))
    put("file")
    checkpoint("c.pt", classes=["2", "0", "dog"])
    before = sorted(os.walk("."))
    line, _, named = line.partition(" → ")
    name, *flags = line.split()
    given = [*SMALL, "--image-size", 8] if name == "train.py" else ["--ckpt", "c.pt"]
    assert script(name, *given, "--device", "cpu", "--steps", 1, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{name}: error: ") and (named or flags[0]) in error
    assert sorted(os.walk(".")) == before

def test_a_run_says_and_stores_what_it_is_and_a_torn_row_of_its_log_is_cut(with_arrays, capsys):
    flags = "--steps 8 --log-every 3 --warmup 16 --out".split()
    assert script("train.py", *SMALL, *flags, "run") == 0
    out, ckpt, rows = capsys.readouterr().out, saved(), log()
    for word in ("batch=8", "channel_mult=(1,)", "lr=0.0001", "10 images", "run begins", "ckpt.pt"):
        assert word in out, word
    assert ckpt["config"] == parsed(*SMALL, *flags, "run") and ckpt["step"] == 8
    assert dict(schedule="cosine", T=4, variance="learned").items() <= ckpt["diffusion"].items()
    assert ckpt["classes"] == ["0", "1", "2"] and ckpt["unet"]["num_classes"] == 3
    assert "scaler" not in ckpt and set(os.listdir("run")) == {"ckpt.pt", "log.csv"}
    assert [row[0] for row in rows] == [3, 6, 8]
    assert [row[4] for row in rows] == pytest.approx([1e-4 * n / 16 for n in (3, 6, 8)])
    assert 0 <= rows[0][6] <= rows[1][6] <= rows[2][6] < 60
    torch.save(ckpt | {"seconds": 1000.0}, "run/ckpt.pt")  # from which they go on
    with open("run/log.csv", "a") as file:
        file.write("7")  # of a run that was killed while it wrote
    assert script("train.py", *SMALL, "--out", "run", "--steps", 9) == 0  # the command again
    assert "run goes on after update 8" in capsys.readouterr().out
    assert [row[0] for row in log()] == [3, 6, 8, 9]
    assert 1000 <= saved()["seconds"] < 1060 and 1000 <= log()[-1][6] < 1060

# ---- train.py: what a step sees ----------------------------------------------------------------

def marked_images():
    """Ten images of 4×6 pixels and their labels 100 … 109. Image i has the values i+1, 101+i and
    201+i in red, green and blue, but for its upper left pixel, which is 0, 255, 128."""
    images = np.empty((10, 3, 4, 6), np.uint8)
    images[:] = np.arange(10)[:, None, None, None] + np.array([1, 101, 201])[:, None, None]
    images[:, :, 0, 0] = [0, 255, 128]
    return images, np.arange(100, 110)

def seen(step, **changes):
    """What load_batch gives for a step of training on the marked images: x0, y, t, weights, noise;
    and which of the images these are."""
    args = Namespace(**dict(batch=4, seed=0, flip=False, label_dropout=0.0) | changes)
    batch = train.load_batch(args, *marked_images(), UniformSampler(8), step, CPU)
    return *batch, (batch[0][:, 0, 2, 3] * 127.5 + 127.5 - 1).round().int().tolist()

def test_an_epoch_shows_each_image_once_with_its_label_in_an_order_of_its_own():
    batches = [seen(step) for step in range(10)]  # 40 images: step 2 ends one epoch, begins another
    order = [i for batch in batches for i in batch[5]]
    assert [k for batch in batches for k in batch[1].tolist()] == [100 + i for i in order]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    assert seen(0, batch=10, seed=1)[5] not in epochs
    assert seen(0, batch=35)[5] == order[:35]  # more images than there are

def test_images_are_mirrored_and_lose_their_labels_by_chance_and_noise_and_t_are_random():
    steps, B, T = 40, 64, 8
    batches = [seen(step, batch=B, flip=True, label_dropout=0.3) for step in range(steps)]
    for x0, y, _, weights, _, numbers in batches:
        assert x0.shape == (B, 3, 4, 6) and x0.dtype == torch.float32 and (weights == 1).all()
        true = torch.from_numpy(marked_images()[0][numbers]).double() * 2 / 255 - 1
        mirrored = x0[:, 0, 0, 5] == -1
        true[mirrored] = true[mirrored].flip(3)  # left to right
        assert (x0 - true).abs().max() < 2e-7 and x0.min() == -1 and x0.max() == 1
        assert all(k in (-1, 100 + i) for k, i in zip(y.tolist(), numbers))
    x0, y, t, _, noise = (torch.cat([batch[k] for batch in batches]) for k in range(5))
    mirrored, hidden, n = x0[:, 0, 0, 5] == -1, y == -1, steps * B
    for which, share in ((mirrored, 0.5), (hidden, 0.3), (mirrored & hidden, 0.15)):
        assert abs(which.double().mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
        assert len({tuple(step.tolist()) for step in which.view(steps, B)}) == steps
    assert abs(torch.bincount(t) / n - 1 / T).max() < 5 * (1 / T / n) ** 0.5 and t.max() == T - 1
    assert len({tuple(step.tolist()) for step in t.view(steps, B)}) == steps
    assert len(noise[:, 0, 0, 0].unique()) == n  # each image of each step has its own
    assert_noise(noise.flatten(1).T)  # a row for each pixel
    # Without the flags, nothing of this; the same step again sees the same, another seed does not.
    plain, again, other = seen(3, batch=B), seen(3, batch=B), seen(3, batch=B, seed=1)
    assert (plain[0][:, 0, 0, 0] == -1).all() and (plain[1] >= 100).all()
    assert all(torch.equal(one, two) for one, two in zip(plain[:5], again[:5]))
    assert not torch.equal(plain[2], other[2]) and not torch.equal(plain[4], other[4])

# ---- train.py: the loop ------------------------------------------------------------------------

def plain_training(config, unet):
    """A run as the paper has it -> the first network, the last, its average, the sampler of t, and
    the log's rows."""
    with np.load("x.npz") as file:
        images, labels = file["arr_0"].transpose(0, 3, 1, 2), file["arr_1"]
    torch.manual_seed(config.seed)
    model = UNet(UNetConfig(**unet))
    if config.init:
        model.load_state_dict(torch.load(config.init, weights_only=True)["ema"])
    first, average, net = copy.deepcopy(model), copy.deepcopy(model), model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    process = Diffusion(config.schedule, config.T, config.variance)
    sampler = T_SAMPLERS[config.t_sampler](config.T)
    rows, recent = [], []
    for k in range(1, config.steps + 1):
        batch = train.load_batch(config, images, labels, sampler, k - 1, CPU)
        x0, y, t, importance, noise = batch
        if config.low_res:
            side = config.image_size // config.low_res
            blocks = x0.unflatten(3, (-1, side)).unflatten(2, (-1, side)).mean((3, 5))
            net = functools.partial(model, low_res=blocks)
        loss, _ = process.losses(net, x0, t, y, noise, config.objective)
        optimizer.zero_grad()
        (importance * loss).mean().backward()
        gradients = torch.cat([w.grad.flatten() for w in model.parameters()])
        clip = min(1, config.grad_clip / gradients.norm()) if config.grad_clip else 1
        lr = config.lr * min(1, k / config.warmup) if config.warmup else config.lr
        if config.decay:
            lr *= min(1, (config.steps - k + 1) / (config.decay * config.steps))
        optimizer.param_groups[0]["lr"] = lr
        for w in model.parameters():
            w.grad *= clip
        optimizer.step()
        decay = min(config.ema, k / (9 + k))
        for mean, w in zip(average.parameters(), model.parameters()):
            mean.data = decay * mean.data + (1 - decay) * w.data
        sampler.update(t, loss.detach())
        recent.append([(importance * loss).mean().item(), gradients.norm().item()])
        if k % config.log_every == 0 or k == config.steps:
            rows.append([k, *np.mean(recent, axis=0), lr])
            recent = []
    return first, model, average, sampler, rows

def assert_is_plain_training(run):
    """A run's checkpoint and log are those of the plain loop, within ten times the errors that five
    seeds had. Clipped to 1e-8, gradients are so small beside Adam's ε that rounding is not
    amplified; else Adam may make a step of ±lr of what is mere rounding."""
    state = saved(run)
    config = Namespace(**state["config"])
    first, *plain, sampler, expected = plain_training(config, state["unet"])
    linear = config.grad_clip == 1e-8
    for part, network in zip(("model", "ema"), plain):
        found, mine, begun = (torch.cat([w.flatten() for w in each.values()]) for each in (
            state[part], network.state_dict(), first.state_dict()))  # fmt: skip
        far, way = (found - mine).abs(), (mine - begun).abs()
        assert far.quantile(0.98) < 2e-3 * way.mean() and way.mean() > 1e-4, part
        assert far.norm() < (1e-4 if linear else 0.1) * way.norm(), part
    for row, wanted in zip(log(run), expected, strict=True):
        assert row[:2] + row[3:5] == pytest.approx(wanted, rel=3e-4)
        assert row[5] == 0 and 0 < row[2] < 100
    if config.t_sampler == "importance":
        assert torch.equal(state["t_sampler"]["counts"], sampler.counts)
        assert min(sampler.counts) >= 10  # the weights were not 1 throughout

@pytest.mark.parametrize("flags", [
    "--objective simple --variance small --label-dropout 0.3 --steps 7 --ema 0.3 --flip",
    "--objective vlb --low-res 2 --no-flip --schedule linear --init init.pt --ema 0.1",
    "--objective hybrid --accum 2 --warmup 4 --t-sampler importance --init init.pt --ema 0.3"
    " --decay 0.6",
    "--objective vlb --accum 3 --warmup 100 --t-sampler importance --init init.pt --ema 0.9",
])  # fmt: skip
def test_training_is_the_plain_loop_of_the_paper(flags, with_arrays):
    given = "--lr 1 --grad-clip 1e-8" if "init" in flags else "--lr 0.01"
    shape = dict(channel_mult=(1, 2), attention_resolutions=(4,))
    shape |= dict(low_res=2, schedule="linear") if "low-res" in flags else {}
    checkpoint("init.pt", classes=["0", "1", "2"], T=4, **shape)
    given += " --channel-mult 1,2 --attention 4 --log-every 5 --steps 11 --out run"
    assert script("train.py", *SMALL, *given.split(), *flags.split()) == 0
    assert_is_plain_training("run")

def test_what_a_network_counts_is_in_its_average(with_arrays):
    class Counting(UNet):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("count", torch.zeros(()))
        def forward(self, *given, **more):
            self.count += self.training
            return super().forward(*given, **more)
    flags = "--steps 3 --accum 2 --log-every 1 --sample-every 3 --out run --no-class-cond".split()
    counting = dict(UNet=lambda _, config: Counting(config))
    assert script("train.py", *SMALL, *flags, "--label-dropout", 0.5, **counting) == 0
    assert saved()["model"]["count"] == saved()["ema"]["count"] == 6

def see_network(patch, out=None):
    """Record what the network is given -> a list of dicts of x, t, y, low_res and the dtype."""
    seen, forward = [], UNet.forward
    def spy(self, x, t, y=None, low_res=None):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        seen.append(dict(x=x, t=t, y=y, low_res=low_res, dtype=dtype))
        return (out or forward)(self, x, t, y, low_res)
    patch.setattr(UNet, "forward", spy)
    return seen

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_the_products_and_not_of_what_is_learned(dtype, with_arrays, monkeypatch):
    seen, compiled = see_network(monkeypatch), []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    flags = "--steps 1 --lr 1 --grad-clip 1e-8 --compile --out run --dtype".split()
    assert script("train.py", *SMALL, *flags, dtype.replace("loat", "p").replace("bfp", "bf")) == 0
    assert {call["dtype"] for call in seen} == {getattr(torch, dtype)} and len(compiled) == 1
    seen.clear()
    assert script("train.py", *SMALL, *flags[:-4], "--out", "exact") == 0
    assert {call["dtype"] for call in seen} == {torch.float32} and len(compiled) == 1
    # The gradient's norm, and the first update of a network that begins as 0, are nearly the same.
    state, exact = saved("run"), saved("exact")
    assert log("run")[0][1:4] == pytest.approx(log("exact")[0][1:4], rel=0.03)
    for part, name in itertools.product(("model", "ema"), ("out.2.weight", "out.2.bias")):
        far = (state[part][name] - exact[part][name]).norm()
        assert state[part][name].dtype == torch.float32
        assert far < 0.03 * exact[part][name].norm() and exact[part][name].norm() > 0
    assert ("scaler" in state) == (dtype == "float16") and "scaler" not in exact

# ---- train.py: the log, and resuming -----------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 updates with all that can be switched on: its folder."""
    folder = tmp_path_factory.mktemp("whole")
    make_npz(folder / "x.npz")
    assert script("train.py", *FULL, "--data", folder / "x.npz", "--steps", 9, "--out", folder) == 0
    return folder

def test_the_log_estimates_the_bound_of_the_weights_themselves_without_dropout(here):
    # A resumed run whose weights no longer change, and whose average is far from them.
    pixels = make_npz(n=16)
    flags = "--lr 0 --dropout 0.5 --ema 1 --batch 16 --log-every 1 --out run --steps".split()
    assert script("train.py", *SMALL, *flags, 1) == 0
    model = checkpoint("other.pt", classes=["0", "1", "2"], noise=0.3)
    torch.save(saved() | dict(model=model.state_dict(), step=10**6), "run/ckpt.pt")
    assert script("train.py", "--out", "run", "--steps", 10**6 + 10) == 0
    rows, process = np.array([row[2] for row in log()[1:]]), Diffusion(T=4)
    x0, y = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.arange(16) % 3
    exact = [sum(part.sum() for part in process.bits_per_dim(model, x0, y)) / 16 for _ in range(10)]
    error = (np.var(rows, ddof=1) / 10 + np.var(exact, ddof=1) / 10) ** 0.5
    assert len(rows) == 10 and abs(rows.mean() - np.mean(exact)) < 4 * error < 0.05 * rows.mean()

def test_a_killed_run_resumes_to_the_bit(whole, with_arrays):
    flags = [*FULL, "--save-every", 4, "--steps", 9, "--out", "run"]
    with pytest.raises(Killed):
        script("train.py", *flags, load_batch=at_steps([7], kill))
    assert saved()["step"] == 4 and [row[0] for row in log()] == [3, 6]
    with pytest.raises(Killed):  # resumed, and killed at once: row 6, after the checkpoint, is cut
        script("train.py", "--out", "run", load_batch=at_steps([5], kill))
    assert [row[0] for row in log()] == [3]
    for _ in range(2):  # the flags are the run's; a finished run is left as it is
        assert script("train.py", "--out", "run") == 0
        assert_is_the_same_run("run", whole)

@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_stops_and_the_run_resumes_to_the_bit(number, whole, with_arrays):
    def unheard(*_):  # rather than to end pytest, if train.py does not listen to the signal
        raise RuntimeError(f"{number} was not handled")
    before = signal.signal(number, unheard)
    flags = [*FULL, "--sample-every", 5, "--save-every", 1000, "--steps", 9, "--out", "run"]
    stop = at_steps([4, 6], lambda _: signal.raise_signal(number))
    assert script("train.py", *flags, load_batch=stop) == 128 + number
    assert saved()["step"] == 5 and not os.path.exists("run/samples")  # nobody waits for a grid
    signal.signal(number, signal.SIG_IGN)  # as under nohup: then it stops nothing
    flags = "--out run --sample-every 0".split()
    assert script("train.py", *flags, load_batch=stop) == 0
    signal.signal(number, before)
    assert_is_the_same_run("run", whole)

def test_a_run_killed_at_random_moments_resumes_and_a_second_signal_ends_it_at_once(with_arrays):
    def start(path, *argv, **around):
        """Run train.py in a process of its own until there is this file -> its id."""
        child = os.fork()
        if child == 0:
            with contextlib.redirect_stdout(io.StringIO()):
                script("train.py", *argv, **around)
            os._exit(0)
        while not os.path.exists(path) and time.monotonic() < begin + 60:
            time.sleep(0.01)
        return child
    def hang(_):
        put("hangs")
        time.sleep(60)
    begin = time.monotonic()
    flags = [*SMALL, "--out", "hanging", "--steps", 9]
    hanging = start("hangs", *flags, load_batch=at_steps([1], hang))
    os.kill(hanging, signal.SIGTERM)
    flags = [*FULL, "--steps", 24, "--out", "run", "--save-every"]
    for _ in range(2):
        child = start("run/ckpt.pt", *flags, 1)
        time.sleep(random.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    time.sleep(1.1)
    os.kill(hanging, signal.SIGTERM)
    status = os.waitpid(hanging, 0)[1]
    assert os.WIFSIGNALED(status) and time.monotonic() < begin + 40  # not after the update
    for out in ("run", "once"):
        assert script("train.py", *flags, 100, "--out", out) == 0
    assert_is_the_same_run("run", "once")

# ---- train.py: numbers that are not finite -----------------------------------------------------

def spoil_noise(batch):
    batch[4][0, 0, 0, 0] = math.nan

def test_updates_that_are_not_finite_are_skipped_and_a_row_of_them_is_the_last(with_arrays, capsys):
    flags = SMALL + "--t-sampler importance --lr 0.01 --ema 0.3 --log-every 4".split()
    found, how = [], dict(load_batch=at_steps([1, 4], spoil_noise))
    for out, steps in (("one", 1), ("run", 2), ("run", 6)):
        assert script("train.py", *flags, "--steps", steps, "--out", out, **how) == 0
        found.append(states(out))
    before, after, last = found
    same(before["model"], after["model"])
    same(before["optimizer"], after["optimizer"])
    for name, average in before["ema"].items():  # the average goes on: to step 2, by 2/11
        mean = 2 / 11 * average + 9 / 11 * before["model"][name]
        assert torch.allclose(after["ema"][name], mean, atol=1e-6)
    # The losses of the other seven images are kept, but no loss that is not finite.
    counts = [state["t_sampler"]["counts"].sum() for state in found]
    assert counts == [8, 15, 46] and last["t_sampler"]["losses"].isfinite().all()
    assert all(w.isfinite().all() for w in [*last["model"].values(), *last["ema"].values()])
    assert not torch.equal(after["model"]["out.2.weight"], last["model"]["out.2.weight"])
    rows = log()  # whose means are those of the updates that were made
    assert [[row[0], row[5]] for row in rows] == [[2, 1], [4, 0], [6, 1]]
    assert np.isfinite(rows).all() and rows[0][1:4:2] == log("one")[0][1:4:2]
    assert "1 updates skipped" in capsys.readouterr().out
    spoilt = dict(load_batch=at_steps([6, 7], spoil_noise))
    with pytest.raises(FloatingPointError):
        script("train.py", *flags, "--steps", 9, "--save-every", 8, "--out", "run", **spoilt)
    row = log()[-1]
    assert np.isnan(row[1:3]).all() and row[:1] + row[4:6] == [8, 0.01, 2] and saved()["step"] == 6

def test_a_grid_that_is_not_finite_ends_the_run_after_its_checkpoint(with_arrays, capsys):
    flags = [*SMALL, "--out", "run", "--steps"]
    assert script("train.py", *flags, 2, load_batch=at_steps([0], spoil_noise)) == 0
    spoil("run/ckpt.pt", "out.2.bias")
    assert script("train.py", *flags, 3, "--sample-every", 1) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "images [0, 1," in error and "1 of 3 updates were skipped" in error
    assert saved()["step"] == 3 and not os.path.exists("run/samples/0000003.png")

def test_a_gradient_whose_norm_overflows_leaves_the_weights_finite():
    for clip in (0, 1.0):
        w = torch.nn.Parameter(torch.zeros(5))
        optimizer, scaler = torch.optim.AdamW([w]), torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(1e30 * w.sum()).backward()
        norm = train.update_weights([w], optimizer, scaler, clip, False)
        assert norm.isinf() and w.isfinite().all()

def test_fp16_halves_its_scale_until_gradients_are_finite_and_resumes_to_the_bit(with_arrays):
    flags = SMALL + "--dtype fp16 --dropout 0.1 --lr 0.01 --log-every 99 --steps".split()
    assert script("train.py", *flags, 1, "--out", "once") == 0
    first = saved("once")
    assert first["scaler"]["scale"] == 2**16
    torch.save(first | {"scaler": first["scaler"] | {"scale": 2.0**24}}, "once/ckpt.pt")
    shutil.copytree("once", "parts")
    for out, steps in (("parts", 12), ("parts", 15), ("once", 15)):
        assert script("train.py", "--out", out, "--steps", steps) == 0
    same(states("parts"), states("once"))
    skipped = log("once")[-1][5]
    assert 0 < skipped < 14 and saved("once")["scaler"]["scale"] == 2 ** (24 - skipped)

# ---- train.py: grids of samples ----------------------------------------------------------------

def cells(image, columns, size):
    """The images of a grid of enlarged pixels between black lines: uint8 (N, 3, size, size)."""
    image = Image.open(image) if isinstance(image, str) else image
    pixels, cell = np.asarray(image.convert("RGB")), size * max(1, 64 // size)
    line = (pixels.shape[1] - columns * cell) // (columns + 1)
    corners = itertools.product(*(range(line, n - line, cell + line) for n in pixels.shape[:2]))
    places = [np.s_[y : y + cell : cell // size, x : x + cell : cell // size] for y, x in corners]
    return torch.from_numpy(np.stack([pixels[place] for place in places])).permute(0, 3, 1, 2)

def drawn(model, process, n, y, sampler="dpm++", steps=25, seed=0, small=None, **options):
    """What a model draws from the noise of images 0 … n-1, as whole numbers (n, 3, 8, 8)."""
    if sampler == "dpm++":
        upsampler = small is not None
        steps = few_steps(process["T"], 8, steps, process["schedule"], upsampler)
    generators = [generator(seed, i) for i in range(n)]
    noise = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
    walk = Diffusion(**process, steps=steps)
    if small is not None:
        model, a = functools.partial(model, low_res=small), walk.alphas_bar[-1].float()
        if sampler == "dpm++":  # which begins from the small images
            noise = a.sqrt() * enlarged(small, 8) + (1 - a).sqrt() * noise
    x = walk.sample(model, noise, y, sampler, generators=generators, **options)
    return ((x.clamp(-1, 1) + 1) * 127.5).round()

def assert_close(one, other):
    """Pixels are the same, but for the last bit of a sum, which the size of a batch changes."""
    one, other = (torch.tensor(np.asarray(x)).double() for x in (one, other))
    assert one.shape == other.shape and (one - other).abs().max() <= 1

def test_a_grid_shows_what_the_averaged_weights_draw(whole, with_arrays, monkeypatch):
    assert script("train.py", *FULL, *"--steps 9 --sample-every 8 --out run".split()) == 0
    assert sorted(os.listdir("run/samples")) == ["0000008.png", "0000009.png"]
    assert_is_the_same_run("run", whole)  # which has drawn none
    found, y = cells("run/samples/0000009.png", 8, 8), torch.arange(64) % 3
    model, ckpt = load_checkpoint("run")
    assert_close(found, drawn(model, ckpt["diffusion"], 64, y, seed=3))
    assert found.float().std(0).min() > 0  # the images differ, at each pixel
    monkeypatch.setattr(Diffusion, "sample", kill)  # a grid that cannot be drawn costs no update
    with pytest.raises(Killed):
        script("train.py", *"--out run --steps 11 --sample-every 10".split())
    assert saved()["step"] == 10

def test_grids_take_25_steps_and_parts_as_in_training(with_arrays, monkeypatch):
    sizes, sample = [], Diffusion.sample
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, noise, *given, **more: sizes.append(
        len(noise)) or sample(self, net, noise, *given, **more))  # fmt: skip
    flags = "--T 60 --schedule linear --lr 0.1 --batch 32 --accum 2 --steps 2 --sample-every 9"
    assert script("train.py", *SMALL, *flags.split(), "--no-class-cond", "--out", "run") == 0
    assert script("train.py", *SMALL, *flags.split(), "--low-res", 4, "--out", "up") == 0
    assert sizes == [16] * 5
    model, ckpt = load_checkpoint("run")
    found = cells("run/samples/0000002.png", 8, 8)
    assert_close(found, drawn(model, ckpt["diffusion"], 64, None))
    tiles = cells("up/samples/0000002.png", 12, 8).reshape(16, 3, 3, 8, 8)  # small, drawn, true
    file, k = np.load("x.npz"), torch.arange(16) % 10
    images, labels = (torch.from_numpy(file[name])[k] for name in ("arr_0", "arr_1"))
    images = images.permute(0, 3, 1, 2)
    blocks = images.float().unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    assert_close(tiles[:, 0], blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    model, ckpt = load_checkpoint("up")
    small = blocks / 127.5 - 1
    assert_close(tiles[:, 1], drawn(model, ckpt["diffusion"], 16, labels, small=small))
    assert (tiles[:, 2] == images).all()

# ---- train.py: a folder of images --------------------------------------------------------------

COLOURS = dict(red=(255, 0, 0), lime=(0, 255, 0), blue=(0, 0, 255), white=(255,) * 3)

def nearest(pixels):
    """The names of colours (N, 3)."""
    return [min(COLOURS, key=lambda c: abs(x - COLOURS[c]).sum()) for x in pixels.astype(int)]

def load(data="p", classes=False, size=8):
    """load_data -> the colour of each picture; or pairs of it and the name of its class."""
    args = Namespace(data=data, image_size=size, class_cond=classes, seed=0)
    images, labels, names = train.load_data(args)
    assert images.dtype == np.uint8 and images.shape[1:] == (3, size, size)
    colours = nearest(np.array(images[:, :, size // 2, size // 2]))
    return list(zip(colours, [names[k] for k in labels])) if classes else colours

def test_classes_are_subfolders_in_order_and_what_is_no_picture_is_said(here, capsys):
    pictures({"p/10/x.webp": "white"}, (3000, 3000))  # the first, and the last to be decoded
    pictures({
        "p/9/x.png": "red", "p/cafe\u0301/a.png": "lime", "p/caf\u00e9/b.png": "blue",
        "p/cat/deep/er/c.jpg": "blue", "p/dog/a.png": "red", "p/dog/b.PNG": "lime",
        # What is not looked at: hidden names, what file servers keep, and runs.
        "p/.git/x.png": "red", "p/cat/.x.png": "red", "p/cat/.thumbs/x.png": "red",
        "p/@eaDir/x.png": "red", "p/#recycle/x.png": "red", "p/cat/@eaDir/x.png": "red",
        "p/run/samples/0000001.png": "red",
    })  # fmt: skip
    for path in ("run/ckpt.pt", "Thumbs.db", "cat/notes.txt", "cat/README", "9/no.jpg"):
        put(f"p/{path}")
    put("p/cat/cut.png", open("p/dog/a.png", "rb").read()[:40])
    os.mkfifo("p/dog/fifo.png")  # to open it would wait for ever
    os.symlink("nowhere", "p/dog/gone.png")
    for _ in range(2):  # decoded, then from the cache
        assert load(classes=True) == [
            ("white", "10"), ("red", "9"), ("lime", "café"), ("blue", "café"), ("blue", "cat"),
            ("red", "dog"), ("lime", "dog"),
        ]  # fmt: skip
        out = capsys.readouterr().out
        assert "cat/cut.png" in out and "9/no.jpg" in out and "7 images" in out
    pictures({"p/loose.png": "red"})
    assert len(load()) == 8
    put("q/a.png")
    for data in ("p", "q"):  # not every image has a class; no image can be read
        with pytest.raises(SystemExit):
            load(data, classes=True)

def test_a_folder_is_decoded_once_and_again_if_it_changes(here, monkeypatch):
    names, replace = [], os.replace  # of temporary files
    monkeypatch.setattr(os, "replace", lambda tmp, path: names.append(tmp) or replace(tmp, path))
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as it may be in each of two containers
    pictures({"p/a.png": "red", "p/b.bmp": "lime"})
    os.symlink("p", "link")
    assert load() == ["red", "lime"]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
        assert load() == load("./p/") == load("link") == ["red", "lime"]
    pictures({"p/c.png": "blue"})
    assert load() == ["red", "lime", "blue"]
    os.remove("p/a.png")
    assert load() == ["lime", "blue"]
    pictures({"p/b.bmp": "white"})  # of the same size, a minute later
    os.utime("p/b.bmp", (0, os.path.getmtime("p/b.bmp") + 60))
    assert load() == ["white", "blue"] and len(os.listdir("data/cache")) == 1
    assert len(set(names)) == len(names) == 4
    pictures({"q/p/a.png": "lime"})  # another folder of the same name, and another size
    assert load("q/p") == ["lime"] and load(size=16) == ["white", "blue"] == load()
    shutil.rmtree("data")  # the cache may be deleted at any time
    assert load() == ["white", "blue"]
    # A decoding that was killed leaves nothing that is taken for whole, or that stays for ever.
    (cache,) = os.listdir("data/cache")
    for name, age in (("killed", 10**6), ("now", 0)):
        put(f"data/cache/{cache}.{name}.tmp")
        os.utime(f"data/cache/{cache}.{name}.tmp", (time.time() - age,) * 2)
    pictures({"p/d.png": "red"})
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", kill)
        with pytest.raises(Killed):
            load()
    assert load() == ["white", "blue", "red"]
    left = "".join(os.listdir("data/cache"))
    assert ".now.tmp" in left and ".killed.tmp" not in left

def test_what_failed_is_named_and_tried_again_at_each_start(here, monkeypatch, capsys):
    pictures({"p/a.png": "red", "p/b.png": "blue"})
    wrong = [PermissionError(13, "denied")]
    def refusing(call):
        def refuse(path, *more):
            if wrong and str(path).endswith(("b.png", "dog")):
                raise wrong[0]
            return call(path, *more)
        return refuse
    monkeypatch.setattr(Image, "open", refusing(Image.open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    for _ in range(2):
        assert load() == ["red"] and "b.png" in capsys.readouterr().out
    wrong.clear()  # the file itself has not changed
    assert load() == ["red", "blue"] and "b.png" not in capsys.readouterr().out
    pictures({"p/c.png": "red"})
    for wrong[:] in ([MemoryError()], [OSError(5, "disk")], [OSError(24, "too many open files")]):
        with pytest.raises(type(wrong[0])):  # which say nothing about the picture
            load()
    wrong[:] = [OSError(22, "a wrong offset in the file")]
    assert load() == ["red", "red"]
    wrong[:] = [PermissionError(13, "denied")]
    pictures({"p/dog/x.png": "red"})
    with pytest.raises(PermissionError):  # else a class were missing
        load()
    os.renames("p/dog", "p/cat/lost+found/dog")
    assert load() == ["red", "red"]  # what is left out anyway need not be readable

def test_links_are_followed_at_any_depth_and_loops_are_cut(here):
    pictures({"far/cat/1.png": "red", "far/dog/2.png": "blue"})
    for link, target in {
        "p/a/deep/cat": "../../../far/cat", "p/b/deep/dog": os.path.abspath("far/dog"),
        "p/b/file.png": "../../far/cat/1.png", "p/a/deep/self": ".", "p/a/up": "..",
        "p/b/root": os.path.abspath("p"), "p/a/b": "../b", "p/b/deep/out": "../../..",
        "far/cat/back": os.path.abspath("p"),
    }.items():  # fmt: skip
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(target, link)
    # Each class shows what its links lead to, once: a has what b has, too.
    expected = [("blue", "a"), ("blue", "b"), ("red", "a"), ("red", "a"), ("red", "b")]
    assert sorted(load(classes=True)) == expected
    pictures({"far/cat/1.png": "white"}, (9, 9))  # a target changes
    assert sorted(load()) == ["blue", "blue", "white", "white", "white"]

C = (200, 100, 50)
ONE = Image.new("RGB", (8, 8), C)
BEST = dict(quality=100, subsampling=0)
OVER_WHITE = tuple(round(255 + (c - 255) * 51 / 255) for c in C)  # alpha 51 of 255
PICTURES = {  # a file, the image in it and how it is saved, and its colour for the eye
    "rgb.jpg": (ONE, BEST, C),
    "grey.png": (Image.new("L", (8, 8), 90), {}, (90,) * 3),
    "cmyk.jpg": (ONE.convert("CMYK"), BEST, C),
    "deep.png": (Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), {}, (100,) * 3),
    "alpha.png": (Image.new("RGBA", (8, 8), (*C, 51)), {}, OVER_WHITE),
    "greyalpha.png": (Image.new("LA", (8, 8), (0, 51)), {}, (204,) * 3),
    "key.png": (ONE, dict(transparency=C), (255,) * 3),
    "halfpalette.png": (ONE.quantize(1), dict(transparency=bytes([51])), OVER_WHITE),
    "photo.mpo": (ONE, dict(BEST, save_all=True, append_images=[Image.new("RGB", (8, 8))]), C),
}

def test_each_kind_of_picture_is_read_in_its_colours(here):
    os.makedirs("p")
    for name, (image, how, _) in PICTURES.items():
        image.save(f"p/{name}", **how)
    for kind in (np.int32, np.float32):  # 32 bits a pixel, whose range is not known
        Image.fromarray(np.full((8, 8), 100, kind)).save(f"p/{np.dtype(kind)}.tif")
    images, *_ = train.load_data(Namespace(data="p", image_size=8, class_cond=False))
    assert len(images) == len(PICTURES)
    for image, name in zip(images.astype(int), sorted(PICTURES)):
        assert abs(image - np.reshape(PICTURES[name][2], (3, 1, 1))).max() <= 2, name
    assert Image.MAX_IMAGE_PIXELS is None  # as of servers; here, large pictures are wanted

def read(path, size=8):
    return train.read_picture(".", size, path)

def test_channels_rows_and_columns_keep_their_order_and_the_centre_is_taken(here, monkeypatch):
    wide = np.zeros((8, 24, 3), np.uint8)
    for x, colour in enumerate(["red"] * 8 + ["red", "lime", "blue", "white"] * 2 + ["blue"] * 8):
        wide[:, x] = COLOURS[colour]
    wide[0] = 7  # the upper row
    for tall in (0, 1):
        Image.fromarray(wide.swapaxes(0, tall)).save("x.png")
        assert (read("x.png") == wide[:, 8:16].swapaxes(0, tall).transpose(2, 0, 1)).all()
    # Made smaller: each pixel is near the mean of those that it stands for. A JPEG may be decoded
    # at a fraction of its size, but at twice the size at least.
    y, x = np.mgrid[:256, :256]
    slope = np.stack([y * 0.9, x * 0.8, 250 - (x + y) * 0.4], 2).astype(np.uint8)
    mean = slope.reshape(8, 32, 8, 32, 3).mean((1, 3)).transpose(2, 0, 1)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *given, **more: sizes.append(
        self.size) or resize(self, *given, **more))  # fmt: skip
    for name, how in {"large.png": {}, "large.jpg": BEST}.items():
        Image.fromarray(slope).save(name, **how)
        assert abs(read(name) - mean)[:, 1:-1, 1:-1].max() < 2, name
    assert read("large.jpg", 32).shape == (3, 32, 32) and sizes[-1] == (64, 64)

# What the four corners of a picture stored as RGBK show, by the orientation in its EXIF, 1 … 8.
TURNED = "RGBK GRKB KBGR BKRG RBGK BRKG KGBR GKRB".split()

def test_exif_turns_a_picture_in_all_eight_ways_and_costs_none_if_it_is_damaged(here):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8, 0] = pixels[:8, 8:, 1] = pixels[8:, :8, 2] = 255
    def corners(name, exif, **how):
        Image.fromarray(pixels).save(name, exif=exif, **how)
        places = [read(name, 16)[:, i, j] for i in (3, 12) for j in (3, 12)]
        return "".join("RGB"[p.argmax()] if p.max() > 128 else "K" for p in places)
    exif = Image.Exif()
    for exif[0x0112], expected in enumerate(TURNED, 1):
        for name, how in {"x.jpg": BEST, "x.png": {}, "x.webp": dict(lossless=True)}.items():
            assert corners(name, exif, **how) == expected, name
    turn = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    for entries in (b"\0\x01" + turn.replace(b"\x06", b"\x09"), b"\0\x02" + turn[:9], bytes(9),
                    b"\0\x02" + turn + b"\x01\x1a\0\x05\0\0\0\x01\0\xff\0\0"):  # beyond the end
        damaged = b"Exif\0\0MM\0*\0\0\0\x08" + entries + bytes(4)
        assert corners("x.jpg", damaged, **BEST) in ("RGBK", "BRKG"), entries

# ---- train.py: arrays, CIFAR-10, digits --------------------------------------------------------

def test_arrays_are_read_with_their_labels_and_never_run_what_they_hold(here):
    colours = np.array(list(COLOURS.values()), np.uint8)
    pixels = np.broadcast_to(colours[:, None, None], (4, 8, 8, 3))
    for i, (more, expected) in enumerate([
        (dict(arr_1=np.array([10, 2, 2, 1], np.uint8)), ["10", "2", "2", "1"]),
        (dict(labels=np.array(list("abca"))), list("abca")),
        (dict(arr_1=np.array([1, 0, 2, 2]), class_names=np.array(list("cab"))), list("acbb")),
    ]):  # fmt: skip
        np.savez(f"{i}.npz", images=pixels, **more)
        assert load(f"{i}.npz", classes=True) == list(zip(COLOURS, expected))
    np.savez("x.npz", arr_0=pixels)
    assert load("x.npz") == list(COLOURS)
    for name in ("images", "labels"):
        np.savez(f"{name}.npz", **dict(images=pixels) | {name: np.array([Evil()], dtype=object)})
        with pytest.raises((ValueError, SystemExit)):
            load(f"{name}.npz", classes=True)
    assert not os.path.exists("ran")

def test_cifar10_is_trained_on_and_measured_on_its_test_images(here, monkeypatch, capsys):
    import torchvision  # which takes seconds
    # An archive in its format, with 10 images in a batch, where a user may put it.
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    put("s/cifar-10-batches-py/batches.meta", pickle.dumps({"label_names": names}))
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = np.random.default_rng(0).integers(256, size=(6, 10, 3072), dtype=np.uint8)
    labels = np.stack([np.roll(range(10), i) for i in range(6)])
    for name, data, k in zip(batches, pixels, labels.tolist()):
        put(f"s/cifar-10-batches-py/{name}", pickle.dumps({"data": data, "labels": k}))
    os.makedirs("data")
    shutil.make_archive("data/cifar-10-python", "gztar", "s")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/x.tar.gz")
    for module in (torchvision.datasets.utils, torchvision.datasets.cifar):  # whose MD5 is another
        monkeypatch.setattr(module, "check_integrity", lambda path, *_: os.path.isfile(path))
    args = Namespace(data="cifar10", image_size=32, class_cond=True, seed=0)
    for held_out, part in ((False, np.s_[:5]), (True, np.s_[5:])):
        images, found, classes = train.load_data(args, held_out=held_out)
        assert (images == pixels[part].reshape(-1, 3, 32, 32)).all() and classes == names
        assert found.tolist() == labels[part].flatten().tolist()
    checkpoint("c.pt", T=4, image_size=32)
    flags = "--eval-only --ckpt c.pt --data cifar10 --eval-calls 4 --device cpu".split()
    assert script("train.py", *flags) == 0 and "on 10 images" in capsys.readouterr().out

def shape(mask):
    """What a mask of 0 … 1 shows, without its place and size."""
    image = Image.fromarray((255 * mask).astype(np.uint8))
    return np.asarray(image.crop(image.getbbox()).resize((8, 12)), float) / 255

@functools.cache
def template(digit):
    image = Image.new("L", (60, 60))
    ImageDraw.Draw(image).text((10, 5), digit, 255, ImageFont.load_default(size=30))
    return shape(np.asarray(image) > 90)

def digit_shown(x):
    """The digit that a picture (3, S, S) shows, and the colour of its paper."""
    paper = np.median(np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1), 1)
    far = np.linalg.norm(x - paper[:, None, None], axis=0)
    found = shape(np.where(far > 0.3 * far.max(), far / far.max(), 0))
    return min("0123456789", key=lambda k: ((found - template(k)) ** 2).sum()), paper

def test_digits_stand_in_any_place_and_colour_and_follow_from_the_seed():
    pixels, names = train.draw_digits(300, 16, seed=1)
    again, same = train.draw_digits(300, 16, seed=1)
    assert (pixels == again).all() and names == same and set(names) == set("0123456789")
    papers, room, right = [], [], 0
    for x, name in zip(pixels.astype(float), names):
        found, paper = digit_shown(x)
        right += found == name
        papers.append(paper)
        grey = np.tensordot([0.299, 0.587, 0.114], x, 1)
        ink = abs(grey - np.median(grey))
        assert ink.max() > 100  # white on dark paper, black on light
        rows, columns = (ink > 40).nonzero()
        room.append([rows.min(), 15 - rows.max(), columns.min(), 15 - columns.max()])
    assert right > 270 and pixels.shape == (300, 3, 16, 16) and pixels.dtype == np.uint8
    # The colours of paper are uniform: 255/sqrt(12) in each channel, which know nothing of another.
    assert np.cov(np.array(papers).T) == pytest.approx(255**2 / 12 * np.eye(3), abs=900)
    # There is as much room on one side as on the other, in the mean, and often none, or much.
    room = np.array(room)
    assert abs(room[:, ::2].mean(0) - room[:, 1::2].mean(0)).max() < 1.2
    assert room.min() == 0 and room.std(0).min() > 1.5 and (room[:, :2].sum(1) <= 9).all()

def test_held_out_digits_are_others_than_those_of_any_seed(monkeypatch):
    draw, sets = train.draw_digits, []
    monkeypatch.setattr(train, "draw_digits", lambda n, *given: draw(n // 333, *given))
    for seed, held_out in itertools.product((0, 1), (False, True)):
        args = Namespace(data="digits", image_size=16, class_cond=True, seed=seed)
        images, _, names = train.load_data(args, held_out=held_out)
        assert len(images) == 60 and names == list("0123456789")
        sets.append({image.tobytes() for image in images})
    assert all(not one & other for one, other in itertools.combinations(sets, 2))

# ---- train.py: classes are names ---------------------------------------------------------------

def test_classes_are_matched_by_name_when_resumed_begun_with_or_measured(here, capsys):
    pictures({"p/cat/1.png": "red", "p/dog/1.png": "lime", "p/owl/1.png": "blue"})
    pictures({"q/dog/1.png": "lime", "q/owl/1.png": "blue"})  # some of the classes
    pictures({"r/cat/1.png": "red", "r/dig/1.png": "red"})  # one that the network does not know
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    pixels[0, ..., 1] = pixels[1, ..., 2] = 255  # lime, blue
    np.savez("q.npz", arr_0=pixels, arr_1=np.array([1, 0]), class_names=np.array(["owl", "dog"]))
    pairs = set()
    def shown(to_device, images, labels, rows, device):
        pairs.update(zip(nearest(np.asarray(images[rows])[:, :, 4, 4]), labels[rows].tolist()))
        return to_device(images, labels, rows, device)
    tiny = [*SMALL, "--image-size", 8, "--steps", 1]
    assert script("train.py", *tiny, "--data", "p", "--out", "run") == 0
    measure = "--eval-only --ckpt run --eval-calls 4 --device cpu".split()
    new = [*tiny, "--init", "run", "--out", "new"]
    for data, flags in (("q", ["--out", "run", "--steps", 2]), ("q", new), ("q", measure),
                        ("q.npz", measure)):  # fmt: skip
        assert script("train.py", *flags, "--data", "r") == 2
        assert "dig" in capsys.readouterr().err.splitlines()[-1] and not os.path.exists("terms.csv")
        pairs.clear()
        assert script("train.py", *flags, "--data", data, to_device=shown) == 0
        assert pairs == {("lime", 1), ("blue", 2)}
    assert saved()["step"] == 2 and saved("new")["classes"] == ["cat", "dog", "owl"]
    assert script("train.py", *measure) == 0  # on the run's own data

# ---- train.py: bits per dimension --------------------------------------------------------------

MEASURE = "--eval-only --data x.npz --ckpt c.pt --device cpu --batch 5".split()

def measured(capsys, *flags, **around):
    """What --eval-only says: bits/dim, images, [errors], L_0, KLs, L_T; and terms.csv's rows."""
    assert script("train.py", *MEASURE, *flags, **around) == 0
    text = capsys.readouterr().out
    line = r"bits/dim (\S+) on (\d+) images,(.*)\nL_0 (\S+), KLs (\S+), L_T (\S+)\n"
    total, n, errors, *parts = re.search(line, text).groups()
    errors = [float(error) for error in re.findall(r"± (\d\S*)", errors)]
    head, *rows = open("terms.csv").read().splitlines()
    assert head == "t,bits_per_dim,draws" and "nan" not in text + str(rows)
    rows = {int(t): (float(L), int(n)) for t, L, n in (row.split(",") for row in rows)}
    return float(total), int(n), errors, *map(float, parts), rows

@pytest.mark.parametrize("flags, process", [
    ("", {}), ("--variance large", dict(variance="large")), ("--eval-steps 2", dict(steps=[0, 3])),
    ("--eval-steps 3 --spacing 2", dict(steps=[0, 1, 3])),
])  # fmt: skip
def test_the_exact_bound_is_the_mean_of_all_terms_and_the_prior(flags, process, here, capsys):
    model = checkpoint("c.pt", T=4)
    values = np.arange(0, 256, 17, dtype=np.uint8)[:12, None, None, None]
    np.savez("x.npz", arr_0=np.broadcast_to(values, (12, 8, 8, 3)))
    x0 = torch.from_numpy(values).expand(12, 3, 8, 8) / 127.5 - 1
    process = Diffusion(**dict(T=4) | process)
    runs = [process.bits_per_dim(model, x0)[0] for _ in range(30)]
    priors, terms = process.prior(x0), torch.stack(runs).mean(1)  # the means over the images
    bounds = torch.stack(runs).sum(2) + priors
    total, n, errors, L_0, kls, L_T, rows = measured(capsys, "--eval-calls", 4, *flags.split())
    assert n == 12 and abs(total - bounds.mean()) < 5 * bounds.mean(1).std() + 1e-4
    assert errors == [pytest.approx(bounds.std(1).mean().item() / 12**0.5, rel=0.15)]
    assert L_T == pytest.approx(priors.mean().item(), abs=6e-7)
    assert [total, L_0] == pytest.approx([L_0 + kls + L_T, rows[0][0]], abs=2e-4)
    assert list(rows) == list(range(process.num_steps))
    for t, (L_t, draws) in rows.items():
        assert draws == 12 and abs(L_t - terms[:, t].mean()) < 5 * terms[:, t].std() + 1e-4

def known_of(image):
    """A bound, its error, and a prior for images (N, 3, 8, 8), by their mean colours."""
    value = image.double().mean((1, 2, 3)) + 2
    return value, value / 8 - 0.2, value / 64

def know():
    """For script(**know()): the two estimates of an image differ by 2·error. Terms are 1 at t = 0;
    the first has one at t = 3, too, the second at t = 5."""
    turn = itertools.cycle([(3, -1), (5, 1)])
    def estimate(original, diffusion, model, x0, y, calls):
        (t, sign), (value, error, prior) = next(turn), known_of(x0)
        assert calls == 4  # twice 1 + 4 calls make the 10 that are asked for
        terms = torch.full((len(x0), diffusion.num_steps), math.nan)
        terms[:, 0], terms[:, t] = 1, value.float()
        return (value + sign * error).float(), terms, prior.float()
    return dict(estimate_bits_per_dim=estimate)

def test_every_figure_of_an_estimate_is_that_of_known_terms(here, capsys):
    checkpoint("c.pt")
    x0 = torch.from_numpy(make_npz(n=12)).permute(0, 3, 1, 2) / 127.5 - 1
    total, n, errors, *parts, rows = measured(capsys, **know())
    value, error, prior = known_of(x0)
    mean, prior = value.mean().item(), prior.mean().item()
    expected = [mean, error.norm().item() / 12, value.std().item() / 12**0.5]
    assert n == 12 and [total, *errors] == pytest.approx(expected, abs=6e-5)
    assert parts == pytest.approx([1, mean - prior - 1, prior], abs=1e-4)
    mean = pytest.approx(mean, 1e-5)
    assert rows == {0: (1, 24), 3: (mean, 12), 5: (mean, 12)}
    few = [measured(capsys, "--eval-images", 7, "--seed", seed, **know())[:2]
           for seed in (1, 1, 2)]  # a random choice, which the seed repeats  # fmt: skip
    assert few[0] == few[1] != few[2] and few[0][1] == 7
    assert few[0][0] != pytest.approx(value[:7].mean().item(), abs=1e-4)

def spoil(path, name, row=0, value=math.nan):
    ckpt = torch.load(path, weights_only=True)
    ckpt["ema"][name][row] = value
    torch.save(ckpt, path)

def test_upsamplers_and_one_image_are_measured_and_nan_is_no_number(here, monkeypatch, capsys):
    checkpoint("c.pt", T=8, low_res=4)
    make_npz()
    native = {"avx512_bf16": True, "amx_bf16": True}  # yet float32 is computed with
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native, raising=False)
    seen = see_network(monkeypatch)
    for calls in (8, 7):  # exactly, and estimated
        assert measured(capsys, "--eval-calls", calls, "--eval-images", 1)[1] == 1
    assert {call["dtype"] for call in seen} == {torch.float32}
    os.remove("terms.csv")
    checkpoint("c.pt", classes=["0", "1", "2"])
    for calls, spoilt in ((20, "label_emb.weight"), (7, "label_emb.weight"), (7, "out.2.bias")):
        spoil("c.pt", spoilt, 1)
        assert script("train.py", *MEASURE, "--eval-calls", calls) == 1
        out, error = capsys.readouterr()
        assert "bits/dim" not in out and not os.path.exists("terms.csv")
        which = "[1, 4, 7]" if spoilt != "out.2.bias" else "[0, 1, 2, 3, 4, 5, 6, 7, 8] and more"
        assert error.endswith(f"c.pt: not finite: the bound of images {which}\n")

# ---- sample.py ---------------------------------------------------------------------------------

PETS = ["2", "0", "dog"]

def sample(*flags):
    assert script("sample.py", "--device", "cpu", "--dtype", "fp32", *flags) == 0

def pixels_of(out, n):
    """The images in a file or folder, uint8 (n, 8, 8, 3)."""
    if out.endswith(".npz"):
        return np.load(out)["arr_0"]
    if out.endswith(".png"):
        return cells(out, math.ceil(n**0.5), 8)[:n].permute(0, 2, 3, 1).numpy()
    return np.stack([np.asarray(Image.open(f"{out}/{i:06}.png")) for i in range(n)])

def colour_of(y):
    """The colour (N, 3) that stands for class y; -1 has one too."""
    y = torch.as_tensor(y)
    return torch.stack([0.1 * y - 0.5, -0.15 * y + 0.3, 0.05 * y], dim=1).float()

def draw_colours(patch, T=20):
    """Replace the network by one which knows what it shall draw: the colour of its class, or, if
    it is an upsampler, its small image moved by that colour."""
    abar = Diffusion(T=T).alphas_bar
    def out(self, x, time, y, low_res):
        target = 0 if y is None else colour_of(y)[:, :, None, None]
        if low_res is not None:
            target = target + low_res.repeat_interleave(2, 2).repeat_interleave(2, 3)
        at = abar[(time.double() * T / 1000).round().long()].view(-1, 1, 1, 1)
        eps = (x - at.sqrt() * target) / (1 - at).sqrt()
        return torch.cat([eps, torch.zeros_like(eps)], dim=1).float()
    see_network(patch, out)

def bytes_of(x):
    """Colours or images in [-1, 1] (N, ...) as pixels of images (N, 8, 8, 3)."""
    x = np.asarray(x)[:, None, None] if np.ndim(x) == 2 else np.asarray(x)
    return np.broadcast_to(np.clip((x + 1) * 127.5, 0, 255).round(), (len(x), 8, 8, 3))

@pytest.mark.parametrize("flags", ["", "--guidance 3", "--sampler ddim --guidance 0.5"])
def test_each_image_is_of_its_class_in_every_output(flags, here, monkeypatch, capsys):
    checkpoint("c.pt", classes=PETS, label_dropout=0.1)
    draw_colours(monkeypatch)
    y = torch.arange(8) % 3  # each class in turn
    target = colour_of(y)
    if "--guidance" in flags:  # so many times as far from what is drawn without a class
        none = colour_of(torch.full_like(y, -1))
        target = none + float(flags.split()[-1]) * (target - none)
    for out in ("deep/x.npz", "x.png", "deeper/folder"):
        sample("--ckpt", "c.pt", "--n", 8, "--batch", 5, "--steps", 5, *flags.split(), "--out", out)
        assert_close(pixels_of(out, 8), bytes_of(target))
        assert out in capsys.readouterr().out.splitlines()
    file = np.load("deep/x.npz")
    assert file["arr_0"].dtype == np.uint8 and file["arr_1"].tolist() == y.tolist()
    assert file["class_names"].tolist() == PETS and len(os.listdir("deeper/folder")) == 8
    assert sorted(os.listdir()) == ["c.pt", "deep", "deeper", "x.png"]

def test_classes_that_come_in_turn_have_a_column_each(here, monkeypatch):
    checkpoint("c.pt", classes=PETS)
    draw_colours(monkeypatch)
    for n, flags, columns in ((12, "", 3), (3, "", 3), (16, "", 4), (12, "--class dog", 4)):
        sample("--ckpt", "c.pt", "--n", n, "--steps", 2, *flags.split())
        y = torch.arange(n) % 3 if not flags else torch.full((n,), 2)
        tiles = cells("samples.png", columns, 8)[:n].permute(0, 2, 3, 1)
        assert_close(tiles, bytes_of(colour_of(y)))

def test_a_gif_goes_from_noise_to_the_images(here, monkeypatch):
    checkpoint("c.pt", T=200, classes=PETS)
    draw_colours(monkeypatch, T=200)
    sample(*"--ckpt c.pt --n 5 --sampler ancestral --steps 120 --batch 2 --out x.gif".split())
    target, times, far = bytes_of(colour_of(torch.arange(5) % 3)), [], []
    with Image.open("x.gif") as gif:
        assert gif.n_frames == 40 and gif.info["loop"] == 0
        for frame in range(40):
            gif.seek(frame)
            times.append(gif.info["duration"])
            far.append(abs(cells(gif, 3, 8)[:5].permute(0, 2, 3, 1).numpy() - target).mean())
    assert far[0] > 40 and far[-1] <= 2 and far[-1] < far[20] < far[0]
    assert len(set(times[:-1])) == 1 and times[-1] > 10 * times[0]

def test_image_i_of_a_seed_is_the_same_in_any_batch_and_a_folder_is_resumed(here, monkeypatch):
    checkpoint("c.pt", classes=PETS, noise=0.3)
    flags = ["--ckpt", "c.pt", "--steps", 4, "--out"]
    sample(*flags, "all.npz", "--n", 7)
    sample(*flags, "parts.npz", "--n", 5, "--batch", 2)
    sample(*flags, "other.npz", "--n", 7, "--seed", 1)
    found, other = pixels_of("all.npz", 7), pixels_of("other.npz", 7)
    assert_close(found[:5], pixels_of("parts.npz", 5))
    several = itertools.combinations([*found.astype(int), *other.astype(int)], 2)
    assert all(abs(a - b).max() > 20 for a, b in several)
    sample(*flags, "images", "--n", 4)
    Image.fromarray(found[0]).save("images/000001.png")  # which is not drawn again
    os.remove("images/000002.png")
    sample(*flags, "images", "--n", 7, "--batch", 2)
    assert_close(pixels_of("images", 7), found[[0, 0, 2, 3, 4, 5, 6]])
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *given, **more: kill(save(*given, **more)))
    for out in ("new", "new.png", "new.gif"):  # no half file
        with pytest.raises(Killed):
            sample(*flags, out)
        assert not os.path.exists("new/000000.png") and not os.path.isfile(out)

@pytest.mark.parametrize("flags, variance, steps, sampler, options", [
    ("", "learned", 25, "dpm++", {}),
    ("--steps 7 --seed 4", "learned", 7, "dpm++", {}),
    ("--sampler ancestral", "learned", 250, "ancestral", {}),
    ("--sampler ancestral --steps 9 --variance small", "small", 9, "ancestral", {}),
    ("--sampler ancestral --steps 9 --variance large", "large", 9, "ancestral", {}),
    ("--sampler ddim", "learned", 25, "ddim", {}),
    ("--sampler ddim --steps 9 --eta 0.7", "learned", 9, "ddim", dict(eta=0.7)),
    ("--sampler ddim --steps 2 --dtype bf16", "learned", 2, "ddim", {}),
])  # fmt: skip
def test_flags_reach_the_sampler(flags, variance, steps, sampler, options, here, monkeypatch):
    model = checkpoint("c.pt", T=300, schedule="linear")
    seen = see_network(monkeypatch, lambda self, x, t, *_: torch.cat([x - 0.3, t[0] / 500 - x], 1))
    sample("--ckpt", "c.pt", "--n", 2, *flags.split(), "--out", "x.npz")
    dtype = torch.bfloat16 if "bf16" in flags else torch.float32  # of the network's products
    assert {call["dtype"] for call in seen} == {dtype}
    process, seed = dict(schedule="linear", T=300, variance=variance), 4 * ("--seed" in flags)
    expected = drawn(model, process, 2, None, sampler, steps, seed, **options)
    assert_close(pixels_of("x.npz", 2), expected.permute(0, 2, 3, 1))
    assert np.load("x.npz").files == ["arr_0"]  # the network knows no classes

@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ancestral"])
def test_dpm_begins_from_the_small_images_and_the_papers_sampler_from_noise(sampler, here):
    model = checkpoint("c.pt", T=300, low_res=4, noise=0.3)
    pixels = make_npz("small.npz", n=4, size=4)
    flags = "--low-res small.npz --ckpt c.pt --batch 3 --steps 5 --out x.npz --sampler".split()
    sample(*flags, sampler)
    small = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    process = dict(schedule="cosine", T=300)
    expected = drawn(model, process, 4, None, sampler, 5, small=small)
    assert_close(pixels_of("x.npz", 4), expected.permute(0, 2, 3, 1))

def test_small_images_are_enlarged_in_their_classes(here, monkeypatch, capsys):
    checkpoint("c.pt", low_res=4, classes=PETS)
    checkpoint("plain.pt", low_res=4)
    draw_colours(monkeypatch)
    small = np.random.default_rng(0).integers(96, 160, (4, 4, 4, 3), np.uint8)
    flags = "--low-res small.npz --steps 3 --batch 3 --out x.npz --ckpt".split()
    def check(ckpt, y, *more):
        sample(*flags, ckpt, *more)
        large = small[np.arange(len(y)) % 4].repeat(2, 1).repeat(2, 2) / 127.5 - 1
        moved = large + (0 if ckpt == "plain.pt" else colour_of(y)[:, None, None].numpy())
        assert_close(pixels_of("x.npz", len(y)), bytes_of(moved))
        assert ckpt == "plain.pt" or np.load("x.npz")["arr_1"].tolist() == y
    np.savez("small.npz", arr_0=small, arr_1=np.array([2, 0, 0, 1]))
    check("plain.pt", [0] * 4)
    check("c.pt", [0, 1, 1, 1, 0, 1], "--n", 6)  # the classes are 2, 0 and dog: 1 is number 1
    check("c.pt", [2] * 4, "--class", "dog")
    check("c.pt", [1] * 4, "--class", "0")
    np.savez("small.npz", arr_0=small, arr_1=np.array([0, 1, 1, 0]), class_names=["dog", "2"])
    check("c.pt", [2, 0, 0, 2])
    os.remove("x.npz")
    for labels in (np.arange(4), np.array([Evil()] * 4, dtype=object)):  # 3 is no class
        np.savez("small.npz", arr_0=small, arr_1=labels)
        assert script("sample.py", *flags, "c.pt") == 2 and not {"x.npz", "ran"} & set(os.listdir())

@pytest.mark.parametrize("name, value", [("out.2.bias", math.nan), ("out.2.bias", math.inf),
                                         ("label_emb.weight", math.nan)])  # fmt: skip
def test_a_network_that_is_not_finite_draws_nothing(name, value, here, capsys):
    checkpoint("c.pt", classes=PETS)
    spoil("c.pt", name, 2, value)  # of the bias, one channel; of the classes, one alone
    before = os.listdir()
    for out in ("x.png", "x.npz", "x.gif", "images"):
        flags = f"--ckpt c.pt --n 4 --steps 3 --device cpu --out {out}".split()
        assert script("sample.py", *flags) == 1, out
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir()) == [*before, "images"] and os.listdir("images") == []

def test_the_newest_run_is_drawn_from_else_the_checkpoint_in_assets(here):
    for name, size, age in (("a", 8, 30), ("b", 32, 10), ("c", 16, 20)):
        checkpoint(f"runs/{name}/ckpt.pt", image_size=size)
        os.utime(f"runs/{name}/ckpt.pt", (time.time() - age,) * 2)
    for flags, size in (([], 32), (["--ckpt", "runs/c"], 16), (["--ckpt", "runs/a/ckpt.pt"], 8)):
        sample("--n", 1, "--steps", 1, *flags, "--out", "x.npz")
        assert np.load("x.npz")["arr_0"].shape == (1, size, size, 3)
    sample("--steps", 1)
    assert cells("samples.png", 8, 32).shape == (64, 3, 32, 32)  # 64 images in samples.png
    shutil.rmtree("runs")
    sample("--n", 20, "--out", "x.npz")  # this is not the directory of sample.py
    file = np.load("x.npz")
    pixels, y = file["arr_0"].transpose(0, 3, 1, 2).astype(float), file["arr_1"].tolist()
    assert y == [k % 10 for k in range(20)] and pixels.shape[2:] == (16, 16)
    assert sum(digit_shown(x)[0] == str(k) for x, k in zip(pixels, y)) >= 15
    flags = f"--ckpt {ROOT}/assets/cifar10.pt --n 4 --steps 8 --guidance 2 --out x.npz".split()
    bluer = {}  # than red, by this many grey levels
    for name in ("ship", "frog"):  # a ship is on water or under the sky, a frog is not
        sample(*flags, "--class", name)
        bluer[name] = np.subtract(*np.load("x.npz")["arr_0"].mean((0, 1, 2))[[2, 0]])
    assert bluer["ship"] > bluer["frog"] + 20

# ---- Two ranks ---------------------------------------------------------------------------------

def note_masks(patch, found):
    """Have `found` fill with what each dropout of training hides, 0 and 1 for each number."""
    forward = torch.nn.Dropout.forward
    def record(self, h):
        out = forward(self, h)
        if self.training:
            hidden = ((out == 0) & (h != 0)).byte().flatten() + ord("0")
            found.append(bytes(hidden.tolist()).decode())
        else:
            assert torch.equal(out, h)  # grids and bits/dim are computed without
        return out
    patch.setattr(torch.nn.Dropout, "forward", record)

def kept_losses(part):
    """What an ImportanceSampler keeps of batches, of which it is given part(batch, sizes)."""
    sampler, g = ImportanceSampler(4), generator(0, 0)
    for sizes in ([1, 3], [0, 4], [70, 66], [5, 1], [40, 0], [1, 2]):  # of two ranks
        n = sum(sizes)
        t, losses = torch.randint(4, (n,), generator=g), torch.rand(n, generator=g)
        losses[::5] = math.nan
        sampler.update(part(t, sizes), part(losses, sizes))
    return {name: value.tolist() for name, value in sampler.state_dict().items()}

def do_two_ranks():
    """What each of two ranks does in a process of its own; it writes what it saw to a file."""
    rank, notes, device = int(os.environ["RANK"]), {}, functools.cache(model_file.pick_device)
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    flags = [*FULL, "--batch", "9", "--log-every", "5", "--save-every", "100", "--out"]
    def run(note, name, *argv, **around):  # the ranks join once for all runs
        around["pick_device"] = lambda original, name: device("cpu")
        notes[note] = script(name, *argv, **around)
        dist.barrier()
    def count(original, *given):
        notes[original.__name__] = notes.get(original.__name__, 0) + 1
        return original(*given)
    plain = "plain --dropout 0 --low-res 4 --steps 10 --lr 1 --grad-clip 1e-8 --sample-every 10"
    run("plain", "train.py", *flags, *plain.split(), make_picture=count)
    with pytest.MonkeyPatch.context() as patch:
        note_masks(patch, notes.setdefault("masks", []))
        run("whole", "train.py", *flags, "whole", "--steps", 9)
    stop = at_steps([4] * rank, lambda _: signal.raise_signal(signal.SIGTERM))
    run("stopped", "train.py", *flags, "parts", "--steps", 9, load_batch=stop)
    run("resumed", "train.py", *flags, "parts", "--steps", 9)
    nan, given = at_steps([1] * rank, spoil_noise), "--batch 9 --steps 3 --out nan".split()
    run("nan", "train.py", *SMALL, *given, load_batch=nan)
    folder = [*SMALL, "--data", "p", "--image-size", 8, "--steps", 1, "--out", "folder"]
    run("folder", "train.py", *folder, read_picture=count)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run("measured", "train.py", *MEASURE, "--eval-images", 9, **know())
    notes["said"] = text.getvalue()
    for out in ("ranks.npz", "images"):
        run(out, "sample.py", *f"--ckpt c.pt --n 7 --steps 4 --batch 2 --out {out}".split())
    run("elsewhere", "train.py", *flags, "elsewhere" if rank else "whole", "--steps", 12)
    notes["losses"] = kept_losses(lambda each, sizes: each.split(sizes)[rank])
    with open(f"notes{rank}.json", "w") as file:
        json.dump(notes, file)
    leave()

@pytest.fixture
def ranks(two_ranks, monkeypatch):
    """In the folder where they have worked, once they are done: what each of them noted."""
    folder, process = two_ranks
    assert process.wait(timeout=120) == 0, (folder / "output").read_text()
    monkeypatch.chdir(folder)
    return [json.load(open(f"notes{rank}.json")) for rank in range(2)]

def test_two_ranks_with_parts_train_as_the_plain_loop_does_and_one_draws(ranks):
    assert [notes["plain"] for notes in ranks] == [0, 0]
    assert_is_plain_training("plain")
    assert [notes.get("make_picture") for notes in ranks] == [1, None]
    assert script("train.py", "--out", "plain", "--steps", 12, "--sample-every", 0) == 0
    assert_is_plain_training("plain")  # resumed by one rank
    assert [notes["losses"] for notes in ranks] == [kept_losses(lambda each, _: each)] * 2
    masks = [mask for notes in ranks for mask in notes["masks"]]
    assert len(set(masks)) == len(masks) >= 2 * 9 * 2  # each step and rank has its own

def test_a_signal_to_one_rank_stops_both_and_they_resume_to_the_bit(ranks):
    assert [notes["stopped"] for notes in ranks] == [128 + signal.SIGTERM] * 2
    assert [notes["whole"] for notes in ranks] == [notes["resumed"] for notes in ranks] == [0, 0]
    assert_is_the_same_run("parts", "whole")
    # Ranks that see another checkpoint, or none, end at once.
    assert [notes["elsewhere"] for notes in ranks] == [1, 1] and saved("whole")["step"] == 9

def test_ranks_skip_an_update_together_decode_once_and_measure_and_draw_as_one(ranks, capsys):
    for name in ("nan", "folder", "measured", "ranks.npz", "images"):
        assert [notes[name] for notes in ranks] == [0, 0]
    (row,) = log("nan")
    assert row[5] == 1 and np.isfinite(row).all() and 0 < row[1] < 10
    assert [notes.get("read_picture") for notes in ranks] == [3, None]
    assert script("train.py", *MEASURE, "--eval-images", 9, **know()) == 0
    alone = re.findall("^(?:bits/dim|L_0) .*", capsys.readouterr().out, re.M)
    assert len(alone) == 2 and not ranks[1]["said"]
    assert set(alone) < set(ranks[0]["said"].splitlines())
    sample("--ckpt", "c.pt", "--steps", 4, "--n", 7, "--out", "one.npz")
    one, two = pixels_of("one.npz", 7), np.load("ranks.npz")
    assert_close(one, two["arr_0"])
    assert_close(one, pixels_of("images", 7))
    assert two["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0] and len(os.listdir("images")) == 7

if __name__ == "__main__":
    do_two_ranks()
