"""What the code claims, and what shows it.

Mathematics is compared with closed forms, float64 arithmetic written anew, Monte Carlo with a
stated error, or numbers from OpenAI's code. Training is compared with a plain loop, files with the
bytes they must hold. The scripts run as a user runs them. GPUs and MPS are hidden: what is claimed
to the bit is claimed for CPUs, and a wrong device must be wrong everywhere.
"""

import collections
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # one thread: tiny networks

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it: now, not while a test has replaced a function of torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

import model as model_file
import sampler as sampler_file
import train
from diffusion import (
    Diffusion, bits, cosine_betas, decoder_log_likelihood, few_steps, generator, guided,
    linear_betas, normal_kl, randn as draw_noise,
)  # fmt: skip
from model import (
    Attention, GroupNorm, ResBlock, UNet, UNetConfig, attend, draw_grid,
    load_checkpoint, pick_device, pick_dtype, read_checkpoint, run_script,
    save_checkpoint, timestep_embedding, to_pixels,
)  # fmt: skip
from sampler import ImportanceSampler, UniformSampler

torch.backends.mps.is_available = functools.cache(lambda: False)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which train.py has changed

ROOT = os.path.dirname(os.path.abspath(train.__file__))
LN2 = math.log(2)


@contextlib.contextmanager
def command(name, *argv):
    """Run what is inside with this command line; afterwards signals do what they did before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
                signal.signal(getattr(signal, name), signal.SIG_DFL)


def script(name, *argv):
    """Run a script of ours in this process, as `python name argv` would -> its exit status."""
    with command(name, *argv):
        try:
            runpy.run_path(os.path.join(ROOT, name), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
    return 0


def train_here(*argv):
    """Run the module train, in which a test may have replaced something -> its exit status."""
    with command("train.py", *argv):
        try:
            run_script(train.main)
        except SystemExit as stop:
            return stop.code or 0
    return 0


ENVIRONMENT = dict(os.environ)  # of other processes, whatever a test sets meanwhile
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 --".split()


def run_python(folder, *argv):
    """Run `python argv` in a folder -> what became of it."""
    command = [sys.executable, *map(str, argv)]
    how = dict(cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    return subprocess.run(command, **how)


@pytest.fixture(scope="module", autouse=True)
def start_early(request):
    """Some tests wait for processes of their own. What of these the tests to be run ask for is
    started now, in the order in which the tests come, and done beside them."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    for name in ("signalled_starts", "killed_run", "two_ranks", "drawn_by_two_ranks"):
        if name in wanted:
            request.getfixturevalue(name)


@pytest.fixture(scope="module")
def beside():
    """Does what is submitted to it beside the tests, one thing after the other."""
    with ThreadPoolExecutor(1) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


PIXELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def images(n, size=4, seed=0):
    """Random images (n, 3, size, size) on the grid of pixel values, float64."""
    g = torch.Generator().manual_seed(seed)
    return PIXELS[torch.randint(256, (n, 3, size, size), generator=g)]


def randn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def constant_model(*outputs):
    """A model that always returns these ε (and v), whatever it is shown."""
    return lambda x, time, y=None: torch.cat(outputs, dim=1)


def toy(x, time, y=None):
    """A model whose ε and v depend on x and on the time."""
    late = (time / 1000).to(x.dtype).view(-1, 1, 1, 1)
    return torch.cat([(0.3 + 0.6 * late) * x + 0.1 * late, (x + late).tanh()], dim=1)


def p_by_hand(alphas_bar, i, eps, v, x_t, clip=True):
    """p(x_{i-1} | x_i) from the paper's formulas -> mean, log of the learned variance, x0_hat."""
    a, before = alphas_bar[i], alphas_bar[i - 1] if i else 1.0
    alpha = a / before
    x0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
    x0 = x0.clamp(-1, 1) if clip else x0
    mean = math.sqrt(before) * (1 - alpha) / (1 - a) * x0
    mean = mean + math.sqrt(alpha) * (1 - before) / (1 - a) * x_t
    k = max(i, 1)  # at t = 0, β̃ is that of t = 1
    tilde = (1 - alphas_bar[k] / alphas_bar[k - 1]) * (1 - alphas_bar[k - 1]) / (1 - alphas_bar[k])
    log_variance = (v + 1) / 2 * math.log(1 - alpha) + (1 - v) / 2 * math.log(tilde)
    return mean, log_variance, x0


def term_by_hand(alphas_bar, i, eps, v, x0, x_t, clip=True):
    """L_i (N,) in bits per dimension, with torch's normal distribution."""
    mean, log_variance, _ = p_by_hand(alphas_bar, i, eps, v, x_t, clip)
    p = Normal(mean, (log_variance / 2).exp())
    if i > 0:
        a, before = alphas_bar[i], alphas_bar[i - 1]
        true_mean = math.sqrt(before) * (1 - a / before) / (1 - a) * x0
        true_mean = true_mean + math.sqrt(a / before) * (1 - before) / (1 - a) * x_t
        variance = (1 - a / before) * (1 - before) / (1 - a)
        nats = kl_divergence(Normal(true_mean, math.sqrt(variance)), p)
    else:
        edge = torch.full_like(x0, math.inf)
        upper = p.cdf(torch.where(x0 > 0.999, edge, x0 + 1 / 255))
        lower = p.cdf(torch.where(x0 < -0.999, -edge, x0 - 1 / 255))
        nats = -(upper - lower).log()
    return nats.flatten(1).mean(1) / LN2


def products(betas):
    """alphas_bar in plain Python."""
    found, product = [], 1.0
    for beta in betas.tolist():
        product *= 1 - beta
        found.append(product)
    return found


# ---- Schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [10, 100, 1000, 4000])
def test_linear_betas_are_ho_et_als_scaled_to_T(T):
    expected = [1000 / T * (1e-4 + (0.02 - 1e-4) * i / (T - 1)) for i in range(T)]
    np.testing.assert_allclose(linear_betas(T), np.minimum(expected, 0.999), rtol=1e-12)


@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_cosine_betas_follow_eq_17(T):
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T + 1)]
    np.testing.assert_allclose(cosine_betas(T), expected, rtol=1e-9)
    # The tables too, which a float32 schedule would miss by 1e-4 of a β: alphas_bar = f(t) / f(0).
    alphas_bar = Diffusion("cosine", T).alphas_bar
    np.testing.assert_allclose(alphas_bar[:-1], [f(t) / f(0) for t in range(1, T)], rtol=1e-9)
    assert alphas_bar[-1].item() == pytest.approx(0.001 * f(T - 1) / f(0), rel=1e-9)


def test_index_0_has_one_step_of_noise():
    diffusion = Diffusion("linear", 1000)
    assert diffusion.alphas_bar[0] == pytest.approx(1 - 1e-4, abs=1e-15)
    np.testing.assert_allclose(diffusion.alphas_bar, products(linear_betas(1000)), rtol=1e-12)


def test_skipped_steps_keep_both_ends_and_alphas_bar():
    whole, part = Diffusion("cosine", 1000), Diffusion("cosine", 1000, steps=7)
    steps = [0, 166, 333, 500, 666, 832, 999]  # round(i · 999 / 6), 499.5 to even
    assert part.num_steps == 7 and part.T == 1000 and part.times.tolist() == steps
    assert torch.equal(part.alphas_bar, whole.alphas_bar[steps])
    ratios = [1 - whole.alphas_bar[b] / whole.alphas_bar[a] for a, b in zip(steps, steps[1:])]
    np.testing.assert_allclose(part.betas[1:], ratios, rtol=1e-12)  # eq. 19
    assert torch.equal(part.betas[:1], whole.betas[:1])
    assert torch.equal(Diffusion("cosine", 1000, steps=steps[::-1]).betas, part.betas)
    assert torch.equal(Diffusion("cosine", 1000, steps=1000).betas, whole.betas)
    np.testing.assert_allclose(whole.betas, cosine_betas(1000), rtol=1e-9)


@pytest.mark.parametrize(
    "spacing, expected",
    [
        (1, [0, 25, 50, 74, 99]),  # 0, 24.75, 49.5 (to even), 74.25, 99
        (2, [0, 6, 25, 56, 99]),  # 99·(0, 1, 4, 9, 16)/16 = 0, 6.19, 24.75, 55.69, 99
        (3, [0, 2, 12, 42, 99]),  # 99·(0, 1, 8, 27, 64)/64 = 0, 1.55, 12.38, 41.77, 99
        (10, [0, 1, 2, 6, 99]),  # 99·(0, 1e-6, 0.001, 0.056, 1), but no timestep twice
    ],
)
def test_spacing_lays_the_steps_by_a_power(spacing, expected):
    found = Diffusion("linear", 100, steps=5, spacing=spacing, time_scale=1).times
    assert found.tolist() == expected


def test_all_steps_and_one_step_are_laid_too():
    assert Diffusion("linear", 9, steps=9, spacing=10, time_scale=1).times.tolist() == [*range(9)]
    assert Diffusion("linear", 9, steps=1, time_scale=1).times.tolist() == [8]
    assert Diffusion("linear", 9, steps=2, spacing=3, time_scale=1).times.tolist() == [0, 8]


def test_min_alpha_bar_begins_at_the_last_timestep_with_so_much_signal():
    # cosine: alphas_bar of index t is cos²(((t+1)/T + s)/(1+s)·π/2) / cos²(s/(1+s)·π/2), here
    # 1.026e-4 at 3973 and 0.949e-4 at 3974. linear: 1.001e-4 at 953 and 0.982e-4 at 954.
    for schedule, T, last in (("cosine", 4000, 3973), ("linear", 1000, 953)):
        whole = Diffusion(schedule, T, min_alpha_bar=1e-4, time_scale=1)
        assert whole.times.tolist() == list(range(last + 1))
        few = Diffusion(schedule, T, steps=5, min_alpha_bar=1e-4, time_scale=1)
        assert few.times.tolist() == [round(i * last / 4) for i in range(5)]
        # More steps than are left: all that are left.
        most = Diffusion(schedule, T, steps=T, min_alpha_bar=1e-4, time_scale=1)
        assert torch.equal(most.times, whole.times)
        both_ends = Diffusion(schedule, T, steps=5, time_scale=1)  # the default of bits/dim
        assert both_ends.times[[0, -1]].tolist() == [0, T - 1]
    halves = torch.tensor([0.5, 0.5, 0.5])  # alphas_bar is 1/2, 1/4, 1/8
    for least, steps in ((0.125, 3), (0.13, 2), (0.25, 2), (0.5, 1), (0.9, 1)):
        assert Diffusion(halves, min_alpha_bar=least).num_steps == steps
    assert Diffusion(halves, steps=1, min_alpha_bar=0.2, time_scale=1).times.tolist() == [1]


def test_steps_may_be_a_number_of_numpys():
    assert Diffusion("linear", 100, steps=np.int64(5)).num_steps == 5
    with pytest.raises(ValueError, match="steps must be 1 … 100"):
        Diffusion("linear", 100, steps=np.int64(101))


def test_any_betas_make_a_process():
    sigmoid = torch.linspace(-6, 6, 50).sigmoid() * 0.02
    diffusion = Diffusion(sigmoid)
    assert diffusion.T == 50
    np.testing.assert_allclose(diffusion.alphas_bar, products(sigmoid.double()), rtol=1e-12)
    assert diffusion.times[-1] == 49 * 1000 / 50
    assert Diffusion([0.1, 0.2]).alphas_bar.tolist() == pytest.approx([0.9, 0.72])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(schedule="none such"), "must be in .*'linear'"), (dict(T=1), "T=1 at least 2"),
        (dict(variance="fixed"), "variance must be"), (dict(steps=0), "steps must be 1 … 4000"),
        (dict(steps=4001), "steps must be 1 … 4000"), (dict(steps=[]), "a list of 0 … 3999"),
        (dict(steps=[-1, 5]), "a list of 0 … 3999"), (dict(spacing=0.9), "spacing must be"),
        (dict(steps=[4000]), "a list of 0 … 3999"), (dict(spacing=10.5), "spacing must be"),
        (dict(schedule=[0.5, 1.5]), "betas"), (dict(schedule=[0.0, 0.5]), "betas"),
        (dict(schedule=[0.5, 1.0]), "betas"), (dict(schedule=[0.5, math.nan]), "betas"),
    ],
)  # fmt: skip
def test_impossible_processes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**arguments)


def test_the_tables_move_together_and_are_float32_where_there_is_no_float64(monkeypatch):
    tables = [n for n, v in vars(Diffusion(T=20)).items() if torch.is_tensor(v)]
    moved = Diffusion(T=20).to("meta")
    assert len(tables) > 10 and {str(vars(moved)[n].device) for n in tables} == {"meta"}
    assert moved.betas.dtype == torch.float64
    # This torch may know no MPS: what would go there is looked at.
    went, mps = [], Diffusion(T=20)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: went.append((self.dtype, device)))
    mps.to("mps")
    assert went == [(torch.float32, "mps")] * len(tables)


# ---- q -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 10])
def test_add_noise_equals_noising_step_by_step(steps):
    diffusion = Diffusion("cosine", 100, steps=steps)
    mean, variance = 0.7, 0.0
    for t, beta in enumerate(diffusion.betas.tolist()):  # x_t = sqrt(1-β) x_{t-1} + sqrt(β) ε
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        x0, at = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), torch.tensor([t])
        assert diffusion.add_noise(x0, at, 0 * x0).item() == pytest.approx(mean, rel=1e-9)
        assert diffusion.add_noise(0 * x0, at, 0 * x0 + 1).item() ** 2 == pytest.approx(variance)


@pytest.mark.parametrize("steps, t", [(None, 1), (None, 60), (None, 98), (12, 1), (12, 7)])
def test_posterior_is_bayes_rule(steps, t):
    diffusion = Diffusion("linear", 100, steps=steps)
    x0, x_t = 0.4, -0.3
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    alpha, before = 1 - diffusion.betas[t], diffusion.alphas_bar[t - 1]
    log_p = Normal(before.sqrt() * x0, (1 - before).sqrt()).log_prob(grid)  # q(x_{t-1} | x0)
    log_p = log_p + Normal(alpha.sqrt() * grid, (1 - alpha).sqrt()).log_prob(0 * grid + x_t)
    p = (log_p - log_p.max()).exp()
    p /= p.sum()
    mean = (p * grid).sum()
    variance = (p * (grid - mean) ** 2).sum()
    at = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    found, log_variance = diffusion.posterior(x0 * at, x_t * at, torch.tensor([t]))
    assert found.item() == pytest.approx(mean.item(), abs=1e-8)
    assert log_variance.exp().item() == pytest.approx(variance.item(), rel=1e-6)


def test_posterior_at_0_is_x0_with_a_finite_log_variance():
    diffusion, x0 = Diffusion("cosine", 1000), images(1)
    mean, log_variance = diffusion.posterior(x0, randn(1, 3, 4, 4), torch.tensor([0]))
    assert torch.allclose(mean, x0, atol=1e-12)
    next_one = diffusion.posterior(x0, x0, torch.tensor([1]))[1]
    assert torch.equal(log_variance, next_one) and log_variance.isfinite().all()
    assert log_variance.shape == mean.shape == x0.shape
    alone = Diffusion("linear", 10, steps=1).posterior(x0, x0, torch.tensor([0]))[1]
    assert alone.isfinite().all()  # there is no t = 1


def test_results_have_the_precision_of_the_images():
    diffusion, x, t = Diffusion("cosine", 50), images(2).float(), torch.tensor([3, 0])
    eps, v = x * 0.1, x * 0.2
    found = [diffusion.add_noise(x, t, x), *diffusion.posterior(x, x, t), diffusion.prior(x)]
    found += [*diffusion.reverse(eps, v, x, t), *diffusion.losses(toy, x, t)]
    found += diffusion.bits_per_dim(toy, x)
    assert {f.dtype for f in found} == {torch.float32}
    eps, v = diffusion.predict(lambda x, time, y: toy(x, time).bfloat16(), x, t)
    assert eps.dtype == v.dtype == torch.float32  # an autocast network's outputs are widened


# ---- Gaussians ---------------------------------------------------------------------------------


def test_normal_kl_is_that_of_torch():
    m1, v1, m2, v2 = randn(4, 1000)
    expected = kl_divergence(Normal(m1, (v1 / 2).exp()), Normal(m2, (v2 / 2).exp()))
    np.testing.assert_allclose(normal_kl(m1, v1, m2, v2), expected, rtol=1e-9, atol=1e-12)
    # Nearly equal variances: KL = δ²/4 to first order, which exp(δ) - δ - 1 loses in float32.
    zero, delta = torch.zeros(()), torch.tensor(1e-3)
    assert normal_kl(zero, delta, zero, zero).item() == pytest.approx(2.5e-7, rel=1e-2)


@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.1, 0.99, 1.2])
@pytest.mark.parametrize("std", [1e-3, 0.02, 0.5, 3.0])
def test_decoder_is_the_gaussian_summed_over_256_bins(mean, std):
    at = torch.full_like(PIXELS, 1.0)
    log_p = decoder_log_likelihood(PIXELS, mean * at, 2 * math.log(std) * at)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    normal = Normal(torch.tensor(mean, dtype=torch.float64), std)
    upper = torch.where(PIXELS == 1, 1, normal.cdf(PIXELS + 1 / 255))
    lower = torch.where(PIXELS == -1, 0, normal.cdf(PIXELS - 1 / 255))
    np.testing.assert_allclose(log_p.exp(), upper - lower, rtol=1e-6, atol=1e-13)


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
    found = decoder_log_likelihood(
        x0.to(dtype), (mean * at).to(dtype), (2 * math.log(std) * at).to(dtype)
    )
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_decoder_has_a_finite_gradient_far_from_the_pixel():
    x0 = PIXELS.float()
    mean = torch.zeros(256, requires_grad=True)
    log_p = decoder_log_likelihood(x0, mean, torch.full((256,), -14.0))
    log_p.sum().backward()
    assert log_p.isfinite().all() and mean.grad.isfinite().all()
    assert (mean.grad.sign()[:120] == -1).all() and (mean.grad.sign()[-120:] == 1).all()
    # So wide that both edges of a bin have the same float32 probability.
    wide = torch.full((256,), 30.0, requires_grad=True)
    log_p = decoder_log_likelihood(x0, mean, wide)
    log_p.sum().backward()
    assert log_p.isfinite().all() and wide.grad.isfinite().all()


def test_prior_is_the_kl_to_the_standard_normal():
    diffusion, x0 = Diffusion("linear", 1000, steps=20), images(3)
    last = diffusion.alphas_bar[-1]
    kl = kl_divergence(Normal(last.sqrt() * x0, (1 - last).sqrt()), Normal(0 * x0, 1))
    np.testing.assert_allclose(diffusion.prior(x0), kl.flatten(1).mean(1) / LN2, rtol=1e-9)
    assert bits(torch.tensor([[[LN2, 2 * LN2], [0.0, LN2]]])).tolist() == pytest.approx([1.0])


# ---- p -----------------------------------------------------------------------------------------


def test_x0_hat_inverts_add_noise():
    diffusion, x0, noise = Diffusion("cosine", 1000), images(5), randn(5, 3, 4, 4)
    t = torch.tensor([0, 1, 300, 700, 950])
    x_t = diffusion.add_noise(x0, t, noise)
    mean, _, x0_hat = diffusion.reverse(noise, 0 * noise, x_t, t)
    assert torch.allclose(x0_hat, x0, atol=1e-9)
    assert torch.allclose(mean, diffusion.posterior(x0, x_t, t)[0], atol=1e-9)


def test_the_mean_without_clipping_is_eq_13():
    diffusion, x_t, eps = Diffusion("linear", 100), randn(3, 3, 4, 4), randn(3, 3, 4, 4, seed=1)
    t = torch.tensor([0, 17, 99])
    mean = diffusion.reverse(eps, eps, x_t, t, clip=False)[0]
    betas, alphas_bar = linear_betas(100), products(linear_betas(100))
    for k, i in enumerate(t.tolist()):
        beta = betas[i].item()
        expected = x_t[k] - beta / math.sqrt(1 - alphas_bar[i]) * eps[k]
        assert torch.allclose(mean[k], expected / math.sqrt(1 - beta), atol=1e-9)


def test_x0_hat_is_clipped_before_the_mean_is_formed():
    diffusion, x_t, t = Diffusion("cosine", 100), randn(2, 3, 4, 4), torch.tensor([40, 90])
    for far in (-50, 50):
        eps = far + 0 * x_t
        mean, _, x0_hat = diffusion.reverse(eps, x_t, x_t, t)
        assert (x0_hat == (1 if far < 0 else -1)).all()
        assert torch.equal(mean, diffusion.posterior(x0_hat, x_t, t)[0])
        assert diffusion.reverse(eps, x_t, x_t, t, clip=False)[2].abs().min() > 1


def test_learned_variance_lies_between_small_and_large():
    t, x_t = torch.tensor([0, 1, 30]), randn(3, 3, 4, 4)
    learned, small, large = (Diffusion("linear", 100, v) for v in ("learned", "small", "large"))
    beta, alphas_bar = linear_betas(100)[t], (1 - linear_betas(100)).cumprod(0)
    k = t.clamp(min=1)  # at t = 0, where β̃ is 0, that of t = 1
    tilde = linear_betas(100)[k] * (1 - alphas_bar[k - 1]) / (1 - alphas_bar[k])
    for v, log in (
        (-1, tilde.log()),
        (1, beta.log()),
        (0.5, 0.75 * beta.log() + 0.25 * tilde.log()),
    ):
        found = learned.reverse(x_t, v + 0 * x_t, x_t, t)[1]
        assert found.shape == x_t.shape
        np.testing.assert_allclose(found[:, 0, 0, 0], log, rtol=1e-7)  # eq. 15
    for v in (None, 0.3 + 0 * x_t):  # these need no v, and ignore one
        np.testing.assert_allclose(small.reverse(x_t, v, x_t, t)[1][:, 1, 2, 3], tilde.log(), 1e-7)
        found = large.reverse(x_t, v, x_t, t)[1]
        # As does the released code, large takes β̃ of t = 1 at t = 0.
        expected = torch.cat([tilde[:1], beta[1:]]).log()
        assert found.shape == x_t.shape
        np.testing.assert_allclose(found[:, 1, 2, 3], expected, rtol=1e-7)


def test_the_network_sees_the_original_time_times_1000_over_T():
    seen = []

    def model(x, time, y):
        seen.append(time)
        return torch.cat([x, x], dim=1)

    x, t = randn(2, 3, 4, 4), torch.tensor([1, 4])
    Diffusion("cosine", 4000).predict(model, x, t)
    Diffusion("cosine", 4000, steps=5).predict(model, x, t)  # 0, 1000, 2000, 2999, 3999
    Diffusion("cosine", 4000, steps=5, time_scale=1).predict(model, x, t)
    Diffusion("cosine", 4000, time_scale=0.5).predict(model, x, t)
    expected = [[0.25, 1], [250, 999.75], [1000, 3999], [0.5, 2]]
    assert [time.tolist() for time in seen] == expected
    assert seen[0].dtype == torch.float32


def test_predict_splits_eps_and_v():
    x, t = randn(2, 3, 4, 4), torch.tensor([3, 0])
    one, two = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    for variance in ("learned", "small", "large"):
        eps, v = Diffusion(variance=variance).predict(constant_model(one, two), x, t)
        assert torch.equal(eps, one) and torch.equal(v, two)
    eps, v = Diffusion(variance="small").predict(constant_model(one), x, t)
    assert torch.equal(eps, one) and v is None


def test_a_network_with_the_wrong_channels_is_refused():
    x, t = randn(1, 3, 4, 4), torch.tensor([3])
    for variance, channels in (("learned", 3), ("learned", 9), ("small", 4), ("large", 5)):
        with pytest.raises(ValueError, match=f"returned {channels} channels"):
            Diffusion(variance=variance).predict(
                lambda x, t, y: x.new_zeros(1, channels, 4, 4), x, t
            )


# ---- Likelihood and losses ---------------------------------------------------------------------


@pytest.mark.parametrize("schedule, steps", [("linear", None), ("cosine", 9)])
def test_vlb_terms_are_kls_and_a_negative_log_likelihood_in_bits(schedule, steps):
    diffusion, x0, noise = Diffusion(schedule, 50, steps=steps), images(3), randn(3, 3, 4, 4)
    alphas_bar = diffusion.alphas_bar.tolist()
    t, eps, v = torch.tensor([0, 1, 7]), 0.95 * noise, randn(3, 3, 4, 4, seed=1).tanh()
    x_t = diffusion.add_noise(x0, t, noise)
    mean, log_variance, _ = diffusion.reverse(eps, v, x_t, t)
    found = diffusion.vlb_term(x0, x_t, t, mean, log_variance)
    assert found.shape == (3,) and found[0] > 0
    for k, i in enumerate(t.tolist()):
        one = slice(k, k + 1)
        expected = term_by_hand(alphas_bar, i, eps[one], v[one], x0[one], x_t[one])
        np.testing.assert_allclose(found[one], expected, rtol=1e-6)


@pytest.mark.parametrize("T, steps", [(50, None), (4000, None), (4000, 10)])
def test_hybrid_is_simple_plus_a_thousandth_of_T_times_the_term(T, steps):
    diffusion, x0, noise = Diffusion("cosine", T, steps=steps), images(2), randn(2, 3, 4, 4)
    alphas_bar, t, eps, v = diffusion.alphas_bar.tolist(), [0, 7], 0.5 * noise, 0.3 * noise
    x_t = diffusion.add_noise(x0, torch.tensor(t), noise)
    one = slice(0, 1), slice(1, 2)
    vlb = (steps or T) * torch.cat(
        [term_by_hand(alphas_bar, i, eps[k], v[k], x0[k], x_t[k], False) for i, k in zip(t, one)]
    )
    simple = (0.25 * noise**2).flatten(1).mean(1)
    expected = {"simple": simple, "vlb": vlb, "hybrid": simple + 0.001 * vlb}
    for objective, loss in expected.items():
        model = constant_model(eps, v)
        found, bound = diffusion.losses(model, x0, torch.tensor(t), None, noise, objective)
        np.testing.assert_allclose(found, loss, rtol=1e-6)
        np.testing.assert_allclose(bound, vlb, rtol=1e-6)  # whatever the objective


def test_the_simple_loss_needs_no_v():
    x0, noise, t = images(2), randn(2, 3, 4, 4), torch.tensor([5, 9])
    for variance in ("small", "large"):
        diffusion = Diffusion("linear", 20, variance)
        loss, vlb = diffusion.losses(constant_model(0 * noise), x0, t, None, noise, "simple")
        np.testing.assert_allclose(loss, noise.square().flatten(1).mean(1), rtol=1e-9)
        assert vlb.isfinite().all() and (vlb > 0).all()


def test_hybrid_teaches_eps_by_simple_alone_and_v_by_the_bound_alone():
    diffusion, x0, noise = Diffusion("cosine", 100), images(3), randn(3, 3, 4, 4)
    t = torch.tensor([0, 20, 60])
    gradients = {}
    for objective in ("simple", "hybrid", "vlb"):
        eps, v = (0.5 * noise).requires_grad_(), (0.1 * noise).requires_grad_()
        loss, vlb = diffusion.losses(constant_model(eps, v), x0, t, None, noise, objective)
        assert not vlb.requires_grad
        loss.sum().backward()
        gradients[objective] = eps.grad, v.grad
    eps, v = gradients["hybrid"]
    simple = (0.5 * noise - noise) * 2 / noise[0].numel()  # d/dε of the mean of (ε - noise)²
    assert torch.allclose(gradients["simple"][0], simple, rtol=1e-12)
    assert torch.allclose(eps, simple, rtol=1e-12) and eps.abs().min() > 0
    assert torch.allclose(v, 0.001 * gradients["vlb"][1], rtol=1e-9) and v.abs().min() > 0
    assert gradients["simple"][1] is None or (gradients["simple"][1] == 0).all()
    assert gradients["vlb"][0].abs().min() > 0


def test_the_loss_does_not_clip_x0():
    diffusion, x0, noise = Diffusion("cosine", 100), images(1), randn(1, 3, 4, 4)
    t, eps = torch.tensor([50]), (noise - 5).requires_grad_()  # x0_hat is far above 1
    loss, _ = diffusion.losses(constant_model(eps, 0 * noise), x0, t, None, noise, "vlb")
    loss.sum().backward()
    assert eps.grad.abs().min() > 0


def test_losses_draw_their_own_noise():
    seen = []

    def model(x, time, y):
        seen.append(x)
        return torch.cat([0 * x, 0 * x], dim=1)

    torch.manual_seed(0)
    diffusion, x0, t = Diffusion("cosine", 100), torch.full((1, 3, 64, 64), 0.5), torch.tensor([40])
    loss, _ = diffusion.losses(model, x0, t, objective="simple")
    a = diffusion.alphas_bar[40].item()
    noise = (seen[0] - math.sqrt(a) * 0.5) / math.sqrt(1 - a)
    n = noise.numel()
    assert abs(noise.mean()) < 4.5 / n**0.5 and abs(noise.var() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4.5 * (96 / n) ** 0.5  # it is normal
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)


def test_hybrid_needs_a_learned_variance():
    with pytest.raises(ValueError, match="hybrid needs variance learned"):
        Diffusion(variance="small").losses(None, images(1), torch.tensor([0]))


def test_wrong_arguments_of_the_process_are_refused():
    diffusion, x0 = Diffusion(), images(1)
    for message, wrong in (
        ("objective must be", lambda: diffusion.losses(None, x0, torch.tensor([0]), objective="l")),
        ("every term", lambda: Diffusion(T=2).pilot(None, x0)),
        ("method='none'", lambda: next(diffusion.trajectory(None, x0, method="none"))),
        ("eta=2.0", lambda: next(diffusion.trajectory(None, x0, eta=2.0))),
        ("eta=-0.1", lambda: next(diffusion.trajectory(None, x0, eta=-0.1))),
        ("order=3", lambda: next(diffusion.trajectory(None, x0, order=3))),
        ("order=0", lambda: next(diffusion.trajectory(None, x0, order=0))),
        ("order='2'", lambda: diffusion.sample(None, x0, order="2")),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_every_term_of_the_bound_is_measured_with_x0_hat_clipped():
    seen = []

    def model(x, time, y):  # x0_hat is far outside [-1, 1] at large t
        seen.append((x, time, y))
        return 3 * toy(x, time)

    diffusion, x0, y = Diffusion("linear", 300, steps=6), images(2), torch.tensor([4, 2])
    torch.manual_seed(0)
    terms, prior = diffusion.bits_per_dim(model, x0, y)
    assert terms.shape == (2, 6) and torch.equal(prior, diffusion.prior(x0))
    assert [time.tolist() for _, time, _ in seen] == [[k, k] for k in diffusion.times.tolist()]
    for i, (x_t, time, label) in enumerate(seen):
        assert torch.equal(label, y)
        eps, v = (3 * toy(x_t, time)).chunk(2, dim=1)
        expected = term_by_hand(diffusion.alphas_bar.tolist(), i, eps, v, x0, x_t)
        np.testing.assert_allclose(terms[:, i], expected, rtol=1e-6)
    a_bar = diffusion.alphas_bar
    noises = [(x - a.sqrt() * x0) / (1 - a).sqrt() for (x, _, _), a in zip(seen, a_bar)]
    assert abs(torch.stack(noises).mean()) < 0.2 and abs(torch.stack(noises).std() - 1) < 0.15
    assert not torch.allclose(noises[0], noises[1])


def gaussian_data(diffusion, spread=0.08):
    """Data N(mean, covariance) in 4 dimensions, (N, 1, 2, 2), and the best model of it: ε exact,
    v so that the variance of p is the true one of x_{t-1} given x_t, averaged over dimensions."""
    root, eye = randn(4, 4, seed=5) * spread, torch.eye(4, dtype=torch.float64)
    covariance = root @ root.T + 0.01 * eye
    mean = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)

    def parts(t):
        """E[x0 | x_t] = mean + gain (x_t - sqrt(ᾱ) mean), with this gain."""
        a = diffusion.alphas_bar[t]
        return a, a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * eye)

    def model(x, time, y):
        t = (diffusion.times - time[0]).abs().argmin()
        a, gain = parts(t)
        x0 = mean + (x.flatten(1) - a.sqrt() * mean) @ gain.T
        eps = (x - a.sqrt() * x0.view_as(x)) / (1 - a).sqrt()
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    return mean, covariance, parts, model


def give_noise(monkeypatch, noises):
    """Have Diffusion take these noises in turn, for all images at once, rather than draw its own.
    -> an iterator of those that it has not taken."""
    left = iter(noises)

    def randn_like(x):
        noise = next(left)
        assert noise.shape == x.shape and noise.dtype == x.dtype
        return noise

    monkeypatch.setattr(torch, "randn_like", randn_like)
    return left


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [None, 50])
def test_the_bound_on_gaussian_data_is_the_exact_sum_of_kls(schedule, steps, monkeypatch):
    diffusion = Diffusion(schedule, 400, "learned", steps)
    mean, covariance, parts, model = gaussian_data(diffusion)
    exact = []
    for t in range(1, diffusion.num_steps):
        # p's variance is β̃ (v = -1), so KL = (c |x0 - E[x0 | x_t]|)² / 2β̃: its mean has the trace
        # of x0's covariance given x_t.
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
    give_noise(monkeypatch, [one[:, 4:].view(8, 1, 2, 2)] * diffusion.num_steps)
    terms, _ = diffusion.bits_per_dim(model, x0.view(8, 1, 2, 2))
    np.testing.assert_allclose(terms[:, 1:].sum(0), exact, rtol=1e-9)


def test_few_calls_estimate_the_bound_without_bias_and_two_estimates_tell_their_error():
    # 16 images; the batch has each ten times, so that a call makes ten estimates of their mean.
    diffusion, N, calls, repeats = Diffusion("linear", 200), 16, 4, 200
    level = torch.linspace(0.5, 1.5, N, dtype=torch.float64).view(-1, 1, 1, 1)
    x0, level = images(N).repeat(10, 1, 1, 1), level.repeat(10, 1, 1, 1)

    def model(x, time, y):  # wrong in a way that depends on t and on the image
        return torch.cat([0.3 * x * level + (time / 1000).view(-1, 1, 1, 1), 0 * x], dim=1)

    torch.manual_seed(0)
    terms, prior = diffusion.bits_per_dim(model, x0)
    exact = terms.sum(1) + prior
    p = diffusion.pilot(model, x0)
    assert p[0] == 0 and p.sum().item() == pytest.approx(1) and p[1:].min() > 0
    seen, totals = torch.zeros(200), torch.empty(repeats // 10, 2, 10 * N, dtype=torch.float64)
    for both in totals:
        for total in both:
            total[:], terms, prior = diffusion.estimate_bits_per_dim(model, x0, p, calls)
            drawn = ~terms.isnan()
            assert drawn[:, 0].all() and (drawn.sum(1) <= 1 + calls).all()
            weights = torch.cat([torch.ones(1), 1 / (calls * p[1:])])
            again = (terms * weights).nansum(1) + prior
            whole = drawn.sum(1) == 1 + calls  # no t was drawn twice
            np.testing.assert_allclose(again[whole], total[whole], rtol=1e-6)
            seen += drawn.sum(0)
    # The draws follow p: 400 × 16 × 4 of them.
    expected = 2 * repeats * N * calls * p[1:]
    assert (abs(seen[1:] - expected) < 5 * expected.sqrt() + 5).all()
    totals = totals.unflatten(2, (10, N)).transpose(1, 2).flatten(0, 1)  # (repeats, 2, N)
    means = totals.mean((1, 2))
    assert abs(means.mean() - exact.mean()) < 4 * means.std() / repeats**0.5 + 0.001 * exact.mean()
    errors = ((totals[:, 0] - totals[:, 1]) / 2).norm(dim=1) / N
    inside = (abs(means - exact.mean()) < 1.96 * errors).double().mean()
    assert 0.86 < inside < 0.99 and 0.85 < errors.square().mean().sqrt() / means.std() < 1.15


def test_each_part_of_the_mass_is_drawn_once():
    # With T - 1 calls and equal masses, every t ≥ 1 is drawn exactly once by every image: then the
    # estimate is the sum. What p says of t = 0, and its sum, do not matter.
    diffusion, x0 = Diffusion("linear", 24), images(6)
    for first, level in ((0.0, 1.0), (0.7, 0.1)):
        p = torch.full((24,), level, dtype=torch.float64)
        p[0] = first
        total, terms, prior = diffusion.estimate_bits_per_dim(toy, x0, p, 23)
        assert not terms.isnan().any() and torch.equal(prior, diffusion.prior(x0))
        np.testing.assert_allclose(total, terms.sum(1) + prior, rtol=1e-9)
    # Unequal masses: of 4 calls, t = 1 with half of the mass takes 2, t = 2 … 3 one each.
    p = torch.tensor([0.0, 0.5, 0.25, 0.25], dtype=torch.float64)
    total, terms, prior = Diffusion("linear", 4).estimate_bits_per_dim(toy, x0, p, 4)
    assert not terms.isnan().any()


def test_the_estimates_calls_are_given_t_and_the_label():
    seen = []

    def model(x, time, y):
        seen.append((time, y))
        return toy(x, time)

    diffusion, x0, y = Diffusion("linear", 50), images(8), torch.arange(8)
    p = torch.linspace(0, 1, 50).double()
    total, terms, _ = diffusion.estimate_bits_per_dim(model, x0, p, 3, y)
    assert len(seen) == 4 and all(torch.equal(label, y) for _, label in seen)
    assert (seen[0][0] == 0).all()
    for time, _ in seen:  # where a call was made, there is a term
        t = (time / 20).long()
        assert not terms.gather(1, t[:, None]).isnan().any()
    assert terms.isnan().sum() >= 8 * 46


def test_the_pilot_measures_the_root_mean_square_of_each_term():
    # The model knows the noise, and errs by a known amount: so the terms are not random. At small t
    # few images have a large error, at large t all have, so that the root of the mean square is
    # not the mean. With T = 17, every t is one of the 32 points; with 300, most lie between them.
    k, x0 = torch.arange(64.0).double().view(-1, 1, 1, 1), images(64, size=2)
    for T, tolerance in ((17, 1e-6), (300, 0.06)):
        diffusion = Diffusion("linear", T)
        alphas_bar = diffusion.alphas_bar.tolist()

        def error(i):
            return torch.exp(-k * (1 - i / T)).expand_as(x0)

        def model(x, time, y):
            i = round(time[0].item() * T / 1000)
            eps = (x - math.sqrt(alphas_bar[i]) * x0) / math.sqrt(1 - alphas_bar[i])
            return torch.cat([eps + error(i), 0 * x], dim=1)

        rms = []
        for i in range(1, T):
            noise = randn(64, 3, 2, 2, seed=i)
            x_t = math.sqrt(alphas_bar[i]) * x0 + math.sqrt(1 - alphas_bar[i]) * noise
            L = term_by_hand(alphas_bar, i, noise + error(i), 0 * noise, x0, x_t)
            rms.append(L.square().mean().sqrt())
        rms = torch.stack(rms)
        p = diffusion.pilot(model, x0)
        expected = 0.98 * rms / rms.sum() + 0.02 / (T - 1)
        np.testing.assert_allclose(p[1:], expected, rtol=tolerance)
        assert p[0] == 0 and p.dtype == torch.float64


def test_the_pilot_measures_both_ends():
    seen = set()

    def model(x, time, y):
        seen.add(round(time[0].item()))
        return toy(x, time)

    Diffusion("linear", 1000).pilot(model, images(2))
    assert {1, 999} <= seen and len(seen) == 32 and 0 not in seen


# ---- Samplers ----------------------------------------------------------------------------------


def half_log_snr(a):
    """λ of Lu et al. 2022."""
    return 0.5 * math.log(a / (1 - a)) if a < 1 else math.inf


def exact_samples(diffusion, mean, covariance, parts, method, eta, order):
    """Mean and covariance of what a sampler makes of gaussian_data's model: each step is linear in
    x_t and in the x0_hat of the step before."""
    eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    m, C = torch.zeros(8, dtype=torch.float64), torch.block_diag(eye, zero)
    a_bar = [*diffusion.alphas_bar.tolist()]
    for t in reversed(range(diffusion.num_steps)):
        a, gain = parts(t)
        before = diffusion.alphas_bar[t - 1] if t else torch.tensor(1.0).double()
        beta = 1 - a / before
        variance = beta * (1 - before) / (1 - a) * (1 if method == "ancestral" else eta**2)
        # x_{t-1} = of_x0 (x0_hat + c (x0_hat - the last x0_hat)) + of_x x_t + noise
        if method == "ancestral":
            of_x0 = before.sqrt() * beta / (1 - a)
            of_x = (1 - before) * (a / before).sqrt() / (1 - a)
        else:
            of_x = ((1 - before - variance) / (1 - a)).sqrt()
            of_x0 = before.sqrt() - of_x * a.sqrt()
        c = 0.0
        if order == 2 and 0 < t < diffusion.num_steps - 1:
            last, now, then = (half_log_snr(a_bar[k]) for k in (t + 1, t, t - 1))
            c = (then - now) / (2 * (now - last))  # 1/(2r), r the last width over this one
        # x0_hat = mean + gain (x_t - √a mean)
        shift = mean - a.sqrt() * gain @ mean
        top = torch.cat([of_x0 * (1 + c) * gain + of_x * eye, -of_x0 * c * eye], dim=1)
        step = torch.cat([top, torch.cat([gain, zero], dim=1)])
        m = step @ m + torch.cat([of_x0 * (1 + c) * shift, shift])
        C = step @ C @ step.T + torch.block_diag(variance * eye, zero)
    return m[:4], C[:4, :4]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "steps, method, eta, order",
    [(None, "ancestral", 0, 1), (50, "ancestral", 0, 1), (400, "ddim", 0, 1), (50, "ddim", 1, 1),
     (50, "ddim", 0.5, 1), (20, "ancestral", 0, 2), (20, "ddim", 1, 2), (20, "ddim", 0, 2)],
)  # fmt: skip
def test_samples_of_gaussian_data_have_its_mean_and_covariance(
    schedule, steps, method, eta, order, monkeypatch
):
    # Order 2 begins where λ is no longer huge, as the scripts do.
    begin = 1e-3 if order == 2 else 0.0
    diffusion = Diffusion(schedule, 400, "small", steps, min_alpha_bar=begin)
    mean, covariance, parts, model = gaussian_data(diffusion)
    exact_mean, exact = exact_samples(diffusion, mean, covariance, parts, method, eta, order)
    scale = covariance.diagonal().sqrt()
    if diffusion.num_steps == 400:  # then they are nearly the data's
        assert (abs(exact_mean - mean) < 0.015 * scale).all()
        assert (abs(exact - covariance) < 0.12 * scale.outer(scale)).all()
    # A sample is linear in the numbers of its noise, x_T's and then each step's. The first sample
    # here has none: it is the mean. Each other has a 1 in one place: it differs from the mean by a
    # column of a root of the covariance.
    noisy = method == "ancestral" or eta > 0
    n = 4 * (diffusion.num_steps if noisy else 1)  # the last step adds no noise
    one = torch.eye(n, dtype=torch.float64)
    noises = torch.cat([0 * one[:1], one]).view(n + 1, -1, 1, 2, 2).transpose(0, 1).contiguous()
    left = give_noise(monkeypatch, noises[1:])
    *_, (_, x, _) = diffusion.trajectory(model, noises[0], None, method, eta, order, clip=False)
    assert not list(left)
    root = (x[1:] - x[0]).flatten(1)
    np.testing.assert_allclose(x[0].flatten(), exact_mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(root.T @ root, exact, rtol=1e-9, atol=1e-12)


def even_in_lambda(T, calls):
    """Timesteps of the linear schedule whose λ are spread evenly over -2.5 … 2."""
    lambdas = np.array([half_log_snr(a) for a in products(linear_betas(T))])
    return [int(abs(lambdas - want).argmin()) for want in np.linspace(2, -2.5, calls)]


def test_order_2_follows_the_probability_flow_with_the_square_of_the_step():
    # The flow keeps x_t's distribution: along each axis of the covariance, (x_t - √ᾱ mean) grows
    # as the standard deviation √(ᾱ s² + 1 - ᾱ). It is compared at the first timestep: the step
    # from there to t = 0 goes to λ = ∞.
    errors = {}
    for calls in (21, 41, 81):
        diffusion = Diffusion("linear", 20_000, "small", steps=even_in_lambda(20_000, calls))
        assert diffusion.num_steps == calls
        mean, covariance, _, model = gaussian_data(diffusion, spread=0.4)
        s2, axes = torch.linalg.eigh(covariance)
        first, last = diffusion.alphas_bar[0], diffusion.alphas_bar[-1]
        x = randn(20, 4, seed=3)
        growth = ((first * s2 + 1 - first) / (last * s2 + 1 - last)).sqrt()
        flow = (x - last.sqrt() * mean) @ axes * growth @ axes.T + first.sqrt() * mean
        for order in (1, 2):
            steps = diffusion.trajectory(
                model, x.view(20, 1, 2, 2), None, "ddim", 0.0, order, clip=False
            )
            found = {i: x for i, x, _ in steps}[1]  # the x of t = 0's timestep
            errors[order, calls] = (found.flatten(1) - flow).norm().item()
    for calls in (21, 41, 81):
        assert errors[2, calls] < errors[1, calls] / 20
    for order, factor in ((1, 2), (2, 4)):  # half the step
        assert errors[order, 21] / errors[order, 41] == pytest.approx(factor, rel=0.15)
        assert errors[order, 41] / errors[order, 81] == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("method", ["ddim", "ancestral"])
@pytest.mark.parametrize("variance", ["learned", "small", "large"])
@pytest.mark.parametrize("clip", [True, False])
def test_each_step_is_that_of_the_papers(method, order, variance, clip):
    # Order 1 of ancestral is p itself. The rest is DPM-Solver++ of Lu et al. 2022 and its SDE
    # variant, which at order 1 are DDIM and the ancestral step: with α = √ᾱ, σ = √(1-ᾱ) and the
    # step h in λ = log(α/σ), from s to the next timestep,
    #     x_next = σ_next/σ_s x_s - α_next (e^-h - 1) D                                   (ODE)
    #     x_next = σ_next/σ_s e^-h x_s + α_next (1 - e^-2h) D + σ_next √(1 - e^-2h) z     (SDE)
    # D is x0_hat, or at order 2 (1 + 1/2r) x0_hat - 1/2r of the last x0_hat.
    diffusion = Diffusion("linear", 1000, variance, steps=[3, 80, 150, 400, 430, 600])
    alphas_bar, x, last = diffusion.alphas_bar.tolist(), randn(2, 3, 20, 20), None
    torch.manual_seed(0)
    clipped, outside, noises = 0, 0, []
    for i, x_next, x0_hat in diffusion.trajectory(toy, x, None, method, 0.0, order, clip):
        time = diffusion.times[i].repeat(2)
        eps, v = toy(x, time).chunk(2, dim=1)
        mean, log_variance, x0 = p_by_hand(alphas_bar, i, eps, v, x, clip)
        np.testing.assert_allclose(x0_hat, x0, atol=1e-9)
        clipped, outside = clipped + (x0.abs() == 1).sum(), outside + (x0.abs() > 1).sum()
        a, before = alphas_bar[i], alphas_bar[i - 1] if i else 1.0
        h = half_log_snr(before) - half_log_snr(a)
        D = x0
        if order == 2 and 0 < i < 5:  # the first and the last step are of first order
            r = (half_log_snr(a) - half_log_snr(alphas_bar[i + 1])) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
        ratio, signal = math.sqrt((1 - before) / (1 - a)), math.sqrt(before)
        if method == "ddim":
            mean, std = ratio * x - signal * math.expm1(-h) * D, 0 * x
        elif order == 2 or variance == "small":
            mean = ratio * math.exp(-h) * x - signal * math.expm1(-2 * h) * D
            std = math.sqrt((1 - before) * -math.expm1(-2 * h)) + 0 * x
        else:  # p's own
            std = (log_variance / 2).exp() if variance == "learned" else math.sqrt(1 - a / before)
        if method == "ddim" or i == 0:  # no noise
            np.testing.assert_allclose(x_next, mean, atol=1e-9)
        else:
            noises.append((x_next - mean) / std)
        x, last = x_next, x0
    assert (outside == 0 and clipped > 100) if clip else outside > 100
    if noises:  # what is left is standard normal noise, which x and x0_hat have no part in
        z = torch.stack(noises).flatten(1)
        n = z.shape[1]
        assert (abs(z.mean(1)) < 4.5 / n**0.5).all()
        assert (abs(z.var(1) - 1) < 4.5 * (2 / n) ** 0.5).all()
        assert abs(z.corrcoef() - torch.eye(len(z))).max() < 4.5 / n**0.5
        assert abs(z.pow(4).mean() - 3) < 4.5 * (96 / z.numel()) ** 0.5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("method, eta", [("ancestral", 0), ("ddim", 1)])
def test_the_last_step_adds_no_noise(method, eta, order):
    diffusion, noise = Diffusion("cosine", 20), randn(2, 3, 4, 4)
    *_, (_, before, _), (i, x, x0_hat) = diffusion.trajectory(toy, noise, None, method, eta, order)
    eps, v = toy(before, torch.zeros(2)).chunk(2, dim=1)
    expected = p_by_hand(diffusion.alphas_bar.tolist(), 0, eps, v, before)[2]
    assert i == 0 and torch.allclose(x0_hat, expected) and torch.allclose(x, expected, atol=1e-9)


def test_ddims_noise_has_eta_times_the_deviation_of_the_posterior():
    diffusion, x = Diffusion("linear", 1000, steps=[10, 300, 700]), randn(1, 3, 50, 50)
    a, before = diffusion.alphas_bar[2].item(), diffusion.alphas_bar[1].item()
    sigma = math.sqrt((1 - before) / (1 - a) * (1 - a / before))  # eq. 16 of Song et al. 2021
    eps, v = toy(x, diffusion.times[2:]).chunk(2, dim=1)
    x0 = p_by_hand(diffusion.alphas_bar.tolist(), 2, eps, v, x)[2]
    direction = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)  # ε of the clipped x0
    torch.manual_seed(0)
    for eta in (0.3, 1.0):
        _, found, _ = next(diffusion.trajectory(toy, x, method="ddim", eta=eta))
        mean = math.sqrt(before) * x0 + math.sqrt(1 - before - (eta * sigma) ** 2) * direction
        z = (found - mean) / (eta * sigma)
        assert abs(z.mean()) < 4.5 / 7500**0.5 and abs(z.var() - 1) < 4.5 * (2 / 7500) ** 0.5


def test_trajectory_yields_every_step():
    steps = list(Diffusion("cosine", 30, steps=6).trajectory(toy, randn(1, 3, 4, 4)))
    assert [i for i, _, _ in steps] == [5, 4, 3, 2, 1, 0]
    assert all(x.shape == x0.shape == (1, 3, 4, 4) for _, x, x0 in steps)


def test_a_step_costs_one_call_and_the_image_is_clamped():
    calls = []

    def model(x, time, y):
        calls.append(time)
        return torch.cat([0 * x - 9, x.tanh()], dim=1)

    for method in ("ancestral", "ddim"):
        for order in (1, 2):
            calls.clear()
            diffusion, noise = Diffusion("linear", 500, steps=8), randn(2, 3, 4, 4)
            x = diffusion.sample(model, noise, None, method, 0.0, order)
            assert x.abs().max() == 1 and len(calls) == 8
            assert torch.equal(torch.stack(calls)[:, 0], diffusion.times.flip(0))


def test_an_image_does_not_depend_on_its_batch():
    diffusion, noise = Diffusion("cosine", 20), randn(4, 3, 4, 4).float()

    def draw(rows, **how):
        generators = [generator(9, i) for i in rows]
        return diffusion.sample(toy, noise[rows], generators=generators, **how)

    for how in ({}, dict(order=2), dict(method="ddim", eta=0.5)):
        whole = draw([0, 1, 2, 3], **how)
        parts = [draw(rows, **how) for rows in ([0], [1, 2], [3])]
        assert torch.equal(torch.cat(parts), whole)
        assert whole.abs().max() <= 1 and len(whole.unique()) > 50


def test_sample_passes_its_arguments_on():
    diffusion, noise = Diffusion("linear", 50, steps=9), 0.5 * randn(2, 3, 4, 4)
    y = torch.tensor([1, 0])

    def model(x, time, y):
        return toy(x, time) + 0.1 * y.view(-1, 1, 1, 1)

    for how in (
        dict(), dict(order=2), dict(method="ddim"), dict(method="ddim", eta=0.7),
        dict(method="ddim", order=2), dict(method="ddim", order=2, eta=1.0),
    ):  # fmt: skip
        one, two = ([generator(1, 0), generator(1, 1)] for _ in range(2))
        found = diffusion.sample(model, noise, y, **how, generators=one)
        *_, (_, x, _) = diffusion.trajectory(model, noise, y, **how, generators=two)
        assert torch.equal(found, x.clamp(-1, 1))


def test_generators_of_all_uses_differ():
    seeds = collections.Counter(
        generator(seed, index, stream=stream).initial_seed()
        for stream in ("noise", "dropout", "order")
        for seed in (0, 1, 2, 12345)
        for index in range(500)
    )
    assert len(seeds) == 3 * 4 * 500 and max(seeds) < 2**32  # the CPU looks at 32 bits alone
    a, b = generator(3, 7), generator(3, 7)
    assert torch.equal(torch.randn(9, generator=a), torch.randn(9, generator=b))
    large = generator(2**32 - 1, 10**6)
    assert 0 <= large.initial_seed() < 2**32
    both = draw_noise((3, 2), [generator(3, 7), generator(3, 8)])
    assert both.shape == (2, 3, 2)
    for k in range(2):
        assert torch.equal(both[k], torch.randn(3, 2, generator=generator(3, 7 + k)))


def test_streams_stay_apart_in_the_longest_runs():
    starts = sorted(generator(0, 0, stream=s).initial_seed() for s in ("noise", "dropout", "order"))
    assert min(np.diff(starts)) >= 2**30


def test_the_label_reaches_the_network():
    seen = []

    def model(x, time, y):
        seen.append(y)
        return toy(x, time, y)

    diffusion, x, y = Diffusion("cosine", 4), randn(2, 3, 4, 4), torch.tensor([5, 7])
    diffusion.sample(model, x, y)
    diffusion.losses(model, x, torch.tensor([0, 1]), y)
    diffusion.bits_per_dim(model, x, y)
    diffusion.pilot(model, x, y)
    assert len(seen) == 4 + 1 + 4 + 3 and all(label is y for label in seen)


@pytest.mark.parametrize("scale", [0, 1, 3, 0.5])
def test_guidance_goes_from_the_unconditional_to_the_conditional_eps(scale):
    calls = []

    def model(x, time, y, **inputs):
        calls.append((x, time, y, inputs))
        shift = (y.view(-1, 1, 1, 1) + 2) * (time / 100).view(-1, 1, 1, 1).to(x.dtype)
        return toy(x, time) + 0.37 * shift + inputs["low_res"].mean((1, 2, 3), keepdim=True)

    x, time, y = randn(2, 3, 4, 4), torch.tensor([70.0, 30.0]), torch.tensor([4, 0])
    small = randn(2, 3, 2, 2, seed=1)
    found = guided(model, scale)(x, time, y, low_res=small)
    ((x2, time2, y2, inputs),) = calls  # one call, of twice the batch
    assert torch.equal(x2, x.repeat(2, 1, 1, 1)) and torch.equal(time2, time.repeat(2))
    assert y2.tolist() in ([4, 0, -1, -1], [-1, -1, 4, 0]) and list(inputs) == ["low_res"]
    assert torch.equal(inputs["low_res"], small.repeat(2, 1, 1, 1))
    conditional = model(x, time, y, low_res=small)
    unconditional = model(x, time, 0 * y - 1, low_res=small)
    eps = unconditional[:, :3] + scale * (conditional[:, :3] - unconditional[:, :3])
    np.testing.assert_allclose(found[:, :3], eps, rtol=1e-12)
    assert torch.equal(found[:, 3:], conditional[:, 3:])  # v
    if scale in (0, 1):  # exactly
        assert torch.equal(found[:, :3], (conditional if scale else unconditional)[:, :3])
    # A network without v, and one whose outputs have 16 bits.
    narrow = guided(lambda x, time, y: toy(x, time)[:, :3].bfloat16() + y.view(-1, 1, 1, 1), scale)
    found = narrow(x, time, y)
    assert found.shape == x.shape and found.dtype == x.dtype


# ---- Which timesteps to train on ---------------------------------------------------------------


def test_uniform_sampler_draws_each_t_equally():
    t, weights = UniformSampler(5).sample(50_000, generator(0, 0))
    assert (weights == 1).all() and (abs(torch.bincount(t) - 10_000) < 450).all()  # 5 σ
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    again, _ = UniformSampler(5).sample(50_000, generator(0, 0))
    assert torch.equal(t, again)  # all randomness is the generator's
    sampler = UniformSampler(5)
    sampler.update(t, weights)
    sampler.load_state_dict(sampler.state_dict())
    assert len(sampler.sample(3)[0]) == 3


def expected_p(history, length, uniform=0.001):
    """eq. 18, and a uniform share."""
    if min(map(len, history)) < length:
        return np.full(len(history), 1 / len(history))
    root = np.array([np.sqrt(np.mean(np.square(h))) for h in history])
    return (1 - uniform) * root / root.sum() + uniform / len(history)


def losses_of_a_step(rng, T, size):
    t, losses = rng.integers(T, size=size), rng.uniform(0, 5, size).astype(np.float32)
    losses[rng.uniform(size=size) < 0.1] = np.nan
    losses[rng.uniform(size=size) < 0.1] = np.inf
    losses[rng.uniform(size=size) < 0.05] = -np.inf
    return t, losses


@pytest.mark.parametrize("T, length, uniform", [(4, 10, 0.001), (3, 2, 0.2)])
def test_importance_sampler_keeps_the_last_losses_of_each_t(T, length, uniform):
    how = {} if length == 10 else dict(history=length, uniform=uniform)
    rng, sampler = np.random.default_rng(0), ImportanceSampler(T, **how)
    history = [collections.deque(maxlen=length) for _ in range(T)]
    for size in (1, 3, 70, 5, 0, 40, 9, 1, 1, 80, 2):  # with 70, a t occurs more than ten times
        t, losses = losses_of_a_step(rng, T, size)
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        for i, loss in zip(t, losses):
            history[i] += [loss] if np.isfinite(loss) else []
        p = expected_p(history, length, uniform)
        np.testing.assert_allclose(sampler.probabilities(), p, rtol=1e-5)
        drawn, weights = sampler.sample(6, generator(size, 0))
        np.testing.assert_allclose(weights, 1 / (T * p[drawn]), rtol=1e-5)
        if size == 40:  # a run that is resumed goes on with the same history
            state = {name: value.clone() for name, value in sampler.state_dict().items()}
            sampler = ImportanceSampler(T, **how)
            sampler.load_state_dict(state)
    assert min(map(len, history)) == length
    for other in (ImportanceSampler(T + 1, **how), ImportanceSampler(T, history=length + 1)):
        with pytest.raises(RuntimeError, match="size mismatch for losses"):
            other.load_state_dict(sampler.state_dict())


def test_importance_sampler_is_uniform_until_every_t_has_ten_losses():
    sampler = ImportanceSampler(3)
    sampler.update(torch.tensor([0] * 40 + [1] * 40 + [2] * 9), torch.arange(89.0))
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    sampler.update(torch.tensor([2]), torch.tensor([math.nan]))
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    sampler.update(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.probabilities().tolist() != pytest.approx([1 / 3] * 3)
    none = ImportanceSampler(3)  # all losses 0: no t is better than another
    none.update(torch.arange(3).repeat(10), torch.zeros(30))
    assert none.probabilities().tolist() == pytest.approx([1 / 3] * 3)


def test_importance_weights_are_unbiased():
    sampler = ImportanceSampler(8)
    level = torch.tensor([50.0, 20, 9, 5, 3, 2, 1, 1])
    sampler.update(torch.arange(8).repeat(10), level.repeat(10))
    p = sampler.probabilities()
    f = torch.arange(8.0) ** 2
    t, weights = sampler.sample(100_000, generator(1, 1))
    values = weights * f[t]
    assert abs(values.mean() - f.mean()) < 4.5 * values.std() / 100_000**0.5
    np.testing.assert_allclose(weights, 1 / (8 * p[t]), rtol=1e-6)
    counts = torch.bincount(t, minlength=8)
    assert (abs(counts - 100_000 * p) < 5 * (100_000 * p).sqrt()).all()
    assert p[0] > 0.5 and torch.equal(t, sampler.sample(100_000, generator(1, 1))[0])


@contextlib.contextmanager
def second_rank(values):
    """A process group of two ranks; the other one has these values."""
    sent = []

    def all_gather(rows, mine):
        assert len(rows) == 2 and all(row.shape == mine.shape for row in rows)
        theirs = torch.tensor([len(values)]) if not sent else mine.new_zeros(mine.shape)
        if sent:
            assert len(mine) == max(len(values), sent[0].item())
            theirs[: len(values)] = values
        sent.append(mine)
        rows[0].copy_(mine)
        rows[1].copy_(theirs)

    group = types.SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2,
        get_backend_config=lambda: "cpu:gloo", all_gather=all_gather,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_file, "dist", group)
        yield


def test_all_ranks_see_all_losses():
    rng, sampler = np.random.default_rng(1), ImportanceSampler(4)
    history = [collections.deque(maxlen=10) for _ in range(4)]
    for mine, other in ((30, 41), (2, 0), (0, 3), (5, 1)):  # ranks may have different numbers
        pairs = [losses_of_a_step(rng, 4, size) for size in (mine, other)]
        with second_rank(torch.tensor(np.stack(pairs[1], 1), dtype=torch.float32)):
            sampler.update(*map(torch.from_numpy, pairs[0]))
        for t, losses in pairs:
            for i, loss in zip(t, losses):
                history[i] += [loss] if np.isfinite(loss) else []
        np.testing.assert_allclose(sampler.probabilities(), expected_p(history, 10), rtol=1e-5)
    assert min(map(len, history)) == 10
    assert sampler_file.gather(torch.tensor([3])).tolist() == [3]  # without other ranks


# ---- The network -------------------------------------------------------------------------------


def small_unet(**changes):
    """A small UNet whose parameters are all random, also those that start as zeros."""
    config = dict(image_size=8, channels=16, channel_mult=(1, 2), num_res_blocks=1, dropout=0.0,
                  attention_resolutions=(4,), num_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = UNet(UNetConfig(**config | changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_the_papers_cifar10_network_is_the_default():
    with torch.device("meta"):
        model = UNet(UNetConfig())
    assert sum(p.numel() for p in model.parameters()) == 52_546_438
    # What the parameters do not show.
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(drops) == 30 and set(drops) == {0.3}
    heads = [m.num_heads for m in model.modules() if isinstance(m, Attention)]
    assert len(heads) == 3 + 3 + 4 + 4 + 1 and set(heads) == {4}


@pytest.mark.parametrize(
    "changes",
    [
        {}, dict(scale_shift_norm=False, channels=64), dict(channels=24),
        dict(channels=12, num_heads=3),
    ],
)  # fmt: skip
def test_the_network_hears_image_time_and_class(changes):
    model = small_unet(num_classes=10, **changes)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500]), torch.tensor([1, 2])
    out = model(x, t, y)
    assert out.shape == (2, 6, 8, 8)
    for other in (model(x + 1, t, y), model(x, t + 100, y), model(x, t, y + 1)):
        assert (out - other).flatten(1).abs().max(1)[0].min() > 1e-3
    assert torch.allclose(model(x[:1], t[:1], y[:1]), out[:1], atol=1e-5)
    for wrong in (lambda: model(x, t), lambda: small_unet()(x, t, y)):
        with pytest.raises(ValueError, match="if and only if"):
            wrong()


def test_a_new_network_gives_zero_and_its_blocks_the_identity():
    torch.manual_seed(0)
    config = UNetConfig(image_size=8, channels=16, channel_mult=(1, 2), attention_resolutions=(8,))
    model, x, emb = UNet(config).eval(), torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    assert (model(torch.randn(2, 3, 8, 8), torch.zeros(2)) == 0).all()
    assert torch.equal(ResBlock(16, 16, config)(x, emb), x)
    assert torch.equal(Attention(16, config)(x), x)
    block = ResBlock(16, 32, config)
    assert torch.equal(block(x, emb), block.skip(x))
    others = [p for n, p in model.named_parameters() if n.endswith(("conv1.weight", "qkv.weight"))]
    assert all(p.abs().min() > 0 for p in others)  # only the last layer of a block is zero


def test_no_class_adds_no_class_embedding():
    model, x = small_unet(num_classes=4), torch.randn(4, 3, 8, 8)
    t = torch.tensor([3.0, 9, 70, 400])
    none = model(x, t, torch.full((4,), -1))
    mixed = model(x, t, torch.tensor([2, -1, 0, -1]))
    for k, y in enumerate([2, -1, 0, -1]):  # an image does not hear its neighbours' classes
        alone = model(x[k : k + 1], t[k : k + 1], torch.tensor([y]))
        assert torch.allclose(mixed[k], alone[0], atol=1e-5)
    assert (mixed - none).flatten(1).abs().max(1)[0][[0, 2]].min() > 1e-3
    mixed.square().sum().backward()
    assert (model.label_emb.weight.grad.abs().sum(1) > 0).tolist() == [True, False, True, False]
    model.zero_grad()
    model(x, t, torch.full((4,), -1)).square().sum().backward()
    assert (model.label_emb.weight.grad == 0).all()
    model.label_emb.weight.data.zero_()  # a class whose row is zero adds as little
    assert torch.allclose(none, model(x, t, torch.tensor([0, 1, 2, 3])), atol=1e-6)


def enlarge(small, size):
    """Bilinear enlargement, pixels as squares: output j looks at (j + ½)·s/size - ½, within the
    image."""
    s = small.shape[-1]
    matrix = torch.zeros(size, s)
    for j in range(size):
        place = min(max((j + 0.5) * s / size - 0.5, 0), s - 1)
        low = min(int(place), s - 1)
        matrix[j, low] += 1 - (place - low)
        matrix[j, min(low + 1, s - 1)] += place - low
    return matrix @ small @ matrix.T


@pytest.mark.parametrize("low_res", [1, 2, 4])
def test_an_upsampler_sees_the_enlarged_image_beside_x(low_res):
    model = small_unet(low_res=low_res, num_classes=2)
    plain = small_unet(in_channels=6, num_classes=2)
    plain.load_state_dict(model.state_dict())
    x, small = torch.randn(2, 3, 8, 8), torch.randn(2, 3, low_res, low_res)
    t, y = torch.tensor([3.0, 500]), torch.tensor([1, -1])
    expected = plain(torch.cat([x, enlarge(small, 8)], dim=1), t, y)
    assert torch.allclose(model(x, t, y, small), expected, atol=1e-5)
    assert torch.equal(model(x, t, y, low_res=small), model(x, t, y, small))
    for wrong in (lambda: model(x, t, y), lambda: small_unet(num_classes=2)(x, t, y, small)):
        with pytest.raises(ValueError, match="low_res must be given if and only if"):
            wrong()


def test_dropout_is_for_training_alone():
    model, x, t = small_unet(dropout=0.5), torch.randn(1, 3, 8, 8), torch.zeros(1)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.allclose(model(x, t), model(x, t))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7])
def test_the_blocks_drop_with_the_probability_that_was_asked_for(p):
    block = ResBlock(32, 32, UNetConfig(dropout=p)).train()
    seen = []
    block.conv2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    block(torch.randn(8, 32, 16, 16), torch.randn(8, 512))
    zeros = (seen[0] == 0).double().mean().item()
    assert abs(zeros - p) < 5 * (p * (1 - p) / seen[0].numel()) ** 0.5 + 1e-9


def test_attention_is_softmax_attention_of_the_published_layout():
    layer, heads, C = Attention(8, UNetConfig(num_heads=2)).double(), 2, 8
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = randn(2, C, 3, 3)
    h = torch.nn.functional.conv1d(
        layer.norm(x).flatten(2), layer.qkv.weight[..., 0], layer.qkv.bias
    )
    out = []
    for head in h.chunk(heads, dim=1):  # each head's channels are its q, its k, its v
        q, k, v = head.chunk(3, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / (C // heads) ** 0.5, dim=-1)
        out.append(torch.einsum("bts,bcs->bct", weight, v))
    h = torch.nn.functional.conv1d(torch.cat(out, 1), layer.proj.weight[..., 0], layer.proj.bias)
    assert torch.allclose(layer(x), x + h.view_as(x), atol=1e-12)


def test_bf16_attention_and_norm_stay_close_to_float32():
    torch.manual_seed(0)
    layer = Attention(32, UNetConfig(num_heads=4))
    layer.qkv.weight.data *= 4
    torch.nn.init.normal_(layer.proj.weight)
    x = torch.randn(20, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, normed = layer(x), layer.norm(x.bfloat16() + 100)
    assert (found - layer(x)).norm() / layer(x).norm() < 0.02
    expected = layer.norm((x.bfloat16() + 100).float())  # which bfloat16's sums would have lost
    assert normed.dtype == torch.bfloat16 and (normed - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    "dtype, n", [(torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 37)]
)
def test_attend_is_attention_in_any_precision(dtype, n):
    q, k, v = (randn(n, 2, 9, 4, seed=s).to(dtype) for s in (1, 2, 3))
    scores = torch.einsum("nhid,nhjd->nhij", q.double(), k.double()) / 2  # √4
    expected = torch.einsum("nhij,nhjd->nhid", scores.softmax(-1), v.double())
    found = attend(q, k, v)
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found - expected).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-5)


def test_timestep_embedding_has_cosines_first():
    t = torch.tensor([0.0, 7.25, 999])
    freqs = [10_000 ** (-i / 4) for i in range(4)]
    expected = [[f(x * w) for f in (math.cos, math.sin) for w in freqs] for x in t.tolist()]
    np.testing.assert_allclose(timestep_embedding(t, 8), expected, atol=1e-4)


def test_norms_have_groups_of_4_channels_or_32_groups():
    found = {c: GroupNorm(c, 0).num_groups for c in (4, 8, 32, 36, 64, 96, 128, 192, 512)}
    assert found == {4: 1, 8: 2, 32: 8, 36: 9, 64: 16, 96: 24, 128: 32, 192: 32, 512: 32}
    assert GroupNorm(64, 32).num_groups == 32  # as improved-diffusion's
    assert GroupNorm(96, 7).num_groups == 6 and GroupNorm(16, 32).num_groups == 16
    for channels in (37, 3, 74):
        with pytest.raises(ValueError, match=f"{channels} channels"):
            GroupNorm(channels, 0)
    for groups in (0, 8):  # the config's choice reaches all norms
        model = small_unet(channels=32, norm_groups=groups)
        norms = [m for m in model.modules() if isinstance(m, GroupNorm)]
        assert len(norms) == 2 * 8 + 4 + 1
        assert all(m.num_groups == (groups or min(32, m.num_channels // 4)) for m in norms)


def test_a_norm_leaves_the_mean_colour_in_its_groups():
    dark, bright = torch.rand(2, 1, 32, 4, 4) + torch.tensor([0.0, 3]).view(2, 1, 1, 1, 1)
    dark[:, ::4] -= 2  # channels differ by another amount in dark than in bright images
    means = [GroupNorm(32, 0)(x).mean((2, 3)) for x in (dark, bright)]
    assert (means[0] - means[1]).abs().max() > 0.5


@pytest.mark.parametrize(
    "changes, message",
    [(dict(image_size=30), "image-size 30"), (dict(attention_resolutions=(5,)), "attention 5: .* 32,16,8,4"),
     (dict(num_heads=3), "num-heads 3"), (dict(channel_mult=()), "image-size 32"),
     (dict(low_res=5), "low-res 5"), (dict(low_res=32), "low-res 32"),
     (dict(low_res=64), "low-res 64"), (dict(channels=10), "10 channels")],
)  # fmt: skip
def test_impossible_networks_are_refused(changes, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        UNet(UNetConfig(**changes))


def test_attention_stands_where_it_is_asked_for():
    def found(**changes):
        model = small_unet(**changes)
        return {n for n, m in model.named_modules() if isinstance(m, Attention)}

    # down: 0 the first convolution, 1 at 8 pixels, 2 the halving, 3 at 4; up: 0, 1 at 4; 2, 3 at 8
    assert found(attention_resolutions=()) == {"middle.1"}
    assert found(attention_resolutions=(4,)) == {"middle.1", "down.3.1", "up.0.1", "up.1.1"}
    assert found(attention_resolutions=(8,)) == {"middle.1", "down.1.1", "up.2.1", "up.3.1"}


def test_the_network_compiles_as_one_graph():
    model = small_unet(num_classes=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2]), torch.tensor([0, -1])
    assert torch.allclose(compiled(*given), model(*given), atol=1e-6)


# ---- The device --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known, native",
    [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True),
     ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False)],
)  # fmt: skip
def test_auto_takes_bf16_only_where_it_is_native(monkeypatch, known, native):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert pick_dtype("auto", cuda) == (torch.bfloat16 if native else torch.float16)
    assert pick_dtype("auto", mps) == torch.float32
    for device in (cpu, cuda, mps):
        asked = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        assert {name: pick_dtype(name, device) for name in asked} == asked
    for name in ("bf16", "fp32"):  # who asks for float32 gets no TF32
        pick_dtype(name, cuda)
        assert torch.backends.cudnn.allow_tf32 == (name == "bf16")


def test_auto_takes_the_best_device(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(model_file, "LOCAL_RANK", 1)
    for cuda, mps, best in ((1, 1, "cuda:1"), (1, 0, "cuda:1"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
        assert str(pick_device("auto")) == best
        assert str(pick_device("cpu")) == "cpu"
        for name, there in (("cuda", cuda), ("mps", mps)):
            if not there:
                with pytest.raises(ValueError, match=f"--device {name}"):
                    pick_device(name)
    assert taken == [1, 1]  # under torchrun, each rank has its own


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="more ranks than GPUs"):
        pick_device("auto")


def test_each_rank_tells_its_errors_once_the_ranks_have_met(monkeypatch, capsys):
    def main():
        raise OSError("the disk is gone")

    monkeypatch.setattr(model_file, "RANK", 3)
    monkeypatch.setattr(model_file, "LOCAL_RANK", 3)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for met, told in ((False, ""), (True, "error: rank 3: the disk is gone\n")):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: met)
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert ended.value.code == 1 and capsys.readouterr().err.endswith(told)


def test_each_machine_tells_an_error_before_the_ranks_meet(monkeypatch, capsys):
    def main():
        raise ValueError("no such folder\nand more of it")

    monkeypatch.setattr(model_file, "RANK", 8)
    monkeypatch.setattr(model_file, "LOCAL_RANK", 0)
    with pytest.raises(SystemExit):
        run_script(main)
    assert capsys.readouterr().err.endswith("error: rank 8: no such folder\n")  # its first line


def test_too_little_memory_is_one_line_and_a_fault_of_the_program_is_not(capsys):
    def main():
        raise RuntimeError(words)

    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 1 and words in capsys.readouterr().err
    words = "the shapes do not match"
    with pytest.raises(RuntimeError, match=words):
        run_script(main)


def test_the_first_rank_of_a_machine_works_before_the_others(monkeypatch):
    events = []
    monkeypatch.setattr(model_file, "gather", lambda _: events.append("met"))
    for rank, expected in ((0, ["worked", "met"]), (1, ["met", "worked"])):
        monkeypatch.setattr(model_file, "LOCAL_RANK", rank)
        events.clear()
        with model_file.one_rank_first():
            events.append("worked")
        assert events == expected


def test_long_lists_say_how_many_names_are_left():
    assert model_file.some(list("abcdef"), 4) == "a, b, c, d, … (2 more)"
    assert model_file.some(list("abcd"), 4) == "a, b, c, d"


def test_one_rank_prints_the_results(monkeypatch, capsys):
    for rank in range(2):
        monkeypatch.setattr(model_file, "RANK", rank)
        model_file.report("3.17")
        model_file.say("and so on")
    assert capsys.readouterr() == ("3.17\n", "and so on\n")


def test_ranks_wait_for_hours_for_one_that_works_alone(monkeypatch):
    joined = []
    monkeypatch.setattr(model_file, "WORLD", 2)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *given, **more: joined.append((given, more))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for device, backend in (("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")):
        pick_device(device)
        given, more = joined.pop()
        assert given == (backend,) and more["timeout"].total_seconds() >= 6 * 3600


@contextlib.contextmanager
def fake_tensors():
    """Tensors made within have a device and a shape, but no memory: "cuda" needs no GPU. Operations
    on two devices at once fail, and so does .item(), for which the host would have to wait."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def move_to_fake_cuda(model, mode):
    for module in model.modules():  # .to() of a module cannot swap its parameters for fake ones
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = mode.from_tensor(parameter.detach()).to("cuda")
                module._parameters[name] = torch.nn.Parameter(there)


def on_cuda(*values):
    """Whether all tensors in these values are on the GPU; there must be some."""
    tensors = torch.utils._pytree.tree_leaves(values)
    tensors = [t for t in tensors if torch.is_tensor(t)]
    return len(tensors) > 0 and all(t.device.type == "cuda" for t in tensors)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_everything_is_on_the_networks_device_and_nothing_waits_for_it():
    diffusions = {v: Diffusion("linear", 20, v) for v in ("learned", "small")}
    skipping = Diffusion("cosine", 20, steps=3, min_alpha_bar=1e-3)
    samplers = [UniformSampler(20), ImportanceSampler(20)]
    shape = dict(channels=8, num_classes=3, channel_mult=(1,), attention_resolutions=())
    model, upsampler = small_unet(**shape).train(), small_unet(**shape, low_res=2).train()
    with fake_tensors() as mode:
        for part in [*diffusions.values(), skipping, *samplers]:
            assert part.to("cuda") is part
        learned, small = diffusions.values()
        x0, y = torch.rand(4, 3, 8, 8, device="cuda"), torch.tensor([0, 1, -1, 2]).to("cuda")
        small_images = torch.rand(4, 3, 2, 2, device="cuda")
        move_to_fake_cuda(model, mode)
        move_to_fake_cuda(upsampler, mode)
        enlarging = functools.partial(upsampler, low_res=small_images)
        enlarging_guided = functools.partial(guided(upsampler, 2.0), low_res=small_images)
        with pytest.raises(Exception, match="local_scalar_dense"):  # this would be noticed,
            x0[0, 0, 0, 0].item()
        with pytest.raises(Exception, match="same device"):  # and this
            x0 + torch.zeros(8)

        # Which t, and what follows.
        for t_sampler in samplers:
            t, weights = t_sampler.sample(4)
            assert on_cuda(t) and on_cuda(weights)
            t_sampler.update(t, torch.rand(4, device="cuda"))
            assert all(map(on_cuda, t_sampler.state_dict().values()))
        assert on_cuda(learned.add_noise(x0, t, x0)) and on_cuda(learned.prior(x0))
        assert all(map(on_cuda, learned.posterior(x0, x0, t)))
        params = list(model.parameters())
        for diffusion, net, objective in (
            (learned, model, "simple"), (learned, model, "hybrid"), (learned, model, "vlb"),
            (small, model, "vlb"), (learned, enlarging, "hybrid"),
        ):  # fmt: skip
            loss, vlb = diffusion.losses(net, x0, t, y, objective=objective)
            assert on_cuda(loss) and on_cuda(vlb)
            # Without a GPU, autograd refuses to go back through CUDA tensors, fake or not.
            if torch.cuda.is_available():
                (weights @ loss).backward()
                assert all(on_cuda(p.grad) for p in params)

        # An update.
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = torch.optim.AdamW(params, 1e-3, weight_decay=0.0, fused=True)
        for fp16 in (False, True):
            scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16 if fp16 else 1.0)
            if scaler.is_enabled():  # not without a GPU
                scaler.scale(loss.sum())
            norm = train.update_weights(params, optimizer, scaler, 1.0, fp16)
            assert on_cuda(norm) and all(map(on_cuda, params))
            for p in params:
                p.grad = torch.empty_like(p)
        log = object.__new__(train.Log)
        log.sums = torch.zeros(6, device="cuda")
        log.bar = train.tqdm(disable=True)
        log.add(torch.stack([loss, vlb]).detach() @ weights, norm)
        assert on_cuda(log.sums)

        # Samples and bits per dimension. (The pilot reads its measurements, and load_batch needs
        # a CUDA generator and pinned memory: they are left out.)
        for method, eta in (("ancestral", 0.0), ("ddim", 0.0), ("ddim", 1.0)):
            for order in (1, 2):
                for net in (toy, guided(toy, 2.0)):
                    for _, x, x0_hat in skipping.trajectory(net, x0, y, method, eta, order):
                        assert on_cuda(x) and on_cuda(x0_hat)
        assert on_cuda(skipping.sample(enlarging_guided, x0, y))
        assert all(map(on_cuda, skipping.bits_per_dim(toy, x0, y)))
        p = torch.rand(20, dtype=torch.float64, device="cuda")
        assert all(map(on_cuda, learned.estimate_bits_per_dim(toy, x0, p, 3, y)))


# ---- Checkpoints -------------------------------------------------------------------------------


def checkpoint_of(model):
    process = dict(schedule="linear", T=30, variance="learned")
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    return dict(unet=vars(model.config), diffusion=process, ema=model.state_dict(), model=weights)


def test_a_checkpoint_gives_the_averaged_weights_ready_to_sample(tmp_path):
    names = ("cat", "dog", "Ünïcode", "2")
    model = small_unet(dropout=0.5, num_classes=4, class_names=names, label_dropout=0.1, low_res=4)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(model))
    x, small = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 4, 4)
    given = x, torch.tensor([1.0, 2]), torch.tensor([0, 2]), small
    for path in (tmp_path / "ckpt.pt", str(tmp_path / "ckpt.pt"), tmp_path):  # or a run's directory
        loaded, process = load_checkpoint(path)
        assert loaded.config == model.config and not loaded.training
        assert torch.equal(loaded(*given), model(*given))
        assert process == dict(schedule="linear", T=30, variance="learned")
    held = dict(schedule="linear", T=30, time_scale=None, num_heads=2)
    assert load_checkpoint(tmp_path, **held)[1] == process
    for name, other, says in (
        ("schedule", "cosine", "--schedule cosine: .*ckpt.pt has linear"),
        ("T", 31, "--T 31: .*ckpt.pt has 30"),
        ("time_scale", 0.5, "--time-scale 0.5: .*ckpt.pt has none"),
        ("num_heads", 1, "--num-heads 1: .*ckpt.pt has 2"),
    ):
        with pytest.raises(ValueError, match=says):
            load_checkpoint(tmp_path / "ckpt.pt", **{name: other})
    assert read_checkpoint(tmp_path)["format"] == 1


def test_a_time_scale_of_zero_is_compared_too(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(small_unet()))
    with pytest.raises(ValueError, match="--time-scale 0.0: .* has none"):
        load_checkpoint(tmp_path, time_scale=0.0)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_damaged_foreign_and_newer_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("good", checkpoint_of(small_unet()))
    good = open("good", "rb").read()
    torch.save({"format": 1, "ema": Malicious()}, "malicious")
    torch.save({"format": 99}, "newer")
    torch.save([1, 2], "list")
    torch.save({"some": torch.ones(1)}, "foreign")
    torch.save({"format": 1, "unet": {"depth": 3}}, "strange")
    torch.save({"format": "pt"}, "other format")
    torch.save({"input_blocks.0.0.weight": torch.ones(8, 3, 3, 3)}, "incomplete")
    torch.save({7: 8}, "numbers")
    other = small_unet(channels=8).state_dict()
    torch.save(checkpoint_of(small_unet()) | {"format": 1, "ema": other}, "shape")
    contents = {"cut": good[:-100], "half": good[: len(good) // 2], "empty": b""}
    contents |= {"text": b"hello", "pickle": pickle.dumps(Malicious())}
    for name, content in contents.items():
        open(name, "wb").write(content)
    for name in set(os.listdir()) - {"good"}:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(name)
    with pytest.raises(ValueError, match="newer version"):
        read_checkpoint("newer")
    assert not os.path.exists("was_run")
    for missing in ("missing", "."):  # a directory without ckpt.pt
        with pytest.raises(OSError):
            load_checkpoint(missing)


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    model, path = small_unet(), tmp_path / "ckpt.pt"
    save_checkpoint(path, checkpoint_of(model))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(len(whole), size=40):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)[0]
        except ValueError:
            refused += 1
        else:  # it was between the tensors
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    assert refused > 30


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "ckpt.pt", tmp_path / "disk" / "ckpt.pt"
    link.symlink_to(target)
    save_checkpoint(link, {"step": 3})
    assert link.is_symlink() and read_checkpoint(target)["step"] == 3


def test_a_failing_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):  # by the version of Python
        save_checkpoint(path, {"step": 2, "bad": lambda: None})
    assert read_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["ckpt.pt"]
    with pytest.raises(OSError, match="cannot write"):
        save_checkpoint(tmp_path / "no" / "ckpt.pt", {"step": 1})
    save_checkpoint(path, {"step": 3})
    assert read_checkpoint(path)["step"] == 3 and os.listdir(tmp_path) == ["ckpt.pt"]


# ---- Golden numbers of openai/improved-diffusion -----------------------------------------------
#
# Outputs of its UNetModel and SuperResModel, run in float64, for weights, images, times and labels
# that formulas give. The table below says what its layers are called and what shapes their weights
# have: a network of 64 channels, mult (1, 2), one block a resolution, attention at the second, 3
# classes. C is 3, or 6 with low_res. A block's modules have I channels in, O out; E is 2·O with
# scale and shift, else O. It owes nothing to OPENAI_NAMES.

GOLDEN_MODULES = """
    time_embed.0 256,64; time_embed.2 256,256; label_emb 3,256; input_blocks.0.0 64,C,3,3;
    input_blocks.1.0 res 64 64; input_blocks.2.0.op 64,64,3,3;
    input_blocks.3.0 res 64 128; input_blocks.3.1 attention 128;
    middle_block.0 res 128 128; middle_block.1 attention 128; middle_block.2 res 128 128;
    output_blocks.0.0 res 256 128; output_blocks.0.1 attention 128;
    output_blocks.1.0 res 192 128; output_blocks.1.1 attention 128;
    output_blocks.1.2.conv 128,128,3,3; output_blocks.2.0 res 192 64; output_blocks.3.0 res 128 64;
    out.0 64; out.2 6,64,3,3
"""
GOLDEN_BLOCKS = {
    "res": """
        .in_layers.0 I; .in_layers.2 O,I,3,3; .emb_layers.1 E,256; .out_layers.0 O;
        .out_layers.3 O,O,3,3; .skip_connection O,I,1,1
    """,
    "attention": ".norm I; .qkv 3I,I,1; .proj_out I,I,1",
}


def golden_modules(scale_shift_norm, low_res):
    """Yield (name, shape of its weights) of every module that has weights."""

    def parse(shape, **letters):
        return tuple(letters[s] if s in letters else int(s) for s in shape.split(","))

    for name, *what in map(str.split, GOLDEN_MODULES.split(";")):
        if what[0] not in GOLDEN_BLOCKS:
            yield name, parse(what[0], C=6 if low_res else 3)
            continue
        n_in, n_out = int(what[1]), int(what[-1])
        letters = {"I": n_in, "O": n_out, "E": (1 + scale_shift_norm) * n_out, "3I": 3 * n_in}
        for part, shape in map(str.split, GOLDEN_BLOCKS[what[0]].split(";")):
            if part != ".skip_connection" or n_in != n_out:
                yield name + part, parse(shape, **letters)


def golden_numbers(k, shape):
    """The k-th formula: numbers in [-0.5, 0.5), float64, from integers alone."""
    n = torch.arange(math.prod(shape))
    return (n * (n + 2 * k + 1) % 1009).view(shape).double() / 1009 - 0.5


def golden_weights(scale_shift_norm=True, low_res=None):
    """A state dict of improved-diffusion's."""
    shapes = {}
    for name, shape in golden_modules(scale_shift_norm, low_res):
        shapes[f"{name}.weight"] = shape
        if name != "label_emb":
            shapes[f"{name}.bias"] = shape[:1]
    state = {}
    for k, name in enumerate(sorted(shapes)):
        shape, u = shapes[name], golden_numbers(k, shapes[name])
        if len(shape) > 1:
            fan_in = 1 if name == "label_emb.weight" else math.prod(shape[1:])
            state[name] = 4 * u / fan_in**0.5
        else:  # the weights of norms are near 1
            state[name] = u + name.endswith("weight")
    return state


@pytest.fixture
def float64():
    """float64 is what new tensors are made of."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


GOLDEN_AT = [(0, 0, 0, 7), (0, 3, 7, 6), (0, 5, 3, 4), (1, 1, 5, 0), (1, 2, 2, 1), (1, 4, 6, 6)]
# scale_shift_norm, low_res, the outputs at GOLDEN_AT, the sum of the squares of all
GOLDEN = [
    (True, None, 413.692782262, [-0.92173370108, -1.3212888569, 1.2317990814, -1.3124796936,
                                 0.27643216313, 1.2549272601]),
    (False, None, 520.386987271, [-0.55192520973, -0.8581495081, 1.0123022907, -1.2106195695,
                                  -0.55270835708, 1.1171941409]),
    (True, 4, 421.988953243, [-0.95712426208, -1.111209406, 1.6387016223, -1.1365956051,
                              0.81382112555, 0.93978949465]),
]  # fmt: skip


@pytest.mark.parametrize("scale_shift_norm, low_res, squares, values", GOLDEN)
def test_outputs_are_improved_diffusions(
    float64, tmp_path, scale_shift_norm, low_res, squares, values
):
    path = tmp_path / "golden.pt"
    torch.save(golden_weights(scale_shift_norm, low_res), path)
    model, _ = load_checkpoint(path, "linear", 1000, num_heads=2)
    # The file does not say for which image size the network is. It is used at another.
    x, small = 4 * golden_numbers(0, (2, 3, 8, 8)), 4 * golden_numbers(1, (2, 3, 4, 4))
    t, y = torch.tensor([7.0, 250.0]), torch.tensor([2, 0])
    with torch.no_grad():
        out = model(x, t, y, *[small] if low_res else [])
    assert [out[at].item() for at in GOLDEN_AT] == pytest.approx(values, rel=1e-9)
    assert out.square().sum().item() == pytest.approx(squares, rel=1e-9)


def test_other_plain_state_dicts_need_their_process(tmp_path):
    state, path = golden_weights(), tmp_path / "mine.pt"
    torch.save(state, path)
    for given in ((), ("linear",), (None, 500)):
        with pytest.raises(ValueError, match="give --schedule and --T"):
            load_checkpoint(path, *given)
    loaded, process = load_checkpoint(path, "linear", 500, num_heads=2)
    assert process == dict(schedule="linear", T=500, variance="learned", time_scale=None)
    c = loaded.config
    assert (c.channels, c.channel_mult, c.num_res_blocks, c.num_classes) == (64, (1, 2), 1, 3)
    assert (c.num_heads, c.out_channels, c.norm_groups, c.low_res) == (2, 6, 32, None)
    assert c.attention_resolutions == (c.image_size // 2,) and c.scale_shift_norm
    assert not loaded.training
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old, process = load_checkpoint(tmp_path / "old.pt", "cosine", 600, 0.25, 4)
    assert process == dict(schedule="cosine", T=600, variance="learned", time_scale=0.25)
    assert old.config.num_heads == 4
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), loaded.parameters()))
    # ε alone, with the large variance, and without classes.
    state["out.2.weight"], state["out.2.bias"] = torch.zeros(3, 64, 3, 3), torch.zeros(3)
    del state["label_emb.weight"]
    torch.save(state, path)
    loaded, process = load_checkpoint(path, "linear", 500)
    assert process["variance"] == "large"
    assert loaded.config.out_channels == 3 and loaded.config.num_classes is None
    # A tensor missing, or one too many.
    for wrong in ({**state, "extra.weight": torch.zeros(3)}, dict(list(state.items())[:-5])):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="holds no UNet"):
            load_checkpoint(path, "linear", 500)


def test_a_file_is_a_released_one_by_its_own_name_not_its_folders(tmp_path):
    folder = tmp_path / "cifar10_uncond_tuned"
    folder.mkdir()
    torch.save(golden_weights(), folder / "mine.pt")
    with pytest.raises(ValueError, match="give --schedule and --T"):
        load_checkpoint(folder / "mine.pt")


# ---- The tensors of improved-diffusion's released files ----------------------------------------
#
# What its create_model_and_diffusion makes of the flags in its README: for each file how many
# tensors and numbers it has, then its blocks in their order, each with its modules and widths,
# in-out; + joins the modules of one block.

RELEASED = """
    cifar10_uncond 446 52546438
        input_blocks: conv:3-128 res:128-128 res:128-128 res:128-128 op:128
        input_blocks: res:128-256+att:256 res:256-256+att:256 res:256-256+att:256 op:256
        input_blocks: res:256-256+att:256 res:256-256+att:256 res:256-256+att:256 op:256
        input_blocks: res:256-256 res:256-256 res:256-256
        middle_block: res:256-256 att:256 res:256-256
        output_blocks: res:512-256 res:512-256 res:512-256 res:512-256+up:256
        output_blocks: res:512-256+att:256 res:512-256+att:256
        output_blocks: res:512-256+att:256 res:512-256+att:256+up:256
        output_blocks: res:512-256+att:256 res:512-256+att:256
        output_blocks: res:512-256+att:256 res:384-256+att:256+up:256
        output_blocks: res:384-128 res:256-128 res:256-128 res:256-128
    imagenet64_uncond 450 121063942
        input_blocks: conv:3-128 res:128-128 res:128-128 res:128-128 op:128
        input_blocks: res:128-256 res:256-256 res:256-256 op:256
        input_blocks: res:256-384+att:384 res:384-384+att:384 res:384-384+att:384 op:384
        input_blocks: res:384-512+att:512 res:512-512+att:512 res:512-512+att:512
        middle_block: res:512-512 att:512 res:512-512
        output_blocks: res:1024-512+att:512 res:1024-512+att:512
        output_blocks: res:1024-512+att:512 res:896-512+att:512+up:512
        output_blocks: res:896-384+att:384 res:768-384+att:384
        output_blocks: res:768-384+att:384 res:640-384+att:384+up:384
        output_blocks: res:640-256 res:512-256 res:512-256 res:384-256+up:256
        output_blocks: res:384-128 res:256-128 res:256-128 res:256-128
    imagenet64_cond 451 273049350
        input_blocks: conv:3-192 res:192-192 res:192-192 res:192-192 op:192
        input_blocks: res:192-384 res:384-384 res:384-384 op:384
        input_blocks: res:384-576+att:576 res:576-576+att:576 res:576-576+att:576 op:576
        input_blocks: res:576-768+att:768 res:768-768+att:768 res:768-768+att:768
        middle_block: res:768-768 att:768 res:768-768
        output_blocks: res:1536-768+att:768 res:1536-768+att:768
        output_blocks: res:1536-768+att:768 res:1344-768+att:768+up:768
        output_blocks: res:1344-576+att:576 res:1152-576+att:576
        output_blocks: res:1152-576+att:576 res:960-576+att:576+up:576
        output_blocks: res:960-384 res:768-384 res:768-384 res:576-384+up:384
        output_blocks: res:576-192 res:384-192 res:384-192 res:384-192
    upsample_cond 457 279792390
        input_blocks: conv:6-192 res:192-192 res:192-192 op:192
        input_blocks: res:192-192 res:192-192 op:192
        input_blocks: res:192-384 res:384-384 op:384
        input_blocks: res:384-384 res:384-384 op:384
        input_blocks: res:384-768+att:768 res:768-768+att:768 op:768
        input_blocks: res:768-768+att:768 res:768-768+att:768
        middle_block: res:768-768 att:768 res:768-768
        output_blocks: res:1536-768+att:768 res:1536-768+att:768 res:1536-768+att:768+up:768
        output_blocks: res:1536-768+att:768 res:1536-768+att:768 res:1152-768+att:768+up:768
        output_blocks: res:1152-384 res:768-384 res:768-384+up:384
        output_blocks: res:768-384 res:768-384 res:576-384+up:384
        output_blocks: res:576-192 res:384-192 res:384-192+up:192
        output_blocks: res:384-192 res:384-192 res:384-192
    lsun_uncond 426 113676678
        input_blocks: conv:3-128 res:128-128 res:128-128 op:128
        input_blocks: res:128-128 res:128-128 op:128
        input_blocks: res:128-256 res:256-256 op:256
        input_blocks: res:256-256 res:256-256 op:256
        input_blocks: res:256-512+att:512 res:512-512+att:512 op:512
        input_blocks: res:512-512 res:512-512
        middle_block: res:512-512 att:512 res:512-512
        output_blocks: res:1024-512 res:1024-512 res:1024-512+up:512
        output_blocks: res:1024-512+att:512 res:1024-512+att:512 res:768-512+att:512+up:512
        output_blocks: res:768-256 res:512-256 res:512-256+up:256
        output_blocks: res:512-256 res:512-256 res:384-256+up:256
        output_blocks: res:384-128 res:256-128 res:256-128+up:128
        output_blocks: res:256-128 res:256-128 res:256-128
"""
# The modules' tensors: a channels in, b out, e of the time embedding, d = 2b with scale and shift,
# else b.
RELEASED_MODULES = {
    "conv": ["weight b,a,3,3", "bias b"],
    "op": ["op.weight a,a,3,3", "op.bias a"],
    "up": ["conv.weight a,a,3,3", "conv.bias a"],
    "att": [
        "norm.weight a", "norm.bias a", "qkv.weight 3a,a,1", "qkv.bias 3a",
        "proj_out.weight a,a,1", "proj_out.bias a",
    ],
    "res": [
        "in_layers.0.weight a", "in_layers.0.bias a", "in_layers.2.weight b,a,3,3",
        "in_layers.2.bias b", "emb_layers.1.weight d,e", "emb_layers.1.bias d",
        "out_layers.0.weight b", "out_layers.0.bias b", "out_layers.3.weight b,b,3,3",
        "out_layers.3.bias b", "skip_connection.weight b,a,1,1", "skip_connection.bias b",
    ],
}  # fmt: skip


def released_shapes(file, shrink=1):
    """{name: shape} of a released file's tensors, all widths divided by shrink; its numbers."""
    text = RELEASED.strip().splitlines()
    start = next(i for i, line in enumerate(text) if file.startswith(line.split()[0]))
    tensors, numbers = map(int, text[start].split()[1:])
    blocks = {"input_blocks": [], "middle_block": [], "output_blocks": []}
    for line in text[start + 1 :]:
        kind, *modules = line.replace(":", " ", 1).split()
        if kind not in blocks:
            break
        blocks[kind] += modules

    def width(w):
        return int(w) if int(w) < 32 else int(w) // shrink

    c = width(blocks["input_blocks"][0].split("-")[1])
    shapes = {
        "time_embed.0.weight": (4 * c, c), "time_embed.0.bias": (4 * c,),
        "time_embed.2.weight": (4 * c, 4 * c), "time_embed.2.bias": (4 * c,),
    }  # fmt: skip
    if "_cond" in file:
        shapes["label_emb.weight"] = (1000, 4 * c)
    for kind, entries in blocks.items():
        for i, entry in enumerate(entries):
            for j, module in enumerate(entry.split("+")):
                prefix = f"{kind}.{i}." if kind == "middle_block" else f"{kind}.{i}.{j}."
                what, widths = module.split(":")
                a, b = (width(w) for w in (widths.split("-") * 2)[:2])
                d = b if file.startswith("lsun") else 2 * b
                sizes = {"a": a, "b": b, "3a": 3 * a, "d": d, "e": 4 * c, "3": 3, "1": 1}
                for tensor in RELEASED_MODULES[what]:
                    name, shape = tensor.split()
                    if a != b or "skip" not in name:
                        shapes[prefix + name] = tuple(sizes[s] for s in shape.split(","))
    shapes |= {"out.0.weight": (c,), "out.0.bias": (c,)}
    shapes |= {"out.2.weight": (6, c, 3, 3), "out.2.bias": (6,)}
    assert len(shapes) == tensors
    return shapes, numbers


MULT64, MULT256 = (1, 2, 3, 4), (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize(
    "file, channels, expected, process",
    [
        ("cifar10_uncond_50M_500K.pt", 128, dict(
            image_size=32, channel_mult=(1, 2, 2, 2), num_res_blocks=3), ("cosine", 4000, 0.25)),
        ("cifar10_uncond_vlb_50M_500K.pt", 128, dict(
            image_size=32, channel_mult=(1, 2, 2, 2), num_res_blocks=3), ("cosine", 4000, 0.25)),
        ("imagenet64_uncond_100M_1500K.pt", 128, dict(
            image_size=64, channel_mult=MULT64, num_res_blocks=3), ("cosine", 4000, 0.25)),
        ("imagenet64_uncond_vlb_100M_1500K.pt", 128, dict(
            image_size=64, channel_mult=MULT64, num_res_blocks=3), ("cosine", 4000, 0.25)),
        ("imagenet64_cond_270M_250K.pt", 192, dict(
            image_size=64, channel_mult=MULT64, num_res_blocks=3, num_classes=1000),
         ("cosine", 4000, 1)),
        ("upsample_cond_500K.pt", 192, dict(
            image_size=256, channel_mult=MULT256, num_res_blocks=2, num_classes=1000, low_res=64),
         ("linear", 4000, 1)),
        ("lsun_uncond_100M_1200K_bs128.pt", 128, dict(
            image_size=256, channel_mult=MULT256, num_res_blocks=2, attention_resolutions=(16,),
            num_heads=1, scale_shift_norm=False), ("linear", 1000, 1)),
        ("lsun_uncond_100M_2400K_bs64.pt", 128, dict(
            image_size=256, channel_mult=MULT256, num_res_blocks=2, attention_resolutions=(16,),
            num_heads=1, scale_shift_norm=False), ("linear", 1000, 1)),
    ],
)  # fmt: skip
def test_released_files_load(tmp_path, file, channels, expected, process):
    default = dict(
        attention_resolutions=(16, 8), num_heads=4, num_classes=None, scale_shift_norm=True,
        out_channels=6, norm_groups=32,
    )  # fmt: skip
    expected = default | expected

    # All widths a fraction of theirs; the k-th tensor is full of k, and takes no space in the file.
    shapes, numbers = released_shapes(file, shrink=channels // 32)
    state = {name: torch.tensor([1.0 * k]).expand(s) for k, (name, s) in enumerate(shapes.items())}
    torch.save(state, tmp_path / file)
    model, told = load_checkpoint(tmp_path / file)
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert model.config.channels == 32
    assert sorted((p.mean().round().item(), p.numel()) for p in model.parameters()) == sorted(
        (float(k), math.prod(shape)) for k, shape in enumerate(shapes.values())
    )
    schedule, T, time_scale = process
    assert (told["schedule"], told["T"], told["variance"]) == (schedule, T, "learned")
    assert (told["time_scale"] or 1000 / T) == time_scale

    # At its full size, our network has as many numbers as theirs.
    with torch.device("meta"):
        full = UNet(UNetConfig(**vars(model.config) | {"channels": channels}))
    assert sum(p.numel() for p in full.parameters()) == numbers


@pytest.fixture
def with_arrays(tmp_path, monkeypatch):
    """An empty folder to work in, but for x.npz: ten images of 8×8 pixels in three classes."""
    monkeypatch.chdir(tmp_path)
    make_npz(tmp_path / "x.npz")
    return tmp_path


def assert_equal(a, b):
    """Two checkpoints' contents, to the bit, apart from times and the number of steps asked for."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "config"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_equal(one, other)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def log_without_times(run):
    return [row.split(",")[:6] for row in open(f"{run}/log.csv")]


# ---- Training: what a step sees ----------------------------------------------------------------

# A tiny network on x.npz; what lets it halve its images; and one with all that can be switched on.
SMALL = (
    "--data x.npz --class-cond --channels 8 --channel-mult 1 --num-res-blocks 1 --attention none"
    " --num-heads 2 --T 4 --batch 8 --device cpu --dtype fp32 --sample-every 0"
).split()
HALVING = "--channel-mult 1,2 --attention 4".split()
FULL = SMALL + HALVING + (
    "--objective vlb --t-sampler importance --accum 2 --grad-clip 1 --warmup 4 --dropout 0.2"
    " --label-dropout 0.3 --flip --lr 0.01 --ema 0.3 --seed 3 --log-every 3 --save-every 2"
).split()  # fmt: skip


def make_npz(path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.arange(10) % 3)


def marked_images():
    """Ten images of 4×6 pixels and their labels 100 … 109. Image i has the values i+1, 101+i and
    201+i in red, green and blue, but for its upper left pixel, which is 0, 255, 128."""
    images = np.empty((10, 3, 4, 6), np.uint8)
    images[:] = np.arange(10)[:, None, None, None] + np.array([1, 101, 201])[:, None, None]
    images[:, :, 0, 0] = [0, 255, 128]
    return images, np.arange(100, 110)


def seen(step, sampler=None, **changes):
    """What load_batch gives for a step of training on the marked images."""
    given = dict(batch=4, seed=0, flip=False, label_dropout=0.0) | changes
    sampler = sampler or UniformSampler(8)
    device = torch.device("cpu")
    return train.load_batch(Namespace(**given), *marked_images(), sampler, step, device)


def numbers(x0):
    """Which of the marked images these are."""
    return (x0[:, 0, 2, 3] * 127.5 + 127.5 - 1).round().int().tolist()


def test_an_epoch_shows_each_image_once_with_its_label_in_an_order_of_its_own():
    batches = [seen(step) for step in range(10)]  # 40 images: step 2 ends one epoch, begins another
    order = [i for x0, *_ in batches for i in numbers(x0)]
    labels = [k for _, y, *_ in batches for k in y.tolist()]
    assert labels == [100 + i for i in order]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    other = [i for step in range(10) for i in numbers(seen(step, seed=1)[0])]
    assert all(other[i : i + 10] not in epochs for i in range(0, 40, 10))
    # A batch of more images than there are takes them from several epochs, in the same order.
    assert numbers(seen(0, batch=35)[0]) == order[:35]


def test_pixels_become_minus_1_to_1_and_half_of_the_images_are_mirrored():
    count, batches = 0, 40
    for step in range(batches):
        x0, _, _, _, noise = seen(step, batch=32, flip=True)
        assert x0.shape == noise.shape == (32, 3, 4, 6) and x0.dtype == torch.float32
        mirrored = x0[:, 0, 0, 5] == -1
        assert 0 < mirrored.sum() < 32  # each image on its own
        true = torch.from_numpy(marked_images()[0][numbers(x0)]).double() * 2 / 255 - 1
        true[mirrored] = true[mirrored].flip(3)  # left to right
        assert (x0 - true).abs().max() < 2e-7
        assert x0.min() == -1 and x0.max() == 1
        count += mirrored.sum().item()
        same = seen(step, batch=32)[0]
        assert (same[:, 0, 0, 0] == -1).all() and (same[:, 1, 0, 0] == 1).all()
    assert abs(count / (32 * batches) - 0.5) < 5 * 0.5 / (32 * batches) ** 0.5


def test_each_step_and_image_has_its_own_noise_and_t():
    steps, B, T = 40, 64, 8
    batches = [seen(step, batch=B) for step in range(steps)]
    noise, t = torch.cat([b[4] for b in batches]), torch.cat([b[2] for b in batches])
    n = noise.numel()  # 184,320
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    beyond = 2 * (1 - Normal(0, 1).cdf(torch.tensor(2.0)).item())  # two standard deviations
    assert abs((noise.abs() > 2).float().mean() - beyond) < 5 * (beyond / n) ** 0.5
    assert len(noise[:, 0, 0, 0].unique()) == steps * B
    flat = noise.flatten(1)
    assert abs(torch.corrcoef(flat.T) - torch.eye(72)).max() < 6 / (steps * B) ** 0.5  # pixels
    share = torch.bincount(t, minlength=T) / len(t)
    assert len(share) == T and abs(share - 1 / T).max() < 5 * (1 / T / len(t)) ** 0.5
    assert len({tuple(b[2].tolist()) for b in batches}) == steps
    assert all((b[3] == 1).all() for b in batches)
    # The same step again sees the same; another seed does not.
    again, other = seen(3, batch=B), seen(3, batch=B, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(batches[3], again))
    assert not torch.equal(batches[3][2], other[2]) and not torch.equal(batches[3][4], other[4])


def test_label_dropout_hides_its_share_of_the_labels():
    hidden, both = [], []
    for step in range(40):
        x0, y, *_ = seen(step, batch=64, flip=True, label_dropout=0.3)
        assert all(k in (-1, 100 + i) for k, i in zip(y.tolist(), numbers(x0)))
        hidden.append((y == -1).float())
        both.append(hidden[-1] * (x0[:, 0, 0, 5] == -1))
        assert (seen(step, batch=64, flip=True)[1] >= 100).all()
        assert (seen(step, batch=64, label_dropout=1.0)[1] == -1).all()
    hidden, both = torch.cat(hidden), torch.cat(both)
    assert abs(hidden.mean() - 0.3) < 5 * (0.3 * 0.7 / len(hidden)) ** 0.5
    assert abs(both.mean() - 0.15) < 5 * (0.15 * 0.85 / len(both)) ** 0.5  # whether mirrored or not
    assert len({tuple(row.tolist()) for row in hidden.view(40, 64)}) == 40


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_see_what_one_sees(world, monkeypatch):
    sampler = ImportanceSampler(2, history=1)
    sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 9.0]))
    settings = dict(batch=7, flip=True, label_dropout=0.5, sampler=sampler)
    whole = [seen(step, **settings) for step in range(4)]
    monkeypatch.setattr(train, "WORLD", world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(train, "RANK", rank)
        parts.append([seen(step, **settings) for step in range(4)])
        assert {len(x0) for x0, *_ in parts[-1]} <= {7 // world, 7 // world + 1}
    for step in range(4):
        for k, wanted in enumerate(whole[step]):
            assert torch.equal(torch.cat([part[step][k] for part in parts]), wanted)


# ---- Training: the loop ------------------------------------------------------------------------


class PlainSampler:
    """Timesteps uniformly, or by eq. 18 with a share of 0.001 uniform; written with lists."""

    def __init__(self, T, importance):
        self.T, self.importance, self.seen = T, importance, [[] for _ in range(T)]

    def sample(self, n, g):
        if not self.importance:
            return torch.randint(self.T, (n,), generator=g), torch.ones(n)
        p = torch.full((self.T,), 1 / self.T)
        if all(len(losses) >= 10 for losses in self.seen):
            root = torch.tensor([sum(x * x for x in s[-10:]) / 10 for s in self.seen]).sqrt()
            p = 0.999 * root / root.sum() + 0.001 / self.T
        t = torch.multinomial(p, n, replacement=True, generator=g)
        return t, 1 / (self.T * p[t])

    def update(self, t, losses):
        for one, loss in zip(t.tolist(), losses.tolist()):
            self.seen[one].append(loss)


def cosine_process(T):
    """β and ᾱ of the cosine schedule (eq. 17)."""
    f = torch.cos((torch.arange(T + 1).double() / T + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return beta, torch.cumprod(1 - beta, 0)


def paper_prior(config, x0):
    """The mean L_T of images in bits per dimension (eq. 7)."""
    last = cosine_process(config.T)[1][-1]
    p = Normal(last.sqrt() * x0.double(), (1 - last).sqrt())
    return (kl_divergence(p, Normal(0, 1)).mean() / math.log(2)).item()


def paper_losses(config, model, x0, t, y, noise):
    """The loss and T·L_t of each image by the paper's formulas, in float64."""
    T, (beta, alpha_bar) = config.T, cosine_process(config.T)
    before = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    small = beta * (1 - before) / (1 - alpha_bar)  # eq. 10
    small[0] = small[1]
    beta, small, a, before = (table[t][:, None, None, None] for table in (
        beta, small, alpha_bar, before))  # fmt: skip

    def posterior_mean(x0):  # eq. 11
        x0_part = before.sqrt() * beta / (1 - a) * x0
        return x0_part + (1 - beta).sqrt() * (1 - before) / (1 - a) * x_t

    x0, noise = x0.double(), noise.double()
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise  # eq. 9
    if config.low_res:
        side = config.image_size // config.low_res
        blocks = x0.unflatten(3, (-1, side)).unflatten(2, (-1, side)).mean((3, 5))
        out = model(x_t.float(), t.float() * 1000 / T, y, blocks.float()).double()
    else:
        out = model(x_t.float(), t.float() * 1000 / T, y).double()
    eps = out[:, :3]
    simple = ((noise - eps) ** 2).mean((1, 2, 3))  # eq. 14
    if config.objective == "hybrid":
        eps = eps.detach()
    if config.variance == "learned":  # eq. 15
        frac = (out[:, 3:] + 1) / 2
        std = (frac * beta.log() + (1 - frac) * small.log()).exp().sqrt()
    else:
        std = small.sqrt().expand_as(x_t)
    mean = posterior_mean((x_t - (1 - a).sqrt() * eps) / a.sqrt())
    kl = kl_divergence(Normal(posterior_mean(x0), small.sqrt()), Normal(mean, std))  # eq. 6
    p = Normal(mean, std)
    upper = torch.where(x0 > 0.999, 1, p.cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0, p.cdf(x0 - 1 / 255))
    nll = -(upper - lower).clamp(min=1e-300).log()  # eq. 5
    L = torch.where(t[:, None, None, None] == 0, nll, kl).mean((1, 2, 3)) / math.log(2)
    loss = {"simple": simple, "hybrid": simple + 0.001 * T * L, "vlb": T * L}[config.objective]
    return loss, T * L


def plain_training(config, state):
    """A run as the paper has it: AdamW without weight decay, clipping, EMA, all by hand -> the
    weights, their average, the losses of each t, and the log's rows (without skipped, seconds)."""
    with np.load("x.npz") as file:
        images, labels = file["arr_0"].transpose(0, 3, 1, 2), file["arr_1"]
    torch.manual_seed(config.seed)
    model = UNet(UNetConfig(**state["unet"]))
    weights = dict(model.named_parameters())
    average = {name: w.detach().clone() for name, w in weights.items()}
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    sampler = PlainSampler(config.T, config.t_sampler == "importance")
    rows, recent = [], []
    for k in range(1, config.steps + 1):
        x0, y, t, importance, noise = train.load_batch(
            config, images, labels, sampler, k - 1, torch.device("cpu")
        )
        loss, vlb = paper_losses(config, model, x0, t, y, noise)
        model.zero_grad()
        (importance * loss).mean().backward()
        norm = sum(w.grad.double().square().sum() for w in weights.values()).sqrt().item()
        clip = min(1, config.grad_clip / norm) if config.grad_clip else 1
        lr = config.lr * min(1, k / config.warmup) if config.warmup else config.lr
        decay = min(config.ema, k / (9 + k))
        with torch.no_grad():
            for name, w in weights.items():
                m[name] = 0.9 * m[name] + 0.1 * clip * w.grad
                v[name] = 0.999 * v[name] + 0.001 * (clip * w.grad) ** 2
                w -= lr * (m[name] / (1 - 0.9**k)) / ((v[name] / (1 - 0.999**k)).sqrt() + 1e-8)
                average[name] = decay * average[name] + (1 - decay) * w
        sampler.update(t, loss)
        recent.append([(importance * loss).mean().item(), (importance * vlb).mean().item(), norm])
        if k % config.log_every == 0 or k == config.steps:
            loss, bits, norm = np.mean(recent, axis=0)
            rows.append([k, loss, bits + paper_prior(config, x0), norm, lr])
            recent = []
    return dict(model=weights, ema=average, seen=sampler.seen, rows=rows)


def assert_is_plain_training(run):
    """A run's checkpoint and log are those of the plain loop, to the rounding of float32."""
    state = read_checkpoint(f"{run}/ckpt.pt")
    config = Namespace(**state["config"])
    plain = plain_training(config, state)
    for part in ("model", "ema"):
        for name, weights in plain[part].items():
            if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which Adam
                continue  # makes as large as any
            found = state[part][name]
            assert torch.allclose(found, weights, rtol=1e-4, atol=config.lr * 5e-3), (part, name)
    rows = [[float(x) for x in row] for row in log_without_times(run)[1:]]
    assert [row[:5] for row in rows] == [pytest.approx(row, rel=2e-5) for row in plain["rows"]]
    assert all(row[5] == 0 for row in rows)
    if config.t_sampler == "importance":
        assert state["t_sampler"]["counts"].tolist() == [len(s) for s in plain["seen"]]
        assert min(map(len, plain["seen"])) >= 10  # the weights were not 1 throughout
        assert len(plain["rows"]) > 1
    assert (state["model"]["out.2.weight"] != 0).all()  # as it was at first


@pytest.mark.parametrize(
    "flags",
    [
        "--objective simple --variance small --label-dropout 0.3 --seed 5 --steps 7",
        "--objective hybrid --accum 2 --grad-clip 0.5 --warmup 4 --t-sampler importance",
        "--objective vlb --accum 3 --warmup 100 --t-sampler importance --ema 0.9",
        "--objective vlb --warmup 100 --t-sampler importance --low-res 4 --no-flip --ema 0.6",
    ],
)
def test_training_is_the_plain_loop_of_the_paper(flags, with_arrays):
    # The average's decay ends with --ema for 0.3, and for 0.9 with the ramp of a short run.
    flags = f"--lr 0.01 --ema 0.3 --log-every 5 --steps 12 --out run {flags}"
    assert script("train.py", *SMALL, *HALVING, *flags.split()) == 0
    assert_is_plain_training("run")


def test_the_log_counts_the_prior_to_bits_per_dim(with_arrays, monkeypatch):
    flags = SMALL + "--steps 2 --log-every 1 --lr 0".split()
    assert script("train.py", *flags, "--out", "true") == 0
    monkeypatch.setattr(Diffusion, "prior", lambda self, x0: torch.full((len(x0),), 1000.0))
    assert script("train.py", *flags, "--out", "more") == 0
    for true, more in zip(log_without_times("true")[1:], log_without_times("more")[1:]):
        assert float(more[2]) - float(true[2]) == pytest.approx(1000, abs=0.1)
        assert more[:2] + more[3:] == true[:2] + true[3:]


def test_each_step_and_rank_has_its_own_dropout(monkeypatch):
    def drawn(seed, step, rank=0, world=1):
        monkeypatch.setattr(train, "RANK", rank)
        monkeypatch.setattr(train, "WORLD", world)
        train.seed_dropout(seed, step)
        return tuple(torch.rand(4).tolist())

    for world in (1, 3):
        ranks = [drawn(0, step, rank, world) for step in range(20) for rank in range(world)]
        assert len(set(ranks)) == len(ranks)
    assert drawn(0, 7) == drawn(0, 7) != drawn(1, 7)
    # Nor is it the noise of any step, which another generator draws from the same seed.
    noises = {tuple(torch.rand(4, generator=generator(0, i)).tolist()) for i in range(40)}
    assert not noises & {drawn(0, step) for step in range(40)}


def test_dropout_reaches_the_network_with_new_masks_at_each_step(with_arrays, monkeypatch):
    found, forward = [], torch.nn.Dropout.forward

    def record(self, h):
        out = forward(self, h)
        if self.training:
            found[-1].append(((out == 0) & (h != 0)).flatten().tolist())
        else:
            assert torch.equal(out, h)  # a grid is drawn without
        return out

    def batch(*given):
        found.append([])
        return load_batch(*given)

    load_batch = train.load_batch
    monkeypatch.setattr(train, "load_batch", batch)
    monkeypatch.setattr(torch.nn.Dropout, "forward", record)
    flags = SMALL + "--dropout 0.3 --steps 3 --seed 2".split()
    assert train_here(*flags, "--out", "run", "--sample-every", 2) == 0
    first = found.copy()
    masks = [mask for step in first for mask in step]
    assert len(first) == 3 and len({tuple(mask) for mask in masks}) == len(masks)
    values = np.concatenate(masks)
    assert abs(values.mean() - 0.3) < 5 * (0.3 * 0.7 / len(values)) ** 0.5
    found.clear()
    assert train_here(*flags, "--out", "again") == 0
    assert found == first


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ("--dtype bf16 --t-sampler importance --objective vlb", torch.bfloat16),
        ("--dtype fp16 --variance large --objective simple", torch.float16),
        ("--compile --dropout 0.1 --attention none --channel-mult 1", torch.float32),
    ],
)
def test_other_ways_to_compute(flags, dtype, with_arrays, monkeypatch):
    found, compiled, forward = set(), [], torch.nn.Conv2d.forward

    def record(self, x):
        out = forward(self, x)
        if "--compile" not in flags:
            found.add(out.dtype)
        return out

    def compile_eagerly(net):
        compiled.append(net)
        return torch._dynamo.optimize("eager", nopython=True)(net)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", record)
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    flags = "--steps 2 --log-every 1 --out run --lr 0.001".split() + flags.split()
    assert script("train.py", *SMALL, *HALVING, *flags) == 0
    assert len(compiled) == ("--compile" in flags)
    if not compiled:
        assert found == {dtype}
    state = read_checkpoint("run/ckpt.pt")
    assert ("scaler" in state) == (dtype == torch.float16)
    tensors = [*state["model"].values(), *state["ema"].values()]
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in tensors)
    assert not any("_orig_mod" in name for name in state["model"])
    load_checkpoint("run/ckpt.pt")
    assert all(float(row[1]) > 0 for row in log_without_times("run")[1:])


# ---- Training: the log, and resuming -----------------------------------------------------------


class Killed(BaseException):
    """What no handler of ours catches: all that is then on disk is what a kill leaves there."""


@contextlib.contextmanager
def at_step(step, act):
    """Call act() at the beginning of the update after `step` of them."""
    original = train.load_batch

    def load_batch(config, images, labels, t_sampler, now, device):
        if now == step:
            act()
        return original(config, images, labels, t_sampler, now, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_batch", load_batch)
        yield


def kill():
    raise Killed


def train_until_killed(step, *argv):
    """Train, and end the run at the beginning of an update as kill -9 would."""
    with at_step(step, kill):
        try:
            train_here(*argv)
        except Killed:
            gc.collect()  # the lock, which a killed process holds no more
            return
    raise AssertionError(f"the run made no update {step}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 updates with all that can be switched on: its folder."""
    folder = tmp_path_factory.mktemp("whole")
    make_npz(folder / "x.npz")
    assert script("train.py", *FULL, "--data", folder / "x.npz", "--steps", 9, "--out", folder) == 0
    return folder


def assert_is_the_same_run(one, other):
    assert_equal(read_checkpoint(f"{one}/ckpt.pt"), read_checkpoint(f"{other}/ckpt.pt"))
    assert log_without_times(one) == log_without_times(other)


def test_a_row_is_written_at_each_log_every_and_at_the_end(with_arrays):
    def note():
        with open("run/log.csv", "a") as file:
            file.write("what others wrote\n")

    with at_step(4, note):
        assert train_here(*SMALL, *"--steps 8 --log-every 3 --warmup 16 --out run".split()) == 0
    text = open("run/log.csv").read().splitlines()
    assert text[0] == "step,loss,bits_per_dim,grad_norm,lr,skipped,seconds"
    assert text.pop(2) == "what others wrote"  # a row is added; the file is not written anew
    rows = [[float(x) for x in row.split(",")] for row in text[1:]]
    assert [row[0] for row in rows] == [3, 6, 8]
    assert [row[4] for row in rows] == pytest.approx([1e-4 * n / 16 for n in (3, 6, 8)])
    seconds = [row[6] for row in rows]
    assert 0 <= seconds[0] <= seconds[1] <= seconds[2] < 60


@pytest.mark.parametrize("save_every, step", [(2, 5), (4, 7)])
def test_a_killed_run_resumes_to_the_bit(save_every, step, whole, with_arrays):
    flags = [*FULL, "--save-every", save_every, "--out", "run"]
    train_until_killed(step, *flags, "--steps", 9)
    saved = step // save_every * save_every
    assert read_checkpoint("run/ckpt.pt")["step"] == saved
    with open("run/log.csv", "a") as file:  # what a killed run may leave: one row, half of row 12
        file.write("9,1,2,3,4,0,5.0\n1")
    train_until_killed(saved + 1, "--out", "run", "--steps", 9)  # resumed, and killed at once
    rows = [int(row[0]) for row in log_without_times("run")[1:]]
    assert rows == [row for row in (3, 6) if row <= saved + 1]  # without those after the checkpoint
    assert train_here("--out", "run", "--steps", 9) == 0  # the flags are the run's
    assert_is_the_same_run("run", whole)


def test_seconds_go_on_from_the_checkpoint(with_arrays):
    assert script("train.py", *SMALL, "--steps", 1, "--out", "run") == 0
    state = read_checkpoint("run/ckpt.pt")
    assert 0 < state["seconds"] < 60
    save_checkpoint("run/ckpt.pt", state | {"seconds": 1000.0})
    assert script("train.py", "--steps", 2, "--log-every", 2, "--out", "run") == 0
    assert 1000 < read_checkpoint("run/ckpt.pt")["seconds"] < 1060
    assert 1000 <= float(open("run/log.csv").readlines()[-1].split(",")[6]) < 1060


def test_rows_that_are_not_the_logs_own_do_not_stop_a_run(with_arrays):
    flags = [*SMALL, "--log-every", 1, "--out", "run"]
    assert script("train.py", *flags, "--steps", 2) == 0
    head, one, two = open("run/log.csv").readlines()
    two = two.replace("2,", "2.0,", 1)  # as a spreadsheet may write it
    with open("run/log.csv", "w") as file:
        file.writelines([head, one, "a,b,c,d,e,f,g\n", "1,2\n", two, "9,1,1,1,1,1,1\n", "3,1,1"])
    assert script("train.py", *flags, "--steps", 3) == 0
    lines = open("run/log.csv").readlines()
    assert lines[:3] == [head, one, two] and lines[3].startswith("3,") and len(lines) == 4


def test_rows_with_something_before_their_number_are_left_out(with_arrays):
    flags = [*SMALL, "--log-every", 1, "--out", "run"]
    assert script("train.py", *flags, "--steps", 1) == 0
    with open("run/log.csv", "a") as file:
        file.write("#1,1,1,1,1,1,1\n")
    assert script("train.py", *flags, "--steps", 2) == 0
    assert [row[0] for row in log_without_times("run")] == ["step", "1", "2"]


def test_a_signal_in_the_last_update_ends_a_complete_run(with_arrays, capsys):
    with at_step(2, lambda: signal.raise_signal(signal.SIGTERM)):
        flags = [*SMALL, "--sample-every", 100, "--steps", 3, "--out", "run"]
        assert train_here(*flags) == 0
    assert os.listdir("run/samples") == ["0000003.png"]
    assert capsys.readouterr().out == "run/ckpt.pt\n"


KILLER = """
import os, random, signal, sys, time

sys.path.insert(0, sys.argv.pop(1))
sys.argv[0] = "train.py"
import train

for _ in range(2):
    child = os.fork()
    if child == 0:
        train.run_script(train.main)
        os._exit(0)
    begin = time.monotonic()
    while not os.path.exists("run/ckpt.pt") and time.monotonic() < begin + 60:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


KILLED = [*FULL, "--save-every", "1", "--steps", "24"]


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory, beside):
    folder = tmp_path_factory.mktemp("killed")
    make_npz(folder / "x.npz")
    return folder, beside.submit(run_python, folder, "-c", KILLER, ROOT, *KILLED, "--out", "run")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test needs fork")
def test_a_run_killed_at_random_moments_resumes_to_the_bit(killed_run, monkeypatch):
    folder, killing = killed_run
    killed = killing.result()
    assert killed.returncode == 0, killed.stderr
    assert "Error" not in killed.stderr and "error" not in killed.stderr
    monkeypatch.chdir(folder)
    assert os.path.exists("run/ckpt.pt")
    for run in ("run", "whole"):
        assert script("train.py", *KILLED, "--save-every", 24, "--out", run) == 0
    assert_is_the_same_run("run", "whole")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_stops_and_the_run_resumes_to_the_bit(name, whole, with_arrays, capsys):
    if not hasattr(signal, name):
        pytest.skip(f"no {name} on this system")
    number = getattr(signal, name)

    def unheard(*_):  # rather than to end pytest, if train.py does not listen to the signal
        raise RuntimeError(f"{name} was not handled")

    signal.signal(number, unheard)
    with at_step(4, lambda: signal.raise_signal(number)):
        flags = [*FULL, "--sample-every", 5, "--save-every", 1000, "--steps", 9]
        assert train_here(*flags, "--out", "run") == 128 + number
    out, err = capsys.readouterr()
    assert out == "" and err.count("stopping after this update") == 1
    assert err.endswith("\nsaved run/ckpt.pt after update 5 of 9\n")
    assert read_checkpoint("run/ckpt.pt")["step"] == 5
    assert os.listdir("run/samples") == []  # who stops a run does not wait for a grid
    assert train_here("--out", "run", "--sample-every", 0) == 0
    assert "\nresuming run after update 5 of 9\n" in capsys.readouterr().err
    assert_is_the_same_run("run", whole)


def test_the_other_ranks_wait_at_a_stop_until_the_checkpoint_is_written(with_arrays, monkeypatch):
    events, names = [], ("gather", "save_checkpoint")
    for name in names:

        def noted(*given, name=name, original=getattr(train, name)):
            events.append(name)
            return original(*given)

        monkeypatch.setattr(train, name, noted)
    with at_step(2, lambda: signal.raise_signal(signal.SIGTERM)):
        assert train_here(*SMALL, "--steps", 9, "--out", "run") == 128 + signal.SIGTERM
    assert events[-2:] == ["save_checkpoint", "gather"]


SIGNALLED = """
import signal

names = ("SIGINT", "SIGTERM", "SIGHUP")
for name in names:  # pytest may have been started by nohup, which ignores some
    signal.signal(getattr(signal, name), signal.SIG_DFL)
import train

for name in names:
    try:
        signal.raise_signal(getattr(signal, name))
    except SystemExit as end:
        print(end.code)
signal.raise_signal(signal.SIGTERM)
"""


@pytest.fixture(scope="module")
def signalled_starts(beside):
    return beside.submit(run_python, ROOT, "-c", SIGNALLED)


def test_signals_end_the_start_of_a_run_without_a_traceback(signalled_starts):
    ended = signalled_starts.result()
    assert ended.stdout.split() == ["130", "143", "129"], ended.stderr
    assert ended.returncode == 143 and not ended.stderr


def test_a_checkpoint_holds_the_means_of_all_ranks(tmp_path, monkeypatch):
    config = Namespace(out=str(tmp_path), steps=9)
    log = train.Log(config, {}, torch.device("cpu"))
    log.add(torch.tensor([1.0, 2.0]), torch.tensor(4.0))
    others = torch.tensor([[3.0, 6, 4, 1, 0, 0]])
    monkeypatch.setattr(train, "gather", lambda values: torch.cat([values, others]))
    state = log.state(7)
    assert state["step"] == 7 and state["sums"].tolist() == [2, 4, 4, 1, 0, 0]
    monkeypatch.undo()
    train.Log(config, state, torch.device("cpu")).write_row(8, 0.1, torch.tensor(0.5))
    assert (tmp_path / "log.csv").read_text().splitlines()[1].startswith("8,2,4.5,4,0.1,0,")


def test_a_row_says_how_long_the_rest_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    config, state = Namespace(out=str(tmp_path), steps=9000), dict(step=500, seconds=1000)
    log = train.Log(config, state, torch.device("cpu"))
    monkeypatch.setattr(time, "monotonic", lambda: 300.0)  # 1,200 s for 1,000 updates; 8,000 more
    log.write_row(1000, 0.1, torch.tensor(0.5))
    assert capsys.readouterr().err.endswith(" 1200 s, 2:40:00 left\n")


def test_a_row_counts_the_skipped_updates_once_for_all_ranks(tmp_path, monkeypatch):
    log = train.Log(Namespace(out=str(tmp_path), steps=9), {}, torch.device("cpu"))
    monkeypatch.setattr(train, "gather", lambda values: torch.cat([values, values]))
    for in_a_row in (99, 100):
        log.sums = torch.tensor([6.0, 9, 3, 3, 2, in_a_row])
        with pytest.raises(ValueError) if in_a_row == 100 else contextlib.nullcontext():
            log.write_row(5, 0.1, torch.tensor(0.5))
    for row in (tmp_path / "log.csv").read_text().splitlines()[1:]:
        assert row.startswith("5,2,3.5,1,0.1,2,")


def test_a_checkpoint_tells_for_guidance_how_often_labels_were_dropped(whole):
    assert read_checkpoint(whole)["unet"]["label_dropout"] == 0.3


def test_a_second_signal_stops_at_once_and_an_ignored_one_stays_ignored(monkeypatch):
    with command("train.py"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop = train.catch_signals()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, which torchrun passes on
        assert stop.tolist() == [signal.SIGINT]
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGINT)
        assert ended.value.code == 128 + signal.SIGINT


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), BrokenPipeError(errno.EPIPE, "Broken pipe"),
     RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")],
)  # fmt: skip
def test_a_terminal_that_is_gone_ends_no_run(error, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    with command("train.py"):
        stop = train.catch_signals()
        monkeypatch.setattr(sys, "stderr", Gone())
        train.say("a row of the log")
        signal.raise_signal(signal.SIGHUP)
        assert stop.tolist() == [signal.SIGHUP]


def test_ranks_that_differ_end_in_one_line(monkeypatch):
    model_file.agree(3, "images")
    monkeypatch.setattr(model_file, "gather", lambda number: torch.cat([number, number + 1]))
    with pytest.raises(ValueError, match="the ranks see different images"):
        model_file.agree(3, "images")
    one, other = small_unet(), small_unet()
    list(other.parameters())[-1].data[0] += 1e-6
    assert model_file.checksum(one) != model_file.checksum(other)


def test_ranks_compare_their_images_and_their_weights(place, monkeypatch, capsys):
    compared = []
    monkeypatch.setattr(train, "agree", lambda number, what: compared.append((number, what)))
    np.savez("x.npz", arr_0=X)
    assert train_here(*TINY, "--data", "x.npz", "--out", "run") == 0
    assert [number for number, _ in compared] == [0, len(X)]  # the update, and the images
    assert train_here(*"--eval-only --ckpt run --eval-calls 5 --device cpu".split()) == 0
    assert compared[2] == (
        model_file.checksum(load_checkpoint("run")[0]),
        "weights in run: the file has changed, start again",
    )
    assert compared[3][0] == len(X)


def test_a_finished_run_is_left_as_it_is(whole, with_arrays, capsys):
    files = [whole / "ckpt.pt", whole / "log.csv"]
    before = [file.read_bytes() for file in files]
    for steps in (9, 5):
        assert script("train.py", "--out", whole, "--steps", steps) == 0
        out, err = capsys.readouterr()
        assert out == f"{whole}/ckpt.pt\n"
        assert f"{whole} has made 9 updates: give a larger --steps to make more\n" in err
        assert "resuming" not in err
    assert [file.read_bytes() for file in files] == before


def test_a_run_of_the_first_version_resumes_to_the_bit(with_arrays):
    # It stored no label_dropout, low_res, spacing, class names; its log, as text, with each row of
    # log.csv, also at each checkpoint; and no sums since the last row.
    flags = [*FULL, "--label-dropout", 0, "--steps"]
    assert script("train.py", *flags, 6, "--out", "whole") == 0
    assert script("train.py", *flags, 3, "--out", "old") == 0
    state = read_checkpoint("old/ckpt.pt")
    config = {k: v for k, v in state["config"].items() if k not in ("label_dropout", "low_res")}
    config = {k: v for k, v in config.items() if k != "spacing"} | {"data": "gone/"}
    unet = {k: v for k, v in state["unet"].items() if k not in ("label_dropout", "low_res")}
    unet.pop("class_names")
    assert config["attention_resolutions"] == unet["attention_resolutions"] == (4,)
    parts = "format diffusion model ema optimizer t_sampler step seconds".split()
    old = {name: state[name] for name in parts} | {"log": open("old/log.csv").read()}
    torch.save(old | {"config": config, "unet": unet}, "old/ckpt.pt")
    assert script("train.py", "--out", "old", "--data", "x.npz", "--steps", 6) == 0
    assert_is_the_same_run("old", "whole")
    # The digits' preset has come to drop labels since: an old run of digits does not.
    config |= {"data": "digits", "out": "old"}
    torch.save(old | {"config": config, "unet": unet}, "old/ckpt.pt")
    resumed, *_ = train.configure(["--out", "old"])
    assert resumed.label_dropout == 0 and resumed.low_res is None
    assert {k: vars(resumed)[k] for k in config} == config


# ---- Training: what goes wrong -----------------------------------------------------------------


@contextlib.contextmanager
def nan_at(steps):
    """In the updates after these numbers of them, the noise of the first image is not a number."""
    original = train.load_batch

    def load_batch(config, images, labels, t_sampler, step, device):
        *batch, noise = original(config, images, labels, t_sampler, step, device)
        noise[0, 0, 0, 0] = math.nan if step in steps else noise[0, 0, 0, 0]
        return *batch, noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_batch", load_batch)
        yield


def test_an_update_without_finite_gradient_is_skipped_and_counted(with_arrays):
    flags = SMALL + "--t-sampler importance --lr 0.01 --ema 0.3 --out run --log-every".split()
    with nan_at({2, 3}):
        assert train_here(*flags, 1, "--steps", 2) == 0
        before = read_checkpoint("run/ckpt.pt")
        assert train_here(*flags, 1, "--steps", 3) == 0
        after = read_checkpoint("run/ckpt.pt")
        assert train_here(*flags, 1, "--steps", 5) == 0
        last = read_checkpoint("run/ckpt.pt")
        one_by_one = [[float(x) for x in row] for row in log_without_times("run")[1:]]
        assert train_here(*flags, 5, "--steps", 5, "--out", "again") == 0
    assert_equal(before["model"], after["model"])
    assert_equal(before["optimizer"]["state"], after["optimizer"]["state"])
    for name, average in before["ema"].items():  # the average goes on: to step 2, by 3/12
        mean = 0.25 * average + 0.75 * before["model"][name]
        assert torch.allclose(after["ema"][name], mean, atol=1e-6)
    # The losses of the other seven images are kept, but no loss that is not finite.
    counts = [state["t_sampler"]["counts"].sum() for state in (before, after, last)]
    assert counts == [16, 23, 38]
    assert last["t_sampler"]["losses"].isfinite().all()
    assert not torch.equal(after["model"]["out.2.weight"], last["model"]["out.2.weight"])
    assert all(w.isfinite().all() for w in [*last["model"].values(), *last["ema"].values()])
    # In the log: the means are those of the updates that were made.
    assert [row[5] for row in one_by_one] == [0, 0, 1, 1, 0]
    made = np.array([row[1:4] for row in one_by_one if row[5] == 0])
    assert (made > 0).all() and np.isfinite(made).all()
    (row,) = [[float(x) for x in row] for row in log_without_times("again")[1:]]
    assert row[5] == 2 and row[1:4] == pytest.approx(made.mean(0).tolist(), rel=1e-4)


def test_a_hundred_skipped_updates_in_a_row_end_the_run(with_arrays, capsys):
    flags = SMALL + "--batch 2 --log-every 10 --out run".split()
    # 40 in a row, one that is made, and then all of them, over two starts of the run.
    with nan_at({*range(1, 41), *range(42, 1000)}):
        assert train_here(*flags, "--steps", 60) == 0
        assert train_here(*flags, "--steps", 1000) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train.py: error: ") and lines[-1].count("--lr") == 1
    assert int(log_without_times("run")[-1][0]) == 150  # the first row after 42 + 100
    assert read_checkpoint("run/ckpt.pt")["step"] == 60


def test_the_average_keeps_no_graph_of_earlier_updates(with_arrays, monkeypatch):
    found, original = [], Diffusion.sample

    def sample(self, net, *given, **more):
        found.extend(net.parameters())
        return original(self, net, *given, **more)

    monkeypatch.setattr(Diffusion, "sample", sample)
    assert script("train.py", *SMALL, *"--steps 2 --sample-every 2 --out run".split()) == 0
    assert found and all(w.is_leaf and not w.requires_grad for w in found)


def test_fp16_halves_its_scale_until_gradients_are_finite_and_resumes_to_the_bit(with_arrays):
    flags = SMALL + "--dtype fp16 --dropout 0.1 --lr 0.01 --log-every 1 --out".split()
    assert script("train.py", *flags, "run", "--steps", 1) == 0
    first = read_checkpoint("run/ckpt.pt")
    assert first["scaler"]["scale"] == 2**16
    first["scaler"]["scale"] = 2.0**24
    for run in ("run", "parts"):
        os.makedirs(run, exist_ok=True)
        save_checkpoint(f"{run}/ckpt.pt", first)
    with open("run/log.csv") as log, open("parts/log.csv", "w") as copied:
        copied.write(log.read())
    assert script("train.py", "--out", "run", "--steps", 2) == 0  # the first is skipped
    assert_equal(read_checkpoint("run/ckpt.pt")["model"], first["model"])
    assert read_checkpoint("run/ckpt.pt")["scaler"]["scale"] == 2**23
    assert script("train.py", "--out", "run", "--steps", 10) == 0
    last = read_checkpoint("run/ckpt.pt")
    skipped = [row[5] for row in log_without_times("run")[2:]]
    k = skipped.count("1")
    assert 1 < k < 7 and skipped == ["1"] * k + ["0"] * (9 - k)
    assert last["scaler"]["scale"] == 2.0 ** (24 - k)
    assert all(w.isfinite().all() for w in last["model"].values())
    assert script("train.py", "--out", "parts", "--steps", k) == 0
    assert script("train.py", "--out", "parts", "--steps", 10) == 0
    assert_is_the_same_run("parts", "run")


def test_a_full_disk_costs_no_checkpoint(with_arrays, monkeypatch, capsys):
    assert script("train.py", *SMALL, *"--steps 3 --out run".split()) == 0
    before = open("run/ckpt.pt", "rb").read()

    def full(state, file):
        file.write(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left")

    monkeypatch.setattr(torch, "save", full)
    assert script("train.py", "--steps", 8, "--save-every", 4, "--out", "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: cannot write run/ckpt.pt")
    assert open("run/ckpt.pt", "rb").read() == before
    assert sorted(os.listdir("run")) == [".lock", "ckpt.pt", "log.csv", "samples"]


def test_a_second_run_in_the_same_directory_is_refused(with_arrays, capsys):
    os.mkdir("run")
    with open("run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert script("train.py", *SMALL, *"--steps 1 --out run".split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: another run is writing to run")
    assert os.listdir("run/samples") == [] and not os.path.exists("run/log.csv")
    assert script("train.py", *SMALL, *"--steps 1 --out run".split()) == 0  # it has ended


@pytest.mark.parametrize("reason", [None, errno.ENOLCK, errno.ENOSYS])
def test_where_nothing_can_be_locked_a_line_says_so_and_the_run_goes_on(
    reason, with_arrays, capsys, monkeypatch
):
    def flock(*_):
        raise OSError(reason, os.strerror(reason))

    if reason is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    assert train_here(*SMALL, *"--steps 1 --out run".split()) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "locked" in line]
    assert len(lines) == 1 and "run/.lock" in lines[0]
    assert reason is None or os.strerror(reason) in lines[0]
    assert read_checkpoint("run/ckpt.pt")["step"] == 1


WAITS = (
    "item tolist __bool__ __int__ __float__ __index__ __format__ __repr__ __contains__ cpu numpy"
    " __array__ nonzero equal"
).split()


def test_between_rows_the_host_does_not_wait_for_the_device(with_arrays, monkeypatch):
    # What makes the host wait on a GPU is asked of a tensor here as well. The first update is left
    # out, since the optimizer makes its state there; and the last, which writes.
    active, asked = [], collections.Counter()
    for name in WAITS:
        original = getattr(torch.Tensor, name)

        def counted(self, *given, _name=name, _original=original, **more):
            if active:
                asked[_name, tuple(self.shape), self.dtype] += 1
            return _original(self, *given, **more)

        monkeypatch.setattr(torch.Tensor, name, counted)
    flags = FULL + "--steps 12 --log-every 12 --save-every 12 --out run".split()
    with at_step(1, lambda: active.append(True)), at_step(11, active.clear):
        assert train_here(*flags) == 0
    order = ("numpy", (10,), torch.int64)  # of an epoch, drawn by the CPU
    assert asked.pop(order, 0) <= 10
    # The CPU's number of the signal to stop for, once an update.
    assert asked == {("__int__", (), torch.int64): 10}


# ---- Training: grids of samples ----------------------------------------------------------------


def cells_of_file(path, columns, size):
    """The images of a grid of enlarged pixels, one black line apart: uint8 (N, 3, size, size)."""
    zoom = max(1, 64 // size)
    pixels = np.asarray(Image.open(path))
    small = pixels[::zoom, ::zoom]
    assert (small.repeat(zoom, 0).repeat(zoom, 1) == pixels).all()
    rows = (len(small) + 1) // (size + 1)
    assert small.shape == (rows * (size + 1) - 1, columns * (size + 1) - 1, 3)
    between = np.ones(small.shape[:2], bool)
    places = [(r * (size + 1), c * (size + 1)) for r in range(rows) for c in range(columns)]
    for y, x in places:
        between[y : y + size, x : x + size] = False
    assert (small[between] == 0).all()
    images = np.stack([small[y : y + size, x : x + size] for y, x in places])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def drawn_by_hand(run, n, y, low_res=None):
    """What the averaged weights draw from the noise of images 0 … n-1, as uint8."""
    state = read_checkpoint(f"{run}/ckpt.pt")
    model = UNet(UNetConfig(**state["unet"])).eval()
    model.load_state_dict(state["ema"])
    generators = [generator(state["config"]["seed"], i) for i in range(n)]
    noise = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
    T, more = state["diffusion"]["T"], {} if low_res is None else {"low_res": low_res}
    few = dict(steps=min(25, T), min_alpha_bar=2 / 64, spacing=1.15)
    diffusion = Diffusion(**state["diffusion"], **few)

    def net(x, t, y):
        return model(x, t, y, **more)

    x = diffusion.sample(net, noise, y, method="ancestral", order=2, generators=generators)
    return ((x + 1) * 127.5).round().to(torch.uint8)


def assert_close(one, other):
    assert one.shape == other.shape
    assert (one.int() - other.int()).abs().max() <= 1


def test_a_grid_shows_what_the_averaged_weights_draw_and_changes_nothing(whole, with_arrays):
    assert script("train.py", *FULL, *"--steps 9 --sample-every 8 --out run".split()) == 0
    assert sorted(os.listdir("run/samples")) == ["0000008.png", "0000009.png"]
    found = cells_of_file("run/samples/0000009.png", 8, 8)
    assert_close(found, drawn_by_hand("run", 64, torch.arange(64) % 3))
    assert found.float().std(0).min() > 0  # the images differ, at each pixel
    assert_is_the_same_run("run", whole)


def test_a_grid_of_a_long_process_takes_25_steps(with_arrays):
    flags = "--T 60 --batch 32 --steps 2 --sample-every 9 --lr 0.01 --ema 0.1 --no-class-cond"
    assert script("train.py", *SMALL, *flags.split(), "--out", "run") == 0
    assert_close(cells_of_file("run/samples/0000002.png", 8, 8), drawn_by_hand("run", 64, None))


def test_an_upsamplers_grid_shows_small_drawn_true(with_arrays):
    flags = "--steps 3 --sample-every 3 --low-res 4 --lr 0.01 --batch 5 --out run".split()
    assert script("train.py", *SMALL, *flags) == 0
    tiles = cells_of_file("run/samples/0000003.png", 12, 8).view(16, 3, 3, 8, 8)
    small, found, true = tiles.unbind(1)
    with np.load("x.npz") as file:
        rows = np.arange(16) % 10
        images = torch.from_numpy(file["arr_0"].transpose(0, 3, 1, 2)[rows].copy())
        labels = torch.from_numpy(file["arr_1"][rows])
    assert (true == images).all()
    blocks = images.double().unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    assert_close(small, blocks.repeat_interleave(2, 2).repeat_interleave(2, 3).round())
    drawn = drawn_by_hand("run", 16, labels, (blocks / 127.5 - 1).float())
    assert_close(found, drawn)


def test_grids_are_drawn_after_the_checkpoint_in_parts_like_the_batchs(with_arrays, monkeypatch):
    found, original = [], Diffusion.sample

    @functools.cache
    def step_of(content):
        return torch.load(io.BytesIO(content))["step"]

    def sample(self, net, noise, *given, **more):
        found.append((len(noise), step_of(open("run/ckpt.pt", "rb").read())))
        return original(self, net, noise, *given, **more)

    monkeypatch.setattr(Diffusion, "sample", sample)
    flags = SMALL + "--low-res 4 --accum 3 --steps 4 --save-every 3 --out run".split()
    flags += ["--sample-every"]
    assert script("train.py", *flags, 0) == 0 and found == []
    assert os.listdir("run/samples") == []
    os.remove("run/ckpt.pt")
    assert script("train.py", *flags, 2) == 0
    for step in (2, 4):
        sizes = [n for n, saved in found if saved == step]
        assert sum(sizes) == 16 and max(sizes) <= 3  # of the batch's 8 images
    assert sorted(os.listdir("run/samples")) == ["0000002.png", "0000004.png"]
    draw_samples = train.draw_samples

    def of_two_ranks(*given):
        with monkeypatch.context() as patch:
            patch.setattr(train, "WORLD", 2)
            draw_samples(*given)

    monkeypatch.setattr(train, "draw_samples", of_two_ranks)
    found.clear()
    assert train_here(*flags, 2, "--steps", 5) == 0
    assert [n for n, _ in found] == [1] * 16  # of a rank's 4 images, in 3 parts


def test_a_grid_that_fails_is_a_line_and_changes_nothing(whole, with_arrays, monkeypatch, capsys):
    errors = [RuntimeError("CUDA out of memory.\nTried"), MemoryError("cannot allocate"),
              MemoryError(), OSError(errno.ENOSPC, "No space left on device"),
              torch.OutOfMemoryError("out of memory")]  # fmt: skip

    def fail(*_, **__):
        raise errors.pop(0)

    monkeypatch.setattr(Diffusion, "sample", fail)
    assert script("train.py", *FULL, *"--sample-every 2 --steps 9 --out run".split()) == 0
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "grid" in line]
    assert len(lines) == 5 and errors == []
    assert all(f"drawing run/samples/000000{n}.png\n" in err for n in (2, 4, 6, 8, 9))
    assert all(f"step {n}:" in line for n, line in zip((2, 4, 6, 8, 9), lines))
    assert os.listdir("run/samples") == []
    assert_is_the_same_run("run", whole)


# ---- Training: upsamplers, ranks ---------------------------------------------------------------


def test_an_upsampler_is_given_the_means_of_blocks_and_resumes(with_arrays, monkeypatch):
    given, batches, forward, load_batch = [], [], UNet.forward, train.load_batch

    def record(self, x, t, y=None, low_res=None):
        given.append(low_res)
        return forward(self, x, t, y, low_res)

    def remember(*arguments):
        batches.append(load_batch(*arguments))
        return batches[-1]

    monkeypatch.setattr(UNet, "forward", record)
    monkeypatch.setattr(train, "load_batch", remember)
    flags = SMALL + "--low-res 2 --accum 2 --lr 0.01 --no-class-cond --flip".split()
    assert train_here(*flags, "--steps", 4, "--out", "run") == 0
    x0 = torch.cat([batch[0] for batch in batches]).double()
    assert x0.shape == (32, 3, 8, 8)
    blocks = x0.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5))
    assert (torch.cat(given) - blocks).abs().max() < 1e-6
    assert read_checkpoint("run/ckpt.pt")["unet"]["low_res"] == 2
    assert train_here(*flags, "--steps", 2, "--out", "parts") == 0
    assert train_here("--steps", 4, "--out", "parts") == 0
    assert_equal(read_checkpoint("parts/ckpt.pt"), read_checkpoint("run/ckpt.pt"))


# What each of two ranks does. It writes the statuses of its runs to a file of its own.
RANKS = """
import json, os, signal, sys
from functools import lru_cache

root, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torch.distributed as dist
import train

train.pick_device = lru_cache(train.pick_device)  # the ranks join once for all runs
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
rank, statuses, load_batch = int(os.environ["RANK"]), {}, train.load_batch


def run(name, *more):
    sys.argv = ["train.py", *flags, *more]
    try:
        train.run_script(train.main)
    except SystemExit as stop:
        statuses[name] = stop.code
    else:
        statuses[name] = 0
    dist.barrier()


def stop_one_rank(config, images, labels, t_sampler, step, device):
    if step == 4 and rank == 1:
        signal.raise_signal(signal.SIGTERM)
    return load_batch(config, images, labels, t_sampler, step, device)


run("plain", "--out", "plain", "--dropout", "0", "--low-res", "4", "--steps", "10")
run("whole", "--out", "whole", "--steps", "9")
train.load_batch = stop_one_rank
run("stopped", "--out", "parts", "--steps", "9")
train.load_batch = load_batch
run("resumed", "--out", "parts", "--steps", "9")
if rank == 1:
    os.chdir("elsewhere")
run("elsewhere", "--out", "whole", "--steps", "12")
if rank == 1:
    os.chdir("..")
with open(f"statuses{rank}.json", "w") as file:
    json.dump(statuses, file)
run("endless", "--out", "endless", "--steps", "1000000", "--save-every", "1000000")
leave()
sys.exit(statuses["endless"])
"""


def run_two_ranks(folder):
    """Have two ranks of torchrun do the above in a folder, then send them SIGTERM."""
    (folder / "elsewhere").mkdir()
    make_npz(folder / "x.npz")
    make_npz(folder / "elsewhere" / "x.npz")
    (folder / "ranks.py").write_text(RANKS)
    flags = [*FULL, "--batch", "9", "--log-every", "5", "--save-every", "100"]
    with open(folder / "stderr", "w") as stderr:
        ranks = subprocess.Popen(
            [sys.executable, *TORCHRUN, "ranks.py", ROOT, *flags], cwd=folder, env=ENVIRONMENT,
            stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        log, begin = folder / "endless" / "log.csv", time.monotonic()
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            time.sleep(0.05)
            if time.monotonic() > begin + 120 or ranks.poll() is not None:
                break
        in_time = ranks.poll() is None and log.exists()
        ranks.send_signal(signal.SIGTERM)  # torchrun ends its ranks, after 30 s by force
        (folder / "status").write_text(str(ranks.wait(timeout=60)))
    assert in_time, (folder / "stderr").read_text()
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, beside):
    return beside.submit(run_two_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def ranks(two_ranks, monkeypatch):
    monkeypatch.chdir(two_ranks.result())
    return [json.load(open(f"statuses{rank}.json")) for rank in range(2)]


def test_two_ranks_with_parts_train_an_upsampler_as_the_plain_loop_does(ranks):
    assert [statuses["plain"] for statuses in ranks] == [0, 0]
    state = read_checkpoint("plain/ckpt.pt")
    assert state["config"]["accum"] == 2 and state["config"]["low_res"] == 4
    assert_is_plain_training("plain")
    assert script("train.py", "--out", "plain", "--steps", 12) == 0  # resumed by one rank
    assert_is_plain_training("plain")


def test_a_signal_to_one_rank_stops_both_and_they_resume_to_the_bit(ranks):
    assert [statuses["stopped"] for statuses in ranks] == [128 + signal.SIGTERM] * 2
    assert [statuses["whole"] for statuses in ranks] == [0, 0]
    assert [statuses["resumed"] for statuses in ranks] == [0, 0]
    assert_is_the_same_run("parts", "whole")


def test_ranks_that_see_different_checkpoints_are_refused(ranks):
    assert [statuses["elsewhere"] for statuses in ranks] == [2, 2]
    errors = open("stderr").read()
    assert "the ranks see different checkpoints: nodes must share --out" in errors
    assert "Traceback" not in errors.split("endless")[0]
    assert read_checkpoint("whole/ckpt.pt")["step"] == 9
    assert not os.path.exists("elsewhere/whole/ckpt.pt")


def test_torchrun_stops_its_ranks_with_a_checkpoint(ranks):
    assert open("status").read() == "1"  # torchrun's own
    errors = open("stderr").read()
    assert errors.split("out=endless")[1].count("stopping after this update") == 1
    state = read_checkpoint("endless/ckpt.pt")
    assert state["step"] >= 5 and not os.path.exists("endless/ckpt.pt.tmp")


# ---- Data --------------------------------------------------------------------------------------

TINY = (
    "--image-size 8 --channels 8 --channel-mult 1 --num-res-blocks 1 --attention none --num-heads 2"
    " --T 4 --batch 4 --device cpu --dtype fp32 --steps 1 --sample-every 0 --seed 5"
).split()
COLOURS = dict(red=(255, 0, 0), lime=(0, 255, 0), blue=(0, 0, 255), white=(255,) * 3)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    forget_arrays()
    return tmp_path


def forget_arrays():
    """x.npz of another folder must not be taken for that of this one."""
    for module in (train, model_file):
        getattr(module.load_npz, "cache_clear", int)()


def picture(path, colour="red", size=(8, 8), **how):
    """A picture of one colour."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Image.new("RGB", size, colour).save(path, **how)


def load(data, classes=False, size=8, out="run", network=None):
    """load_data -> the names of the colours of its pictures in order, the class of each."""
    config = Namespace(data=data, image_size=size, class_cond=classes, seed=0, out=out)
    images, labels, names = train.load_data(config, network)
    assert images.dtype == np.uint8 and images.shape[1:] == (3, size, size)
    colours = [image[:, size // 2, size // 2].astype(int) for image in images]
    near = [min(COLOURS, key=lambda c: abs(x - COLOURS[c]).sum()) for x in colours]
    return sorted(near), None if labels is None else [names[k] for k in labels]


def read(path, size=8):
    return train.read_image(".", size, path)


def errors(capsys):
    """The lines on stderr beside the configuration and what was found."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if not re.match(r"\w+=|[\d,]+ images|step \d", line)]


def test_a_line_says_what_was_found_left_out_and_not_looked_at(place, capsys):
    for path in ("p/dog/a.png", "p/dog/b.PNG", "p/cat/deep/er/c.jpg"):
        picture(path)
    open("p/dog/cut.png", "wb").write(open("p/dog/a.png", "rb").read()[:40])
    for name in ("notes.txt", "more.TXT", "x.csv", "README"):
        open(f"p/cat/{name}", "w").close()
    load("p", classes=True)
    line = "3 images in 2 classes: cat (0), dog (1); 1 left out: dog/cut.png (broken); "
    assert capsys.readouterr().err == line + "4 not looked at (.csv, .txt, no suffix)\n"
    load("p")
    line = "3 images; 1 left out: dog/cut.png (broken); 4 not looked at (.csv, .txt, no suffix)\n"
    assert capsys.readouterr().err == line
    os.remove("p/dog/cut.png")
    shutil.rmtree("p/cat")
    load("p")
    assert capsys.readouterr().err == "2 images\n"


def test_a_class_without_images_is_said_by_name(place, capsys):
    for i in range(8):
        picture(f"p/ant/{i}.png")
        for name in ("ant/broken", "owl/"):
            os.makedirs("p/owl", exist_ok=True)
            open(f"p/{name}{i}.png", "w").write("broken")
    os.makedirs("p/yak")
    os.makedirs("p/zoo")
    open("p/zoo/1.heic", "w").close()
    load("p", classes=True)
    line = capsys.readouterr().err
    assert line.startswith("8 images in 1 classes: ant (0); ") and "16 left out: " in line
    for name in ("owl", "yak", "zoo"):
        assert re.search(rf"\b{name}\b", line), name


def test_suffixes_by_the_hundred_do_not_flood_the_line(place, capsys):
    picture("p/1.png")
    for i in range(300):
        open(f"p/scan.{i:05}", "w").close()
    load("p")
    line = capsys.readouterr().err
    assert "300 not looked at" in line and len(line) < 300


def test_what_failed_is_tried_again_at_each_start(place, capsys, monkeypatch):
    os.makedirs("p")
    os.symlink("../far/x.png", "p/x.png")
    with pytest.raises(ValueError, match=r"no readable image there; 1 left out: x.png \(No such"):
        load("p")
    picture("far/x.png", "blue")
    assert load("p")[0] == ["blue"]
    picture("p/y.png", "red")
    locked, opened = True, Image.open

    def refuse(path, *more):
        if locked and str(path).endswith("y.png"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *more)

    monkeypatch.setattr(Image, "open", refuse)
    for _ in range(2):
        capsys.readouterr()
        assert load("p")[0] == ["blue"]
        assert capsys.readouterr().err == "1 images; 1 left out: y.png (Permission denied)\n"
    locked = False  # the file itself has not changed
    assert load("p")[0] == ["blue", "red"]
    assert capsys.readouterr().err == "2 images\n"


def test_the_second_start_decodes_nothing(place, monkeypatch):
    for colour in COLOURS:
        picture(f"p/{colour}.png", colour)
    first = load("p")
    with monkeypatch.context() as patch:
        patch.setattr(train, "read_image", lambda *given: pytest.fail("decoded again"))
        assert load("p") == load("./p/") == first
    shutil.rmtree("data")  # the cache may be deleted at any time
    assert load("p") == first


def test_files_added_removed_and_changed_are_noticed_also_behind_links(place):
    picture("p/a.png", "red")
    picture("far/b.png", "lime")
    picture("far/c.png", "lime")
    os.makedirs("p/sub")
    os.symlink("../far/b.png", "p/b.png")
    os.symlink("../../far", "p/sub/all")
    assert load("p")[0] == ["lime", "lime", "lime", "red"]
    picture("p/d.bmp", "blue")
    assert load("p")[0] == ["blue", "lime", "lime", "lime", "red"]
    os.remove("p/a.png")
    assert load("p")[0] == ["blue", "lime", "lime", "lime"]
    size = os.path.getsize("p/d.bmp")
    picture("p/d.bmp", "red")  # of the same size, a minute later
    assert os.path.getsize("p/d.bmp") == size
    os.utime("p/d.bmp", (0, os.path.getmtime("p/d.bmp") + 60))
    assert load("p")[0] == ["lime", "lime", "lime", "red"]
    picture("far/b.png", "white", (9, 9))  # the target of a link, and what lies in a linked folder
    assert load("p")[0] == ["lime", "red", "white", "white"]
    os.remove("p/b.png")
    os.symlink("../far/c.png", "p/b.png")
    assert load("p")[0] == ["lime", "lime", "red", "white"]


def test_a_change_that_keeps_size_and_time_is_noticed(place):
    for colour in ("red", "lime", "blue"):  # as from an archive whose files all have one date
        picture(f"far/{colour}.bmp", colour)
        os.utime(f"far/{colour}.bmp", (10**9, 10**9))
    os.makedirs("p")
    os.symlink("../far/red.bmp", "p/a.bmp")
    assert load("p")[0] == ["red"]
    os.remove("p/a.bmp")
    os.symlink("../far/lime.bmp", "p/a.bmp")
    assert load("p")[0] == ["lime"]
    shutil.copy2("far/blue.bmp", "far/lime.bmp")
    assert load("p")[0] == ["blue"]


def test_two_folders_of_one_name_and_two_sizes_are_kept_apart(place):
    for root, colour in (("A", "red"), ("B", "lime")):
        picture(f"{root}/train/0.bmp", colour)
        os.utime(f"{root}/train/0.bmp", (10**9, 10**9))
    for _ in range(2):
        assert load("A/train")[0] == ["red"] and load("B/train")[0] == ["lime"]
        assert load("A/train", size=16)[0] == ["red"]
    os.symlink("A", "link")
    assert load("link/train")[0] == ["red"]
    os.remove("link")
    os.symlink("B", "link")
    assert load("link/train")[0] == ["lime"]


def chunk(name, data):
    crc = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + crc


def png(colour_type, depth, values, before=b""):
    """A PNG of 8×8 pixels, each with these values, written by hand."""
    row = b"\0" + 8 * struct.pack(">" + len(values) * {8: "B", 16: "H"}[depth], *values)
    head = struct.pack(">IIBBBBB", 8, 8, depth, colour_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(8 * row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + data + chunk(b"IEND", b"")


def put(path, data):
    with open(path, "wb") as file:
        file.write(data)


C = (200, 100, 50)
ONE = Image.new("RGB", (8, 8), C)
PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 0, *C])
DEEP = np.full((8, 8), 100 * 257, np.uint16)
OTHER = dict(save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
OVER_WHITE = tuple(round(255 + (c - 255) * 51 / 255) for c in C)  # alpha 51 of 255

# A file, how it is made, and the colour that each of its pixels has for the eye.
PICTURES = {
    "rgb.png": (lambda f: ONE.save(f), C),
    "rgb.jpg": (lambda f: ONE.save(f, quality=100, subsampling=0), C),
    "rgb.webp": (lambda f: ONE.save(f, lossless=True), C),
    "rgb.jp2": (lambda f: ONE.save(f), C),
    "grey.png": (lambda f: Image.new("L", (8, 8), 90).save(f), (90,) * 3),
    "bilevel.png": (lambda f: Image.new("1", (8, 8), 1).save(f), (255,) * 3),
    "palette.png": (lambda f: PALETTE.save(f), C),
    "palette.gif": (lambda f: PALETTE.save(f), C),
    "ycbcr.tif": (lambda f: ONE.convert("YCbCr").save(f), C),
    "cmyk.jpg": (lambda f: ONE.convert("CMYK").save(f, quality=100), C),
    "cmyk.tif": (lambda f: ONE.convert("CMYK").save(f), C),
    "lab.tif": (lambda f: Image.new("LAB", (8, 8), (128, 128, 128)).save(f), (119,) * 3),
    "deep.png": (lambda f: Image.fromarray(DEEP).save(f), (100,) * 3),
    "deep.tif": (lambda f: Image.fromarray(DEEP).save(f), (100,) * 3),
    "motorola.tif": (lambda f: Image.fromarray(DEEP.astype(">u2")).save(f), (100,) * 3),
    "deep.pgm": (
        lambda f: put(f, b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes()), (100,) * 3,
    ),
    "deeprgb.png": (lambda f: put(f, png(2, 16, [c * 257 for c in C])), C),
    "alpha.png": (lambda f: Image.new("RGBA", (8, 8), (*C, 51)).save(f), OVER_WHITE),
    "opaque.png": (lambda f: Image.new("RGBA", (8, 8), (*C, 255)).save(f), C),
    "greyalpha.png": (lambda f: Image.new("LA", (8, 8), (0, 51)).save(f), (204,) * 3),
    "clear.webp": (lambda f: Image.new("RGBA", (8, 8), 0).save(f, lossless=True), (255,) * 3),
    "key.png": (lambda f: ONE.save(f, transparency=C), (255,) * 3),
    "otherkey.png": (lambda f: ONE.save(f, transparency=(1, 2, 3)), C),
    "greykey.png": (lambda f: Image.new("L", (8, 8), 90).save(f, transparency=90), (255,) * 3),
    "deepkey.png": (
        lambda f: put(f, png(0, 16, [25700], chunk(b"tRNS", struct.pack(">H", 25700)))),
        (255,) * 3,
    ),
    "clearpalette.png": (lambda f: PALETTE.save(f, transparency=1), (255,) * 3),
    "clearpalette.gif": (lambda f: PALETTE.save(f, transparency=1), (255,) * 3),
    "halfpalette.png": (lambda f: PALETTE.save(f, transparency=bytes([0, 51])), OVER_WHITE),
    "animated.gif": (lambda f: ONE.save(f, **OTHER), C),
    "animated.webp": (lambda f: ONE.save(f, lossless=True, **OTHER), C),
    "animated.png": (lambda f: ONE.save(f, **OTHER), C),
    "pages.tif": (lambda f: ONE.save(f, **OTHER), C),
    "photo.mpo": (lambda f: ONE.save(f, quality=100, **OTHER), C),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_each_kind_of_picture_is_read_in_its_colours_and_none_goes_unseen(name, place, recwarn):
    make, colour = PICTURES[name]
    os.makedirs("p")
    make(f"p/{name}")
    if name == "ycbcr.tif":  # Pillow 12 writes such a file, but does not read it
        with Image.open(f"p/{name}") as image, contextlib.suppress(OSError):
            image.load()
            name = None
        if name:
            pytest.skip("this Pillow does not read it")
    config = Namespace(data="p", image_size=8, class_cond=False, seed=0, out="run")
    images = train.load_data(config)[0]
    assert abs(images[0].astype(int) - np.reshape(colour, (3, 1, 1))).max() <= 2
    assert not recwarn.list  # a user would see it among the messages


def test_channels_rows_and_columns_keep_their_order_and_the_centre_is_taken(place):
    wide = np.zeros((8, 24, 3), np.uint8)
    for x, colour in enumerate(["red"] * 8 + ["red", "lime", "blue", "white"] * 2 + ["blue"] * 8):
        wide[:, x] = COLOURS[colour]
    wide[0] = 7  # the upper row
    Image.fromarray(wide).save("wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save("tall.png")
    centre = wide[:, 8:16].transpose(2, 0, 1)
    assert (read("wide.png") == centre).all()
    assert (read("tall.png") == centre.transpose(0, 2, 1)).all()
    # Made smaller: each pixel is near the mean of those that it stands for.
    y, x = np.mgrid[:256, :256]
    slope = np.stack([y * 0.9, x * 0.8, 250 - (x + y) * 0.4], 2).astype(np.uint8)
    Image.fromarray(slope).save("large.png")
    Image.fromarray(slope).save("large.jpg", quality=100, subsampling=0)
    mean = slope.reshape(8, 32, 8, 32, 3).mean((1, 3)).transpose(2, 0, 1)
    for name in ("large.png", "large.jpg"):
        assert abs(read(name) - mean)[:, 1:-1, 1:-1].max() < 2, name
    picture("dot.png", "lime", (1, 1))
    assert (read("dot.png") == np.reshape([0, 255, 0], (3, 1, 1))).all()
    picture("long.png", "blue", (9000, 1))
    assert (read("long.png") == np.reshape([0, 0, 255], (3, 1, 1))).all()


# What stands upper left, upper right, lower left, lower right of a picture stored as RGBK, if EXIF
# says where its row 0 and column 0 are: 1 top left, 2 top right, 3 bottom right, 4 bottom left, 5
# left top, 6 right top, 7 right bottom, 8 left bottom.
TURNED = "RGBK GRKB KBGR BKRG RBGK BRKG KGBR GKRB".split()


def corners():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8, 0] = pixels[:8, 8:, 1] = pixels[8:, :8, 2] = 255
    return Image.fromarray(pixels)


def corners_in(path):
    x = read(path, 16)
    assert not isinstance(x, str), x
    places = [x[:, i, j] for i in (3, 12) for j in (3, 12)]
    return "".join("RGB"[p.argmax()] if p.max() > 128 else "K" for p in places)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_turns_a_picture_in_all_eight_ways(suffix, place):
    how = {"jpg": dict(quality=100, subsampling=0), "webp": dict(lossless=True)}.get(suffix, {})
    for orientation, expected in enumerate(TURNED, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        corners().save(f"x.{suffix}", exif=exif, **how)
        assert corners_in(f"x.{suffix}") == expected, orientation


def exif_with(*entries):
    """EXIF, big-endian, of these entries: (tag, type, count, 4 bytes)."""
    body = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)


def test_damaged_exif_and_long_notes_cost_no_picture(place, recwarn):
    turn = (0x0112, 3, 1, b"\0\x06\0\0")
    far = (0x011A, 5, 1, b"\0\xff\0\0")  # a fraction that lies beyond the end
    best = dict(quality=100, subsampling=0)
    with io.BytesIO() as file:
        corners().save(file, format="png")
        whole = file.getvalue()
    corners().save("turned.jpg", exif=b"Exif\0\0" + exif_with(turn), **best)
    assert corners_in("turned.jpg") == "BRKG"
    for name, exif in dict(
        far=exif_with(turn, far), nine=exif_with((0x0112, 3, 1, b"\0\x09\0\0")), zero=bytes(9),
        text=exif_with((0x0112, 2, 4, b"six\0")), cut=exif_with(turn, turn)[:25], none=b"",
        many=exif_with((0x0112, 3, 9999, b"\0\xff\0\0")),
    ).items():  # fmt: skip
        corners().save(f"{name}.jpg", exif=b"Exif\0\0" + exif, **best)
        assert corners_in(f"{name}.jpg") in ("RGBK", "BRKG"), name
        put(f"{name}.png", whole[:33] + chunk(b"eXIf", exif) + whole[33:])
        assert corners_in(f"{name}.png") in ("RGBK", "BRKG"), name
    notes = PngInfo()
    for i in range(40):
        notes.add_text(f"z{i}", "x" * 2**21, zip=True)
    notes.add_itxt("i", "é" * 2**21, zip=True)
    corners().save("notes.png", pnginfo=notes)
    corners().save("profile.png", icc_profile=bytes(3 * 2**20))
    assert corners_in("notes.png") == corners_in("profile.png") == "RGBK"
    recwarn.clear()
    assert len(load(".")[0]) == len(os.listdir(".")) - 1  # all but data/
    assert not recwarn.list


def test_a_large_jpeg_is_decoded_at_twice_the_size_at_least(place):
    picture("x.jpg", size=(256, 256))
    assert model_file.read_picture("x.jpg", 32).size == (64, 64)
    assert model_file.read_picture("x.jpg").size == (256, 256)


def test_files_that_cannot_be_read_are_refused_by_the_right_word(place):
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("whole.png")
    Image.fromarray(noise).save("whole.jpg")
    for name in ("png", "jpg"):
        whole = open(f"whole.{name}", "rb").read()
        open(f"cut.{name}", "wb").write(whole[: len(whole) // 2])
        assert read(f"cut.{name}") == "broken"
    open("empty.png", "w").close()
    open("text.png", "w").write("no picture")
    assert read("empty.png") == read("text.png") == "broken"
    Image.fromarray(np.full((8, 8), 100, np.int32)).save("i.tif")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save("f.tif")
    assert "32 bits" in read("i.tif") and "32 bits" in read("f.tif")
    assert read("nowhere.png") == "No such file or directory"
    os.makedirs("p")
    os.symlink("loop.png", "p/loop.png")
    os.mkfifo("p/fifo.png")  # to open it would wait for ever
    picture("p/folder.png/a.png", "lime")
    assert load("p")[0] == ["lime"]


def test_special_files_are_named(place, capsys):
    picture("p/a.png")
    os.symlink("loop.png", "p/loop.png")
    os.mkfifo("p/fifo.png")
    os.symlink("nowhere.png", "p/gone.png")
    load("p")
    line = capsys.readouterr().err
    assert line.startswith("1 images; 3 left out: fifo.png (") and "file" in line
    assert "gone.png (No such file or directory)" in line and "loop.png (Too many levels" in line


def test_hidden_names_are_skipped(place, capsys):
    picture("p/cat/a.png")
    for path in ("p/.ipynb_checkpoints/b.png", "p/cat/.c.png", "p/cat/.thumbs/d.png"):
        picture(path, "blue")
    assert load("p", classes=True) == (["red"], ["cat"])
    assert capsys.readouterr().err == "1 images in 1 classes: cat (0)\n"


def test_links_are_followed_at_any_depth_and_loops_are_cut(place):
    picture("far/cat/1.png", "red")
    picture("far/dog/2.png", "blue")
    os.makedirs("p/a/deep")
    os.makedirs("p/b/deep")
    os.symlink("../../../far/cat", "p/a/deep/cat")
    os.symlink(os.path.abspath("far/dog"), "p/b/deep/dog")
    os.symlink("far", "linked")  # no part of p
    assert load("p", classes=True) == (["blue", "red"], ["a", "b"])
    for link, target in {
        "p/a/deep/self": ".", "p/a/up": "..", "p/b/root": os.path.abspath("p"), "p/b/a": "../a",
        "p/a/b": "../b", "p/b/deep/out": "../../..", "far/cat/back": os.path.abspath("p"),
    }.items():  # fmt: skip
        os.symlink(target, link)
    # Each class shows what its links lead to, once: a has both pictures, and so has b.
    colours, classes = load("p", classes=True)
    assert colours == ["blue", "blue", "red", "red"] and classes == ["a", "a", "b", "b"]
    os.symlink("p", "again")
    assert load("again", classes=True)[1] == ["a", "a", "b", "b"]


def test_a_link_out_of_the_folder_to_one_that_contains_it_is_not_entered(place):
    picture("p/cat/1.png", "red")
    picture("other/2.png", "blue")
    os.symlink("../..", "p/cat/out")
    assert load("p")[0] == ["red"]


@pytest.mark.parametrize("out", ["runs/x", "sub/run", "."])
def test_a_run_never_trains_on_what_runs_have_drawn(out, place, capsys):
    picture("a.png")
    picture("sub/b.png")
    picture("old/samples/0000001.png")  # another run
    open("old/ckpt.pt", "w").close()
    flags = [*TINY, "--batch", 64, "--sample-every", 1, "--data", ".", "--out", out, "--steps"]
    for steps in (1, 2, 3):
        assert train_here(*flags, steps) == 0
        line = re.search(r"(\d+) images(.*)", capsys.readouterr().err)
        assert line[1] == "2" and "old (a run)" in line[2] and line[2].count("(a run)") == 1
    assert len(os.listdir(f"{out}/samples")) == 3


def test_strange_names_are_names(place, capsys):
    names = ['cat, "x"', "new\nline", "[a-z]*", "😀", "l" * 250, "trailing ", "%s", "-rf", "=(0)"]
    names = [os.fsencode(name) for name in names] + [b"\xff\xfe"]
    for name in names:
        path = os.path.join(b"p", name)
        os.makedirs(path)
        for file in (b"\xff.png", b"new\nline.png", b'a b,"[x]*.png', b"n" * 251 + b".png"):
            with open(os.path.join(path, file), "wb") as new:
                ONE.save(new, format="png")
        open(os.path.join(path, b"\xfe\n.png"), "w").close()
        open(os.path.join(path, b"x.\xfe\n"), "w").close()
    for steps in (1, 2):  # decoded, and from the cache
        assert train_here(*TINY, "--data", "p", "--class-cond", "--steps", steps) == 0
        lines = capsys.readouterr().err.splitlines()
        (at,) = [k for k, line in enumerate(lines) if line.startswith("40 images in 10 classes: ")]
        assert "10 left out: " in lines[at] and "10 not looked at" in lines[at]
        assert lines[at + 1].startswith(("step ", "resuming "))  # so all this is one line
    unet = read_checkpoint("runs/p/ckpt.pt")["unet"]
    assert len(set(unet["class_names"])) == 10
    assert {"[a-z]*", "😀", "%s", "=(0)"} < set(unet["class_names"])


@pytest.fixture
def nobody(monkeypatch):
    """A folder to work in as a user who may not read everything, as root may."""
    folder = os.path.realpath(tempfile.mkdtemp())
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    picture("p/first/a.png")  # as long as all modules can be imported
    load("p")
    shutil.rmtree("data")
    root = os.geteuid() == 0
    if root:
        for path in (".", "p", "p/first", "p/first/a.png"):
            os.chown(path, 65534, 65534)
        os.setresuid(65534, 65534, 0)
    yield folder
    if root:
        os.setresuid(0, 0, 0)
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o755)
    shutil.rmtree(folder)


def test_files_and_folders_that_may_not_be_read_are_named(nobody, capsys):
    picture("p/cat/b.png", "blue")
    picture("p/dog/c.png", "lime")
    os.chmod("p/dog/c.png", 0)
    os.chmod("p/cat", 0)
    for _ in range(2):
        capsys.readouterr()
        assert load("p", classes=True) == (["red"], ["first"])
        line = capsys.readouterr().err
        assert "2 left out: " in line
        assert "cat (Permission denied)" in line and "dog/c.png (Permission denied)" in line
    os.chmod("p/dog/c.png", 0o644)
    os.chmod("p/cat", 0o755)
    assert load("p", classes=True)[0] == ["blue", "lime", "red"]
    os.chmod("p", 0)
    with pytest.raises(OSError, match="Permission denied: 'p/'"):
        load("p")
    os.chmod("p", 0o755)


@pytest.mark.parametrize("case", ["folder", "data", "cache"])
def test_where_data_cache_cannot_be_written_a_line_names_it(case, nobody, capsys):
    os.mkdir("shared")
    os.mkdir("runs")
    if case == "data":  # the folder can be written, but data/ leads to one that cannot
        os.chmod("shared", 0o555)
        os.symlink("shared", "data")
    elif case == "cache":  # made by someone else
        os.makedirs("data/cache")
        os.chmod("data/cache", 0o555)
    else:
        os.chmod(".", 0o555)
    assert train_here(*TINY, "--data", "p", "--out", "runs/x") == 1
    assert re.search("train.py: error: data.*: Permission denied$", errors(capsys)[-1])
    os.chmod(".", 0o755)


def test_a_cache_that_may_only_be_read_is_used(nobody):
    assert load("p") == (["red"], None)
    os.chmod("data/cache", 0o555)
    assert load("p") == (["red"], None)


# ---- Arrays, CIFAR-10, digits ------------------------------------------------------------------


def arrays(n=6, size=8):
    return np.random.default_rng(n).integers(256, size=(n, size, size, 3), dtype=np.uint8)


def classes_of(data="x.npz", network=None):
    forget_arrays()
    config = Namespace(data=data, image_size=8, class_cond=True, seed=0, out="run")
    images, labels, names = train.load_data(config, network)
    return images, [names[k] for k in labels], names


def test_arrays_are_read_with_their_labels(place):
    pixels, labels = arrays(), np.array([10, 2, 2, 1, 10, 0])
    np.savez("x.npz", arr_0=pixels, arr_1=labels)
    images, found, names = classes_of()
    assert (images == pixels.transpose(0, 3, 1, 2)).all()
    assert found == [str(k) for k in labels] and names == ("0", "1", "2", "10")
    for other in (labels.astype(np.uint8), labels.astype(str)):
        np.savez("x.npz", images=pixels, labels=other)  # the other names of both
        assert classes_of()[1:] == (found, names), other.dtype
    labels = np.array([1, 0, 2, 2, 1, 0])
    np.savez_compressed("x.npz", arr_0=pixels, arr_1=labels, class_names=np.array(list("cab")))
    assert classes_of()[1:] == (list("acbbac"), ("a", "b", "c"))
    np.savez("x.npz", arr_0=pixels, meta=np.array([{}], dtype=object))  # which nobody needs
    config = Namespace(data="x.npz", image_size=8, class_cond=False, seed=0, out="run")
    forget_arrays()
    assert train.load_data(config)[1:] == (None, None)


X = arrays()
BAD_ARRAYS = {
    "float": (dict(arr_0=X / 255), "float64"),
    "channels first": (dict(arr_0=X.transpose(0, 3, 1, 2)), r"\(6, 3, 8, 8\)"),
    "grey": (dict(arr_0=X[..., 0]), r"\(6, 8, 8\)"),
    "alpha": (dict(arr_0=np.concatenate([X, X[..., :1]], 3)), r"\(6, 8, 8, 4\)"),
    "not square": (dict(arr_0=X[:, :4]), r"\(6, 4, 8, 3\)"),
    "one image": (dict(arr_0=X[0]), r"\(8, 8, 3\)"),
    "no image": (dict(arr_0=X[:0]), r"\(0, 8, 8, 3\)"),
    "a number": (dict(arr_0=np.uint8(3)), "arr_0"),
    "labels only": (dict(arr_1=np.arange(6)), "no (arr_0|images)"),
    "others": (dict(pictures=X), "pictures"),
    "too few labels": (dict(arr_0=X, arr_1=np.arange(5)), r"labels.*\(5,\)"),
    "too many labels": (dict(arr_0=X, arr_1=np.arange(7)), r"labels.*\(7,\)"),
    "one-hot labels": (dict(arr_0=X, arr_1=np.eye(6)), r"labels.*\(6, 6\)"),
    "one label": (dict(arr_0=X, arr_1=np.array(3)), r"labels.*\(\)"),
    "fractions": (dict(arr_0=X, arr_1=np.arange(6) / 4), "labels"),
    "no numbers": (dict(arr_0=X, arr_1=np.full(6, np.nan)), "labels"),
    "objects": (dict(arr_0=X, arr_1=np.array(list("abcde") + [1], dtype=object)), "arr_1|labels"),
    "too few names": (
        dict(arr_0=X, arr_1=np.arange(6), class_names=np.array(["a", "b"])), "class_names"
    ),
    "no such name": (
        dict(arr_0=X, arr_1=np.array([0, 1, -1, 0, 1, 0]), class_names=np.array(["a", "b"])),
        "class_names",
    ),
    "one name": (dict(arr_0=X, arr_1=np.arange(6), class_names=np.array("cat")), "class_names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_wrong_arrays_are_refused_in_one_line(case, place, capsys):
    content, words = BAD_ARRAYS[case]
    np.savez("x.npz", **content)
    assert train_here(*TINY, "--data", "x.npz", "--class-cond") in (1, 2)
    (line,) = errors(capsys)
    assert line.startswith("train.py: error: ") and "x.npz" in line and re.search(words, line)
    assert not os.path.exists("runs/x/ckpt.pt") and not os.path.exists("runs/x/log.csv")


def test_damaged_arrays_are_refused_in_one_line(place, capsys):
    np.savez("x.npz", arr_0=X, arr_1=np.arange(6))
    whole = open("x.npz", "rb").read()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    array = io.BytesIO()
    np.save(array, X)
    for content in (b"", b"text", whole[: len(whole) // 2], bytes(flipped), pickle.dumps(X),
                    array.getvalue()):  # fmt: skip
        open("x.npz", "wb").write(content)
        forget_arrays()
        assert train_here(*TINY, "--data", "x.npz") == 2
        (line,) = errors(capsys)
        assert line.startswith("train.py: error: x.npz ")
    os.remove("x.npz")
    forget_arrays()
    assert train_here(*TINY, "--data", "x.npz") in (1, 2)
    (line,) = errors(capsys)
    assert "x.npz" in line and os.listdir() == []


def test_the_size_of_arrays_is_taken_unless_another_is_given(place, capsys):
    np.savez("x.npz", arr_0=arrays(3, 16))
    flags = [flag for flag in TINY if flag not in ("--image-size",)]
    flags.remove("8")
    assert train.configure([*flags, "--data", "x.npz"])[0].image_size == 16
    assert train_here(*TINY, "--data", "x.npz") == 2
    (line,) = errors(capsys)
    assert "--data x.npz has 16 pixels a side, and --image-size is 8" in line
    np.savez("y.npz", arr_0=X)
    np.savez("z.npz", arr_0=X, arr_1=np.arange(6))
    for name, flags, found in (
        ("y", (), "6 images\n"), ("z", (), "6 images; the labels are for --class-cond\n"),
        ("z", ("--class-cond",), "6 images in 6 classes: 0 (0), 1 (1)"),
    ):  # fmt: skip
        out = name + "".join(flags)
        assert train_here(*TINY, "--data", f"{name}.npz", *flags, "--out", out) == 0
        assert f"\n{found}" in capsys.readouterr().err
    assert train_here(*TINY, "--data", "y.npz", "--class-cond") in (1, 2)
    (line,) = errors(capsys)
    assert "--class-cond" in line and "y.npz" in line


def test_data_that_are_not_there_leave_no_run(place, capsys):
    for data in ("digit", "x.npz", "a.npy", "gone/"):
        assert train_here(*TINY, "--data", data) in (1, 2)
        (line,) = errors(capsys)
        assert line.startswith("train.py: error: ") and data.rstrip("/") in line
        assert f"{data}/" not in line and not os.path.exists("runs")


def stand_in_cifar10(patch):
    """An archive in CIFAR-10's format with 6 images a batch, where a user may put it -> pixels."""
    from torchvision.datasets import CIFAR10

    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    pixels, sums = {}, {}
    os.makedirs("s/cifar-10-batches-py")
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "meta"]):
        rng = np.random.default_rng(seed)
        pixels[name] = rng.integers(256, size=(6, 3072), dtype=np.uint8)
        batch = {"data": pixels[name], "labels": [seed, 9, 1, 0, 3, 2]}
        batch = {"label_names": names} if name == "meta" else batch
        name = "batches.meta" if name == "meta" else name
        with open(f"s/cifar-10-batches-py/{name}", "wb") as file:
            pickle.dump(batch, file)
        sums[name] = hashlib.md5(pickle.dumps(batch)).hexdigest()
    os.makedirs("data", exist_ok=True)
    archive = shutil.make_archive("data/cifar-10-python", "gztar", "s")
    patch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # where nobody answers
    patch.setattr(CIFAR10, "tgz_md5", hashlib.md5(open(archive, "rb").read()).hexdigest())
    patch.setattr(CIFAR10, "train_list", [[n, s] for n, s in sums.items() if n.startswith("data")])
    patch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return names, pixels


def test_cifar10_is_read_from_its_archive(place, monkeypatch, capsys):
    names, pixels = stand_in_cifar10(monkeypatch)
    config = Namespace(data="cifar10", image_size=32, class_cond=True, seed=0, out="run")
    network = UNetConfig(num_classes=10, class_names=tuple(names))
    for held_out, batches in ((False, range(1, 6)), (True, ["test"])):
        images, labels, found = train.load_data(config, network, held_out)
        batches = [f"data_batch_{b}" if b != "test" else "test_batch" for b in batches]
        expected = np.concatenate([pixels[b] for b in batches]).reshape(-1, 3, 32, 32)
        assert (images == expected).all() and found == tuple(names)
        seeds = [5] if held_out else range(5)
        assert labels.tolist() == [k for seed in seeds for k in (seed, 9, 1, 0, 3, 2)]
    out, text = capsys.readouterr()  # what torchvision says is no result
    assert not out and "30 images in" in text and "6 images in" in text
    shutil.rmtree("data")
    flags = [*TINY[2:], "--image-size", 32, "--data", "cifar10"]
    assert train_here(*flags) == 1
    line = errors(capsys)[-1]
    assert "CIFAR-10" in line and "cifar-10-python.tar.gz" in line


def test_cifar10_of_another_size_is_refused_before_it_is_fetched(place, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_cifar10", lambda *given: pytest.fail("fetched"))
    assert train_here(*TINY, "--data", "cifar10") == 2
    (line,) = errors(capsys)
    assert "--image-size 8" in line and "32" in line


def test_digits_show_the_digit_of_their_label_and_follow_from_the_seed():
    pixels, names = train.draw_digits(300, 16, seed=1)
    again, same = train.draw_digits(300, 16, seed=1)
    assert (pixels == again).all() and names == same and set(names) == set("0123456789")
    assert pixels.shape == (300, 3, 16, 16) and pixels.dtype == np.uint8

    def shape(mask):
        """What is drawn, without its place and size: 12×8 pixels."""
        image = Image.fromarray((255 * mask).astype(np.uint8))
        return np.asarray(image.crop(image.getbbox()).resize((8, 12)), float) / 255

    shapes = {}
    for name in "0123456789":
        image = Image.new("L", (60, 60))
        ImageDraw.Draw(image).text((10, 5), name, 255, ImageFont.load_default(size=30))
        shapes[name] = shape(np.asarray(image) > 90)
    right, papers = 0, []
    for x, name in zip(pixels.astype(float), names):
        border = np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
        paper = np.median(border, 1)
        far = np.linalg.norm(x - paper[:, None, None], axis=0)
        drawn = shape(far / far.max())
        right += name == min(shapes, key=lambda k: ((drawn - shapes[k]) ** 2).sum())
        grey = np.tensordot([0.299, 0.587, 0.114], x, 1)
        assert grey.max() - grey.min() > 50
        assert abs(grey - np.median(grey)).max() > 100  # white on dark paper, black on light
        papers.append(paper)
    assert right > 270
    # The colours of paper are uniform: 255/sqrt(12) in each channel, which know nothing of another.
    assert np.cov(np.array(papers).T) == pytest.approx(255**2 / 12 * np.eye(3), abs=900)


def test_held_out_digits_are_others_than_those_of_any_seed(monkeypatch, capsys):
    drawn, draw = [], train.draw_digits
    monkeypatch.setattr(train, "draw_digits", lambda n, *rest: drawn.append(n) or draw(99, *rest))
    sets = []
    for held_out in (False, True):
        for seed in (0, 1):
            config = Namespace(data="digits", image_size=16, class_cond=True, seed=seed, out="run")
            images, labels, names = train.load_data(config, held_out=held_out)
            assert names == tuple("0123456789") and len(labels) == 99
            sets.append({image.tobytes() for image in images})
    assert drawn == [20_000] * 4
    for i in range(4):
        for j in range(i):
            assert not sets[i] & sets[j], (i, j)


# ---- Classes are names -------------------------------------------------------------------------


def test_classes_are_numbered_in_natural_order_and_stored(place, capsys):
    for name in [str(i) for i in range(12)]:
        picture(f"p/{name}/a.png")
    assert train_here(*TINY, "--data", "p", "--class-cond") == 0
    line = "12 images in 12 classes: 0 (0), 1 (1), 2 (2), 3 (3), 4 (4), 5 (5), 6 (6), 7 (7), 8 (8),"
    assert line in capsys.readouterr().err
    assert read_checkpoint("runs/p/ckpt.pt")["unet"]["class_names"] == tuple(map(str, range(12)))
    for name in ("²", "٣", "a10", "a9", "a09", "A", "b", "10b2", "10b10", "1.5", "", "x"):
        picture(f"q/{name or '-'}/a.png")
    load("q", classes=True)
    line = capsys.readouterr().err
    order = "1.5 (0), 10b2 (1), 10b10 (2), "
    assert order in line and line.index("A (") < line.index("a09 (") < line.index("a10 (")
    assert "12 images in 12 classes" in line


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A folder p of classes cat2 (red), cat10 (blue), dog (lime), and a run trained on it."""
    folder = tmp_path_factory.mktemp("pets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, colour in dict(cat2="red", cat10="blue", dog="lime").items():
            picture(f"p/{name}/1.png", colour)
        assert train_here(*TINY, "--data", "p", "--class-cond", "--out", "run") == 0
    return folder


@pytest.fixture
def run(pets, place):
    """A copy of them to work in."""
    shutil.copytree(pets, place, dirs_exist_ok=True)
    shutil.rmtree("data")
    return place


RESUME = [*TINY, "--class-cond", "--out", "run", "--steps", 2, "--data"]
EVAL = "--eval-only --ckpt run --eval-calls 5 --device cpu --data".split()


def shown(monkeypatch):
    """-> a list that fills with the (colour, class) of all that is trained on or measured."""
    pairs, send = set(), train.to_device

    def watch(images, labels, rows, device):
        for row in rows:
            pixel = np.asarray(images[row])[:, 4, 4].astype(int)
            near = min(COLOURS, key=lambda c: abs(pixel - COLOURS[c]).sum())
            pairs.add((near, int(labels[row])))
        return send(images, labels, rows, device)

    monkeypatch.setattr(train, "to_device", watch)
    return pairs


ALL = {("red", 0), ("blue", 1), ("lime", 2)}


def test_a_resumed_run_matches_classes_by_name_and_its_data_may_move(run, monkeypatch, capsys):
    assert read_checkpoint("run/ckpt.pt")["unet"]["class_names"] == ("cat2", "cat10", "dog")
    os.rename("p", "moved")
    pairs = shown(monkeypatch)
    assert train_here(*RESUME, "moved") == 0 and pairs <= ALL
    assert read_checkpoint("run/ckpt.pt")["step"] == 2
    capsys.readouterr()
    assert train_here("--out", "run", "--steps", 3, "--data", "moved") == 0
    # One class is gone, others have grown: this is said, and the numbers stay.
    shutil.rmtree("moved/cat2")
    for i in range(3):
        picture(f"moved/dog/{i}.png", "lime")
    pairs.clear()
    assert train_here("--out", "run", "--steps", 4, "--data", "moved") == 0
    assert pairs and pairs <= ALL and "red" not in dict(pairs)
    line = capsys.readouterr().err
    assert "4 images in 2 classes" in line and "no images of cat2" in line


@pytest.mark.parametrize("name", ["zebra", "Dog", "cat02"])
def test_a_class_that_the_run_does_not_know_is_refused_by_name(name, run, capsys):
    before = open("run/ckpt.pt", "rb").read()
    os.rename("p/dog", f"p/{name}")
    for flags in (RESUME, EVAL):
        assert train_here(*flags, "p") in (1, 2)
        (line,) = errors(capsys)
        assert re.search(rf"\b{name}\b", line) and "cat2, cat10, dog" in line
    os.rename(f"p/{name}", "p/dog")
    picture(f"p/{name}/1.png")  # one more than there were
    assert train_here(*RESUME, "p") in (1, 2)
    assert name in errors(capsys)[0] and open("run/ckpt.pt", "rb").read() == before


def test_a_held_out_folder_may_have_some_of_the_classes(run, monkeypatch, capsys):
    pairs = shown(monkeypatch)
    picture("q/dog/1.png", "lime")
    picture("q/cat10/1.png", "blue")
    assert train_here(*EVAL, "q") == 0
    out, text = capsys.readouterr()
    assert "on 2 images" in out and "no images of cat2" in text and pairs == ALL - {("red", 0)}
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    pixels[range(3), :, :, range(3)] = 255  # red, lime, blue
    np.savez("x.npz", arr_0=pixels, arr_1=np.array(["cat2", "dog", "cat10"]))
    forget_arrays()
    pairs.clear()
    assert train_here(*EVAL, "x.npz") == 0 and pairs == ALL


def test_a_checkpoint_without_names_keeps_the_plain_order(run, capsys, monkeypatch):
    state = read_checkpoint("run/ckpt.pt")
    del state["unet"]["class_names"]
    torch.save(state, "run/ckpt.pt")
    pairs = shown(monkeypatch)
    assert train_here(*EVAL, "p") == 0
    assert pairs == {("blue", 0), ("red", 1), ("lime", 2)}  # "cat10" < "cat2"
    capsys.readouterr()
    picture("p/eel/1.png")
    for flags in (RESUME, EVAL):
        assert train_here(*flags, "p") in (1, 2)
        (line,) = errors(capsys)
        assert "4 classes" in line and "3" in line
    shutil.rmtree("p/eel")
    assert train_here(*RESUME, "p") == 0
    assert pairs == {("blue", 0), ("red", 1), ("lime", 2)}


def test_fewer_classes_than_a_network_without_names_are_refused():
    with pytest.raises(ValueError, match="2 classes, the network has 3"):
        train.number_classes({"ant", "bee"}, UNetConfig(num_classes=3), "p/")


def test_names_of_equal_numbers_have_one_order():
    names = [f"a{'0' * k}9" for k in range(9, -1, -1)]
    assert train.number_classes(set(names), None, "p/") == tuple(names)


def test_images_without_a_class_are_refused_by_name(place, capsys):
    picture("p/cat/1.png")
    picture("p/loose.png")
    assert train_here(*TINY, "--data", "p", "--class-cond") in (1, 2)
    assert "loose.png" in errors(capsys)[0]
    assert train_here(*TINY, "--data", "p") == 0


# ---- Flags -------------------------------------------------------------------------------------

WRONG = """
    --image-size=7 --image-size=4097 --image-size=x --label-dropout=-0.1 --label-dropout=1.1
    --label-dropout=nan --low-res=0 --low-res=x --objective=mse --objective= --schedule=none
    --T=1 --T=100001 --T=x --T=1e3 --T=nan --variance=fixed --t-sampler=best --channels=0
    --channels=4097 --channels=x --channel-mult=0 --channel-mult=1,,2 --channel-mult=1,-2
    --channel-mult=x --channel-mult=1.5 --channel-mult=12345 --num-res-blocks=0
    --num-res-blocks=101 --attention=x --attention= --attention=0 --num-heads=0 --num-heads=x
    --dropout=-0.1 --dropout=1 --dropout=nan --dropout=x --batch=0 --batch=-4 --batch=x
    --batch=1000001 --lr=-1 --lr=2 --lr=nan --lr=x --warmup=-1 --warmup=x --ema=-0.1 --ema=1.1
    --ema=nan --grad-clip=-1 --grad-clip=inf --grad-clip=nan --seed=-1 --seed=4294967296 --seed=x --data= --out= --steps=0
    --steps=x --steps=1e3 --steps=-1 --accum=0 --accum=x --init= --device=gpu --dtype=fp8
    --log-every=0 --log-every=x --sample-every=-1 --sample-every=x --save-every=0 --save-every=x
    --class-cond=yes --flip=1 --compile=x --eval-images=0 --eval-steps=0 --eval-steps=x
    --eval-calls=4 --eval-calls=x --spacing=0.9 --spacing=11 --spacing=nan --ckpt= --data --unknown
    --step=3 --eval-only=x
""".split()
# A rule between flags, and what the line must name.
AGAINST = {
    "--eval-images 3": "--eval-images", "--eval-steps 3": "--eval-steps",
    "--eval-calls 5": "--eval-calls", "--spacing 2": "--spacing", "--ckpt x": "--ckpt",
    "--objective hybrid --variance small": "--objective hybrid.*--variance",
    "--variance large": "--variance",
    "--batch 3 --accum 4": "--batch 3.*--accum 4",
    "--label-dropout 0.1": "--label-dropout.*--class-cond",
    "--image-size 9": "--image-size 9", "--image-size 12 --channel-mult 1,1,1,1": "--image-size 12",
    "--channel-mult none": "--channel-mult", "--attention 5": "--attention.*5",
    "--attention 4,2": "--attention.*2", "--low-res 3": "--low-res 3", "--low-res 8": "--low-res 8",
    "--low-res 16": "--low-res 16", "--channels 6": "--channels", "--channels 37": "--channels",
    "--num-heads 3": "--num-heads 3", "--data nowhere": "--data nowhere",
    "--data file": "--data file", "--init nowhere": "nowhere", "--init file": "file",
    "--init .": "ckpt.pt", "--out file": "file", "--out file/deeper": "file", "more": "more",
    "--eval-only --ckpt nowhere": "nowhere", "--eval-only --ckpt file": "file",
    "--eval-only": "ckpt.pt", "--device mps": "--device mps", "--device cuda": "--device cuda",
}  # fmt: skip


@pytest.mark.parametrize("flags", WRONG + list(AGAINST))
def test_a_wrong_flag_ends_in_one_line_that_names_it(flags, place, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    open("file", "w").write("neither folder nor checkpoint")
    np.savez("x.npz", arr_0=X)
    status = train_here(*TINY, *HALVING, "--data", "x.npz", *flags.split())
    out, text = capsys.readouterr()
    lines = [x for x in text.splitlines() if not re.match(r"\w+=|[\d,]+ images", x)]
    assert len(lines) == 1 and lines[0].startswith("train.py: error: ") and not out, lines
    name = AGAINST.get(flags) or re.escape(flags.split("=")[0])
    assert re.search(name, lines[0]), lines
    assert status == 2 if flags in WRONG else status in (1, 2)
    assert sorted(os.listdir()) in (["file", "x.npz"], ["file", "runs", "x.npz"])
    left = [f for _, _, files in os.walk("runs") for f in files]
    assert left in ([], [".lock"]) and len(lines[0]) < 300


def test_wrong_shapes_are_refused_before_data_are_read(place, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_data", lambda *given, **more: pytest.fail("read"))
    picture("p/1.png")
    for flags in (
        "--image-size 96 --attention 16", "--image-size 9", "--attention 3", "--channels 6",
        "--num-heads 3", "--low-res 5", "--channel-mult none",
    ):  # fmt: skip
        assert train_here(*TINY, *HALVING, "--data", "p", *flags.split()) in (1, 2)
        (line,) = errors(capsys)
        assert flags.split()[0] in line or "--attention" in line
        assert not os.path.exists("runs")


@pytest.mark.parametrize(
    "data, device, told",  # the paper's network has 52.5 million parameters
    [("cifar10", "cpu", "53M parameters on a CPU"), ("cifar10", "cuda", ""), ("digits", "cpu", "")],
)
def test_a_large_network_on_a_cpu_is_told(data, device, told, here, capsys):
    config, state, _ = train.configure(["--data", data])
    train.shape_network(config, state, torch.device(device))
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == bool(told)


def test_a_resumed_run_refuses_what_conflicts(run, capsys):
    before = open("run/ckpt.pt", "rb").read()
    other = {
        "image_size": 16, "class_cond": None, "label_dropout": 0.5, "flip": None, "low_res": 4,
        "objective": "vlb", "schedule": "linear", "T": 5, "variance": "small",
        "t_sampler": "importance", "channels": 16, "channel_mult": "1,1", "num_res_blocks": 2,
        "attention_resolutions": "8", "num_heads": 4, "dropout": 0.5, "batch": 5, "lr": 0.5,
        "warmup": 9, "ema": 0.1, "grad_clip": 1, "seed": 6, "init": "run",
    }  # fmt: skip
    groups = list(train.FLAGS.values())[1:5]
    assert {name for rows in groups for name, *_ in rows} == other.keys()
    for name, value in other.items():
        flag = "--" + name.removesuffix("_resolutions").replace("_", "-")
        given = [flag, value] if value is not None else ["--no-" + flag[2:]]
        assert train_here("--out", "run", "--data", "p", "--steps", 2, *given) == 2, name
        (line,) = errors(capsys)
        assert flag in line and "run" in line and "(" not in line.split("error: ")[1]
        if value is None:
            assert f"{flag} off: the run in run has on" in line
    assert open("run/ckpt.pt", "rb").read() == before
    flags = "--accum 2 --device auto --dtype bf16 --log-every 1 --sample-every 0 --save-every 1"
    assert train_here(*RESUME, "p", *flags.split()) == 0
    config = read_checkpoint("run/ckpt.pt")["config"]
    assert config["accum"] == 2 and config["dtype"] == "bf16" and config["seed"] == 5


def test_a_measured_network_keeps_its_shape_and_may_change_its_process(run, capsys):
    for flags in ("--image-size 128", "--channels 16", "--attention 8", "--no-class-cond",
                  "--low-res 4", "--num-heads 1", "--channel-mult 1,1"):  # fmt: skip
        assert train_here(*EVAL, "p", *flags.split()) == 2
        (line,) = errors(capsys)
        assert flags.split()[0].replace("--no-", "--") in line
    for flags in ("--schedule linear", "--T 5"):  # a process other than that of the training
        assert train_here(*EVAL, "p", *flags.split()) == 2
        assert re.search(f"{flags}: run has (cosine|4)", errors(capsys)[-1])
    for flags in ("--variance small", "--schedule cosine", "--image-size 8", "--eval-steps 2"):
        assert train_here(*EVAL, "p", *flags.split()) == 0
    capsys.readouterr()
    assert train_here(*EVAL, "p", "--eval-steps", 5) == 2
    assert "--eval-steps 5" in errors(capsys)[0]


def test_a_variance_that_the_network_does_not_learn_is_refused_by_its_flag(place, capsys):
    np.savez("x.npz", arr_0=X)
    flags = [*TINY, "--data", "x.npz", "--objective", "simple"]
    assert train_here(*flags, "--variance", "large", "--out", "run") == 0
    capsys.readouterr()
    for more in (["--eval-only", "--ckpt", "run"], ["--init", "run", "--out", "new"]):
        assert train_here(*flags[:-2], *more, "--variance", "learned") in (1, 2)
        (line,) = errors(capsys)
        assert "--variance learned" in line


def test_a_run_uses_the_preset_then_the_run_then_what_was_typed(run):
    config = train.configure(["--data", "p"])[0]
    paper = (config.batch, config.lr, config.ema, config.T, config.flip, config.objective)
    assert paper == (128, 1e-4, 0.9999, 4000, True, "hybrid")
    assert (config.image_size, config.dropout, config.steps) == (64, 0, 1_500_000)
    assert config.channel_mult == (1, 2, 3, 4) and not config.class_cond
    for size, mult in {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}.items():
        assert train.configure(["--data", "p", "--image-size", str(size)])[0].channel_mult == mult
    cifar10 = train.configure(["--data", "cifar10"])[0]
    assert (cifar10.image_size, cifar10.channels, cifar10.channel_mult) == (32, 128, (1, 2, 2, 2))
    assert (cifar10.num_res_blocks, cifar10.attention_resolutions) == (3, (16, 8))
    assert (cifar10.num_heads, cifar10.dropout, cifar10.steps) == (4, 0.3, 500_000)
    config, state, _ = train.configure(["--data", "p", "--out", "run", "--steps", "7"])
    assert (config.steps, config.batch, config.T, config.class_cond) == (7, 4, 4, True)
    assert config.image_size == 8 and state["step"] == 1
    config, state, _ = train.configure(["--data", "p", "--out", "other", "--lr", "0.5"])
    assert config.lr == 0.5 and config.batch == 128 and state == {}


@pytest.mark.parametrize("flags, attention", [
    ("--data cifar10", (16, 8)), ("--data cifar10 --channel-mult 1,2", (16,)),
    ("--data p/ --image-size 48", (12,)), ("--data p/ --image-size 96", (12,)),
    ("--data p/ --image-size 64", (16, 8)), ("--data p/ --image-size 256", (16, 8)),
    ("--data p/ --image-size 40 --channel-mult 1,2", ()), ("--data p/ --image-size 8", (8,)),
    ("--data digits", (8,)), ("--data digits --image-size 64", (16,)),
    ("--data digits --image-size 32 --channel-mult 1,2,2", (8,)),
    ("--data digits --attention none", ()),
])  # fmt: skip
def test_a_preset_attends_at_resolutions_that_the_network_has(flags, attention, here):
    config, *_ = train.configure(flags.split())
    assert config.attention_resolutions == attention
    shape = {name: getattr(config, name) for name in train.SHAPE}
    with torch.device("meta"):
        UNet(UNetConfig(**shape))


def test_each_size_of_a_folder_has_its_widths(here):
    for size, mult in {16: (1, 2, 2), 48: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4)}.items():
        config, *_ = train.configure(["--data", "p", "--image-size", str(size)])
        assert config.channel_mult == mult, size


def test_the_paces_and_the_measurements_defaults_are_those_of_help(here):
    config, *_ = train.configure(["--data", "cifar10"])
    pace = (config.log_every, config.sample_every, config.save_every, config.accum)
    assert pace == (100, 10_000, 1_000, 1)
    assert (config.eval_images, config.eval_calls, config.spacing) == (10_000, 10, 1.0)


def test_the_last_allowed_values_are_allowed(run, capsys):
    assert train_here(*EVAL, "p", "--eval-steps", 4) == 0  # of T = 4
    assert train_here(*TINY, "--data", "p", "--accum", 4, "--out", "new") == 0  # a batch of 4


def test_heads_of_a_plain_state_dict_are_what_the_flag_says(here):
    torch.save(golden_weights(), "plain.pt")
    flags = "--data p --schedule linear --T 20 --num-heads 2".split()
    for how in (["--eval-only", "--ckpt", "plain.pt"], ["--init", "plain.pt"]):
        config, _, model = train.configure([*how, *flags])
        assert config.num_heads == model.config.num_heads == 2


def test_the_time_scale_of_a_checkpoint_is_kept(here):
    checkpoint("ckpt.pt")
    state = read_checkpoint("ckpt.pt")
    save_checkpoint("ckpt.pt", state | {"diffusion": state["diffusion"] | {"time_scale": 1.0}})
    for how in (["--eval-only", "--ckpt", "ckpt.pt"], ["--init", "ckpt.pt"]):
        assert train.configure([*how, "--data", "p"])[0].time_scale == 1.0
    assert train.configure(["--data", "p"])[0].time_scale is None


def test_init_takes_dropout_from_its_flag(run):
    flags = "--data p --init run --out new --dropout 0.5 --batch 2 --steps 1 --sample-every 0"
    assert train_here(*flags.split(), "--device", "cpu") == 0
    assert read_checkpoint("new/ckpt.pt")["unet"]["dropout"] == 0.5


def test_init_takes_shape_and_process_from_the_file(run, capsys):
    flags = "--data p --init run --out new --batch 2 --lr 0 --ema 0 --steps 1 --device cpu".split()
    assert train_here(*flags, "--sample-every", 0) == 0
    old, new = read_checkpoint("run/ckpt.pt"), read_checkpoint("new/ckpt.pt")
    for name, weights in new["model"].items():
        assert torch.equal(weights, old["ema"][name])
    assert new["step"] == 1 and new["config"]["T"] == 4 and new["config"]["image_size"] == 8
    assert new["config"]["dropout"] == 0 and new["unet"]["class_names"] == ("cat2", "cat10", "dog")
    capsys.readouterr()
    assert train_here(*flags[:4], "--out", "third", "--channels", 16) == 2
    assert "--channels 16" in errors(capsys)[0]
    _, process = load_checkpoint("new")
    assert process["T"] == 4 and process["schedule"] == "cosine"


@pytest.mark.parametrize("damage", ["cut", "images", "paths", "both"])
def test_a_damaged_cache_is_decoded_anew(damage, place):
    picture("p/red.png")
    picture("p/lime.png", "lime")
    assert load("p") == (["lime", "red"], None)
    cache = {name.split(".")[1]: f"data/cache/{name}" for name in os.listdir("data/cache")}
    assert cache.keys() == {"u8", "npy"}
    if damage == "cut":
        os.truncate(cache["u8"], 100)
    for name in {"images": ["u8"], "paths": ["npy"], "both": ["u8", "npy"]}.get(damage, []):
        os.remove(cache[name])
    assert load("p") == (["lime", "red"], None)


def test_a_run_is_measured_on_its_own_data_unless_others_are_given(place, capsys):
    np.savez("x.npz", arr_0=X)
    assert train_here(*TINY, "--data", "x.npz", "--out", "run") == 0
    assert train_here("--eval-only", "--ckpt", "run", "--eval-calls", 5, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    warning = "measuring on the training images, x.npz: give --data to use others\n"
    assert " on 6 images" in out and err.count(warning) == 1
    assert "bits/dim:" not in err  # no bar off a terminal, before a minute has passed
    flags = "--eval-only --ckpt run --eval-calls 5 --device cpu --data x.npz".split()
    assert train_here(*flags) == 0 and warning not in capsys.readouterr().err
    assert train_here(*flags, *"--steps 9 --lr 1 --seed 2 --flip".split()) == 0
    assert errors(capsys).count("--eval-only has no use for --flip, --lr, --steps") == 1
    assert train_here(*flags, "--init", "run") == 0
    assert errors(capsys).count("--eval-only has no use for --init") == 1


def test_another_folder_of_the_same_name_does_not_resume_the_run(place, capsys):
    picture("cats/train/a.png")
    picture("dogs/train/b.png", "lime")
    assert train_here(*TINY, "--data", "cats/train") == 0
    assert train_here(*TINY, "--data", "dogs/train") == 2
    assert "--data dogs/train/, but the run in runs/train has cats/train/" in errors(capsys)[-1]
    os.rename("cats/train", "moved")  # but data that moved are the same data
    os.makedirs("elsewhere")
    os.rename("moved", "elsewhere/train")
    capsys.readouterr()
    assert train_here(*TINY[:-6], "--data", "elsewhere/train", "--steps", 2) == 0
    moved = "the run in runs/train had the data cats/train/; now it has elsewhere/train/"
    assert errors(capsys).count(moved) == 1
    again = os.path.abspath("elsewhere/train")  # the same folder, written otherwise
    assert train_here(*TINY[:-6], "--data", again, "--steps", 3) == 0
    assert not [line for line in errors(capsys) if "had the data" in line]


def test_other_data_in_a_run_are_told_by_their_number(with_arrays, capsys):
    flags = [*SMALL, "--out", "run", "--steps"]
    arrays = dict(np.load("x.npz"))
    numbers = (10, 10, 7, 7, 9)
    for steps, (before, now) in enumerate(zip((10, *numbers), numbers), 1):
        np.savez("x.npz", **{name: array[:now] for name, array in arrays.items()})
        assert train_here(*flags, steps) == 0
        told = [line for line in errors(capsys) if line.startswith("ATTENTION")]
        said = f"ATTENTION: run was trained on {before} images; now there are {now}"
        assert told == ([said] if before != now else [])
    state = read_checkpoint("run/ckpt.pt")
    del state["images"]  # as in older files
    torch.save(state, "run/ckpt.pt")
    assert train_here(*flags, 6) == 0
    assert "ATTENTION" not in capsys.readouterr().err


def test_a_folder_is_the_same_behind_a_link_and_no_data_set(place):
    os.makedirs("p")
    os.symlink("p", "link")
    assert train.where("link/") == train.where("./p/") == os.path.realpath("p")
    assert train.where("digits") != train.where("digits/")


def test_the_first_line_says_what_counts(run, capsys):
    assert train_here(*EVAL, "p") == 0
    words = capsys.readouterr().err.split("\n")[0]
    assert "eval_calls=5" in words and "ckpt=run" in words and " lr=" not in words
    assert train_here(*RESUME, "p") == 0
    words = capsys.readouterr().err.split("\n")[0]
    assert " lr=" in words and "out=run" in words and "eval_calls" not in words


def test_a_folder_named_like_a_data_set_does_not_resume_its_run(place, capsys):
    np.savez("x.npz", arr_0=X)
    assert train_here(*TINY, "--data", "x.npz", "--out", "runs/cifar10") == 0
    state = read_checkpoint("runs/cifar10/ckpt.pt")
    state["config"]["data"] = "cifar10"
    save_checkpoint("runs/cifar10/ckpt.pt", state)
    picture("else/cifar10/a.png")
    assert train_here("--data", "else/cifar10") == 2
    assert "has cifar10: give another --out" in errors(capsys)[-1]


def test_a_run_that_was_moved_knows_where_it_is(run):
    os.rename("run", "moved")
    config, state, _ = train.configure(["--out", "moved"])
    assert (config.out, config.ckpt, state["step"]) == ("moved", "moved/ckpt.pt", 1)


def test_a_cache_that_cannot_be_replaced_ends_in_an_error(place, monkeypatch):
    picture("p/a.png", "red")
    assert load("p")[0] == ["red"]
    for name in os.listdir("data/cache"):
        open(f"data/cache/{name}", "wb").close()  # damaged, and another user's

    def refuse(_, path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError):
            load("p")


def test_a_kill_between_the_two_files_of_a_cache_exchanges_no_labels(place, monkeypatch):
    picture("p/red/a.png", "red")
    picture("p/lime/b.png", "lime")
    assert load("p", classes=True) == (["lime", "red"], ["lime", "red"])
    (images,) = [f"data/cache/{name}" for name in os.listdir("data/cache") if "u8" in name]
    os.truncate(images, 100)  # so that it is decoded anew, and one file cannot be read just then
    read, replace = train.read_image, os.replace

    def killed(*given):
        replace(*given)
        raise Killed

    def one_fails(root, size, path):
        return "broken" if "lime" in path else read(root, size, path)

    with monkeypatch.context() as patch:
        patch.setattr(train, "read_image", one_fails)
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            load("p")
    assert not [name for name in os.listdir("data/cache") if name.endswith(".npy")]
    assert load("p", classes=True) == (["lime", "red"], ["lime", "red"])


class OneThread:
    """A stand-in for a pool of threads."""

    imap = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_off_a_terminal_a_bar_comes_once_a_minute(place, monkeypatch, capsys):
    for k in range(40):
        picture(f"p/{k}.png")
    load("p")
    assert "reading" not in capsys.readouterr().err

    class Hurried(tqdm):
        def __init__(self, *given, delay, mininterval, maxinterval, **more):
            assert delay == mininterval == maxinterval == 60
            super().__init__(*given, delay=0.05, mininterval=0.05, **more)

    def read_slowly(*given):
        time.sleep(0.02)
        return read_image(*given)

    read_image = train.read_image
    monkeypatch.setattr(model_file, "tqdm", Hurried)
    monkeypatch.setattr(train, "read_image", read_slowly)
    shutil.rmtree("data")
    load("p")
    assert re.search(r"reading p: +\d+%.*/40 ", capsys.readouterr().err)
    monkeypatch.setattr(model_file, "RANK", 1)  # one rank is enough
    shutil.rmtree("data")
    load("p")
    assert capsys.readouterr().err == ""


def test_two_runs_may_decode_one_folder_at_once(place, monkeypatch):
    for colour in ("red", "lime"):
        picture(f"p/{colour}.png", colour)
    read, seen = train.read_image, []

    def beside_another_run(*given):
        if not seen:
            seen.append(given)
            assert load("p")[0] == ["lime", "red"]  # decodes them all, and is complete first
        return read(*given)

    monkeypatch.setattr(train, "ThreadPool", OneThread)
    monkeypatch.setattr(train, "read_image", beside_another_run)
    assert load("p")[0] == ["lime", "red"]
    assert len(os.listdir("data/cache")) == 2  # the work of both was named alike
    assert load("p")[0] == ["lime", "red"]


def test_an_npz_files_numbers_are_the_classes_of_a_network_without_names():
    network = UNetConfig(num_classes=12)
    numbers = tuple(str(k) for k in range(12))
    for found in (set(numbers), {"2", "11"}):
        assert train.number_classes(found, network, "x.npz") == numbers
    assert train.number_classes(set(numbers), network, "p/") == tuple(sorted(numbers))
    assert train.number_classes({*numbers[1:], "n01"}, network, "x.npz")[-1] == "n01"


def test_a_variance_that_nothing_trains_is_said(place, capsys):
    np.savez("x.npz", arr_0=X)
    said = "--objective simple trains no variance"
    for more, count in (("", 1), ("--variance large", 0)):
        flags = f"--objective simple {more} --data x.npz --out run{count}".split()
        assert train_here(*TINY, *flags) == 0
        assert capsys.readouterr().err.count(said) == count


def test_weights_that_do_not_say_their_data_are_not_measured_on_digits(place, capsys):
    torch.save(golden_weights(), "plain.pt")
    flags = "--eval-only --ckpt plain.pt --schedule linear --T 20 --device cpu".split()
    assert train_here(*flags) == 2
    assert "plain.pt does not say its data: give --data" in errors(capsys)[-1]


def test_weights_without_a_run_are_not_resumed(run, capsys):
    state = read_checkpoint("run/ckpt.pt")
    keep = {name: state[name] for name in ("unet", "diffusion", "ema")}
    save_checkpoint("run/ckpt.pt", keep)
    before = open("run/ckpt.pt", "rb").read()
    assert train_here(*RESUME, "p") == 2
    (line,) = errors(capsys)
    assert "run/ckpt.pt" in line and "--out" in line
    assert open("run/ckpt.pt", "rb").read() == before
    assert train_here(*EVAL, "p") == 0  # but they can be measured


def test_a_folder_may_have_the_name_of_a_data_set(place, capsys):
    for name in ("cifar10", "digits"):
        picture(f"{name}/a.png")
        assert train_here(*TINY, "--data", f"{name}/") == 0
        assert train_here(*TINY, "--data", f"./{name}", "--steps", 2) == 0
        assert "\n1 images\n" in capsys.readouterr().err
        assert read_checkpoint(f"runs/{name}/ckpt.pt")["step"] == 2


@pytest.mark.parametrize("data", ["digits", "cifar10", "FOLDER"])
def test_help_fits_a_screen_and_shows_the_values_of_the_data(data, place, capsys):
    assert train_here("--data", data, "--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) <= 75
    values = dict(re.findall(r"(--[\w-]+)(?:(?!--|default).|\n)*\(default: ([^)]*)\)", text))
    expected = {
        "digits": ("16", "1200", "0.0", "64"), "cifar10": ("32", "500000", "0.3", "128"),
        "FOLDER": ("64", "1500000", "0.0", "128"),
    }[data]  # fmt: skip
    names = ("--image-size", "--steps", "--dropout", "--batch")
    assert tuple(values[name] for name in names) == expected
    assert os.listdir() == []


def test_help_names_every_flag_of_the_contract(capsys):
    assert train_here("--help") == 0
    text = capsys.readouterr().out
    for name in """
        data out steps batch accum image-size class-cond label-dropout low-res objective schedule T
        variance t-sampler channels channel-mult num-res-blocks attention num-heads dropout lr
        warmup ema grad-clip dtype compile flip no-flip seed device log-every sample-every
        save-every init eval-only ckpt eval-images eval-steps eval-calls spacing help
    """.split():
        assert re.search(rf"--{name}\b", text), name


# ---- Where the results go ----------------------------------------------------------------------


def test_an_ascii_terminal_loses_nothing(run, monkeypatch):
    picture("p/dog/ü😀.png", "lime")
    open("p/dog/ö.png", "w").close()
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert train_here(*EVAL, "p") == 0
    out, text = (stream.detach().getvalue().decode("ascii") for stream in streams)
    assert re.match(r"bits/dim \d+\.\d+ on 4 images", out) and "L_0 " in out and "L_T " in out
    assert r"left out: dog/\xf6.png" in text


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_closed_streams_do_not_end_a_run(closed, run, monkeypatch, capsys):
    for name in ("stdout", "stderr"):
        if closed in (name, "both"):
            monkeypatch.setattr(sys, name, None)
    assert train_here(*RESUME, "p") == 0
    assert train_here(*EVAL, "p") == 0
    monkeypatch.undo()
    assert read_checkpoint(f"{run}/run/ckpt.pt")["step"] == 2
    assert os.path.exists(f"{run}/run/terms.csv")
    if closed == "stderr":
        assert "bits/dim " in capsys.readouterr().out


class Pipe(io.TextIOWrapper):
    """What nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError


def test_a_result_that_nobody_reads_is_no_error(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Pipe(io.BytesIO()))
    assert train_here(*EVAL, "p") == 0
    assert train_here(*RESUME, "p") == 0


def checkpoint(path, T=20, variance="learned", schedule="cosine", noise=0.1, seed=0, **changes):
    """Save a tiny network of random weights; with noise 0 it is a fresh one, which returns 0."""
    config = dict(
        image_size=8, channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(),
        num_heads=2, dropout=0.0, out_channels=6 if variance == "learned" else 3,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = UNet(UNetConfig(**config | changes)).eval()
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    process = dict(schedule=schedule, T=T, variance=variance, time_scale=None)
    unet, weights = vars(model.config), model.state_dict()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_checkpoint(path, dict(unet=unet, diffusion=process, ema=weights))
    return model


def cosine(T):
    """alphas_bar of eq. 17, each beta at most 0.999, float64 (T,)."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(np.maximum(f[1:] / f[:-1], 0.001))


def as_one_of(patch, rank, ranks):
    """Have the scripts believe that they are one of several ranks."""
    patch.setattr(model_file, "RANK", rank)
    patch.setattr(model_file, "WORLD", ranks)
    patch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)


# ---- Bits per dimension ------------------------------------------------------------------------


def flat_images(path, n, size=8, **more):
    """Write n images, all pixels of image i having the value 4·i + 2."""
    values = np.arange(n, dtype=np.uint8)[:, None, None, None] * 4 + 2
    np.savez(path, arr_0=np.broadcast_to(values, (n, size, size, 3)), **more)


def which(x):
    """The numbers i of flat images (N, 3, S, S), which may have a little noise."""
    return (((x.flatten(1).mean(1).double() + 1) * 127.5 - 2) / 4).round().long()


def know_terms(patch, term, prior):
    """Replace L_t and L_T by known functions of image and t -> a list of all (image, t) drawn."""
    drawn = []

    def draw_term(self, model, x0, t, y=None):
        drawn.extend(zip(which(x0).tolist(), t.tolist()))
        return term(which(x0), t).to(x0)

    patch.setattr(Diffusion, "draw_term", draw_term)
    patch.setattr(Diffusion, "prior", lambda self, x0: prior(which(x0)).to(x0))
    return drawn


def measure(capsys, *flags):
    """Run --eval-only -> (bits/dim, n, the two errors or one, L_0, KLs, L_T) and the text."""
    assert script("train.py", "--eval-only", "--device", "cpu", *flags) == 0
    text = capsys.readouterr().out
    found = re.search(
        r"^bits/dim (\S+) on (\d+) images,.*\nL_0 (\S+), KLs (\S+), L_T (\S+)\n$", text
    )
    errors = [float(error) for error in re.findall(r"± (\d\S*)", text)]
    total, n, *terms = map(float, found.groups())
    return (total, n, errors, *terms), text


def terms_csv(folder="."):
    """The rows of terms.csv -> {t: (mean, draws)}."""
    head, *rows = open(os.path.join(folder, "terms.csv")).read().splitlines()
    assert head == "t,bits_per_dim,draws"
    rows = [row.split(",") for row in rows]
    return {int(t): (float(mean), int(draws)) for t, mean, draws in rows}


def term_of(i, t):
    return (1 + i / 8) / (1 + t) + 0.01 * i


def prior_of(i):
    return 0.5 + i / 32


@pytest.mark.parametrize("calls", [20, 33])
def test_every_printed_figure_is_that_of_known_terms(calls, here, monkeypatch, capsys):
    checkpoint("run/ckpt.pt")
    flat_images("x.npz", 12)
    drawn = know_terms(monkeypatch, term_of, prior_of)
    flags = ["--data", "x.npz", "--ckpt", "run", "--eval-images", 7, "--batch", 3]
    (total, n, errors, L_0, kls, L_T), text = measure(capsys, *flags, "--eval-calls", calls)
    images = sorted({i for i, _ in drawn})
    assert len(images) == 7 and sorted(drawn) == sorted(itertools.product(images, range(20)))
    terms = np.array([[term_of(i, t) for t in range(20)] for i in images])
    priors = np.array([prior_of(i) for i in images])
    bounds = terms.sum(1) + priors
    assert n == 7 and "every term" in text and "nan" not in text
    assert total == pytest.approx(bounds.mean(), abs=6e-5)
    assert errors == pytest.approx([bounds.std(ddof=1) / 7**0.5], abs=6e-5)
    assert L_0 == pytest.approx(terms[:, 0].mean(), abs=6e-5)
    assert kls == pytest.approx(terms[:, 1:].sum(1).mean(), abs=6e-5)
    assert L_T == pytest.approx(priors.mean(), abs=2e-6)
    rows = terms_csv("run")  # beside the checkpoint
    assert list(rows) == list(range(20)) and {draws for _, draws in rows.values()} == {7}
    assert [mean for mean, _ in rows.values()] == pytest.approx(terms.mean(0), rel=1e-5)


def test_both_errors_of_an_estimate_are_those_of_known_pairs(here, monkeypatch, capsys):
    checkpoint("ckpt.pt")
    flat_images("x.npz", 6)
    pairs = np.array([[3, 4], [5, 1], [2, 2.5], [7, 4], [1, 1], [6, 8]])  # two estimates an image
    seen = np.zeros(6, int)

    def estimate(self, model, x0, p, calls, y=None):
        """The image's next total; a term 2 at t = 0, and one at t = 3, then at t = 4 + image."""
        i = which(x0)
        terms = torch.full((len(x0), 20), math.nan)
        terms[:, 0] = 2
        terms[range(len(i)), torch.where(torch.tensor(seen[i] == 0), 3, 4 + i)] = 0.25 + i / 8
        total = torch.tensor(pairs[i, seen[i]]).float()
        seen[i] += 1
        return total, terms, 0.125 + 0 * total

    monkeypatch.setattr(Diffusion, "estimate_bits_per_dim", estimate)
    flags = ["--data", "x.npz", "--ckpt", "ckpt.pt", "--batch", 4, "--eval-calls", 9]
    (total, n, errors, L_0, kls, L_T), text = measure(capsys, *flags)
    means, halves = pairs.mean(1), (pairs[:, 0] - pairs[:, 1]) / 2
    assert (seen == 2).all() and n == 6 and total == pytest.approx(means.mean(), abs=6e-5)
    by_draws, of_images = (halves**2).sum() ** 0.5 / 6, means.std(ddof=1) / 6**0.5
    assert errors == pytest.approx([by_draws, of_images], abs=6e-5)
    assert (L_0, L_T) == (2, 0.125) and kls == pytest.approx(means.mean() - 2.125, abs=6e-5)
    ones = {4 + i: (0.25 + i / 8, 1) for i in range(6)}
    assert terms_csv() == {0: (2, 12), 3: (0.5625, 6)} | ones


def test_an_estimate_is_as_far_from_the_exact_bound_as_it_says(here, monkeypatch, capsys):
    checkpoint("ckpt.pt", T=300)
    flat_images("x.npz", 60)

    def noisy(i, t):
        return (1 + i / 60) * 3 / (1 + t) * (1 + 0.1 * torch.randn(len(t)))

    drawn = know_terms(monkeypatch, noisy, prior_of)
    exact = np.mean([(1 + i / 60) * sum(3 / (1 + t) for t in range(300)) for i in range(60)])
    exact += np.mean([prior_of(i) for i in range(60)])
    z, errors = [], []
    for seed in range(24):
        drawn.clear()
        flags = ["--data", "x.npz", "--ckpt", "ckpt.pt", "--eval-calls", 11, "--seed", seed]
        (total, n, both, *_), text = measure(capsys, *flags, "--batch", 60)
        assert "every term" not in text and len(both) == 2
        assert 60 * 9 < len(drawn) <= 60 * 11  # the calls that were asked for
        z.append((total - exact) / both[0])
        errors.append(both[0])
    assert abs(np.mean(z)) < 3 / 24**0.5 and 0.7 < np.mean(np.square(z)) ** 0.5 < 1.35
    assert max(errors) < 0.5
    drawn.clear()
    flags = ["--data", "x.npz", "--ckpt", "ckpt.pt", "--eval-images", 2]
    _, text = measure(capsys, *flags, "--eval-calls", 299)
    assert "every term" not in text and len(set(drawn)) < 600
    drawn.clear()
    _, text = measure(capsys, *flags, "--eval-calls", 300)
    assert "every term" in text and len(set(drawn)) == len(drawn) == 600


def bound_by_quadrature(steps, variance, values):
    """The bound on flat images of a network that returns ε = 0 and v = 0, by the paper's formulas.

    -> the mean bits/dim for images of these values in [-1, 1], L_0, and the errors that 192 draws
    of the noise for each image have in both.
    """
    z = np.linspace(-9, 9, 6001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    abar = cosine(20)[steps]
    before = np.append(1, abar[:-1])
    beta = 1 - abar / before
    small = beta * (1 - before) / (1 - abar)
    small[0] = small[1]
    first = np.append(small[0], beta[1:])
    var = {"small": small, "large": first, "learned": np.sqrt(beta * small)}[variance]
    total, variances, L_0, variances_0 = [], [], [], []
    for x in values:
        bits, squares = [], []
        for t in range(len(abar)):
            x_t = abar[t] ** 0.5 * x + (1 - abar[t]) ** 0.5 * z
            x0_hat = np.clip(x_t / abar[t] ** 0.5, -1, 1)
            if t == 0:
                ends = [(x - x0_hat + side / 255) / var[0] ** 0.5 for side in (1, -1)]
                high, low = (torch.special.ndtr(torch.tensor(end)).numpy() for end in ends)
                high, low = (1 if x == 1 else high), (0 if x == -1 else low)
                nats = -np.log(np.maximum(high - low, 1e-300))  # far off, where z never is
            else:
                miss = beta[t] * before[t] ** 0.5 / (1 - abar[t]) * (x - x0_hat)
                ratio = small[t] / var[t]
                nats = 0.5 * (ratio - 1 - np.log(ratio) + miss**2 / var[t])
            bits.append((density * nats).sum() / LN2)
            squares.append((density * nats**2).sum() / LN2**2 - bits[-1] ** 2)
        prior = 0.5 * (abar[-1] * x**2 - abar[-1] - np.log(1 - abar[-1])) / LN2
        total.append(sum(bits) + prior)
        variances.append(sum(squares) / 192)
        L_0.append(bits[0])
        variances_0.append(squares[0] / 192)
    errors = [sum(each) ** 0.5 / len(values) for each in (variances, variances_0)]
    return np.mean(total), np.mean(L_0), *errors


@pytest.mark.parametrize(
    "flags, steps, variance",
    [
        ("", range(20), "learned"),
        ("--variance large", range(20), "large"),
        ("--variance small --eval-steps 7", [0, 3, 6, 10, 13, 16, 19], "small"),
        ("--eval-steps 5 --spacing 2", [0, 1, 5, 11, 19], "learned"),
    ],
)
def test_a_fresh_network_has_the_bound_that_quadrature_gives(flags, steps, variance, here, capsys):
    checkpoint("ckpt.pt", noise=0)
    values = np.tile([0, 0, 1, 40, 90, 128, 200, 254, 255, 255], 8)
    np.savez("x.npz", arr_0=np.tile(values[:, None, None, None], (1, 8, 8, 3)).astype(np.uint8))
    given = "--data x.npz --ckpt ckpt.pt --eval-calls 20 --batch 40 --seed 1".split()
    (total, n, _, L_0, *_), _ = measure(capsys, *given, *flags.split())
    bound, first, error, error_0 = bound_by_quadrature(list(steps), variance, values / 127.5 - 1)
    assert n == 80 and error < 0.01 * bound and abs(total - bound) < 4 * error + 1e-4
    assert abs(L_0 - first) < 4 * error_0 + 1e-4 and list(terms_csv()) == list(range(len(steps)))


def see_network(patch, out=None):
    """Record what the network is given -> a list of dicts of x, t, y, low_res and the dtype."""
    seen, forward = [], UNet.forward

    def spy(self, x, t, y=None, low_res=None):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        seen.append(dict(x=x, t=t, y=y, low_res=low_res, dtype=dtype))
        return forward(self, x, t, y, low_res) if out is None else out(self, x, t, y, low_res)

    patch.setattr(UNet, "forward", spy)
    return seen


def test_the_measured_network_sees_the_times_and_the_class_of_each_image(here, monkeypatch, capsys):
    checkpoint("ckpt.pt", num_classes=4, class_names=("dog", "10", "2", "cat"))
    labels = np.arange(20) % 3  # the data's own numbers; none of class 10
    flat_images("x.npz", 20, arr_1=labels, class_names=np.array(["2", "cat", "dog"]))
    seen = see_network(monkeypatch)
    native = {"avx512_bf16": True, "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native, raising=False)
    flags = ["--data", "x.npz", "--ckpt", "ckpt.pt", "--batch", 6, "--eval-calls", 5]
    measure(capsys, *flags, "--eval-steps", 5, "--spacing", 2, "--eval-images", 20)
    assert sorted({t for call in seen for t in call["t"].tolist()}) == [0, 50, 250, 550, 950]
    assert {call["dtype"] for call in seen} == {torch.float32}  # although bf16 is native here
    images = {}
    for call in seen:
        assert len(call["t"].unique()) == 1
        if call["t"][0] == 0:
            images |= dict(zip(which(call["x"]).tolist(), call["y"].tolist()))
    assert images == {i: [2, 3, 0][i % 3] for i in range(20)}
    seen.clear()
    measure(capsys, *flags, "--eval-images", 2, "--dtype", "bf16")
    assert {call["dtype"] for call in seen} == {torch.bfloat16}


def test_training_takes_bf16_where_it_is_native(with_arrays, monkeypatch):
    native = {"avx512_bf16": True, "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native, raising=False)
    seen = see_network(monkeypatch)
    assert script("train.py", *SMALL, "--dtype", "auto", "--steps", 1, "--out", "run") == 0
    assert {call["dtype"] for call in seen} == {torch.bfloat16}


def test_a_measured_upsampler_is_given_its_images_made_small(here, monkeypatch, capsys):
    checkpoint("ckpt.pt", low_res=4)
    rng = np.random.default_rng(0)
    pictures = rng.integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    np.savez("x.npz", arr_0=pictures)
    seen = see_network(monkeypatch)
    means = pictures.reshape(6, 4, 2, 4, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 127.5 - 1
    for calls in (20, 7):  # exactly, and with a pilot
        seen.clear()
        flags = ["--data", "x.npz", "--ckpt", "ckpt.pt", "--batch", 4, "--eval-calls", calls]
        measure(capsys, *flags)
        found = set()
        for call in seen:
            far = np.abs(call["low_res"].numpy()[:, None] - means).max((2, 3, 4))
            nearest = far.argmin(1)
            found |= set(nearest.tolist())
            assert far.min(1).max() < 1e-5
            if call["t"][0] == 0:  # almost without noise: the large image is the small one's
                large = pictures[nearest].transpose(0, 3, 1, 2) / 127.5 - 1
                assert np.abs(call["x"].numpy() - large).mean() < 0.15
        assert found == set(range(6))


def test_the_pilot_of_an_upsampler_is_given_each_images_own_small_one(here, monkeypatch):
    checkpoint("ckpt.pt", low_res=4)
    np.savez("x.npz", arr_0=arrays(64))
    pairs = []

    def pilot(self, model, x0, y, points):
        blocks = x0.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
        pairs.append((model.keywords["low_res"], blocks))
        return torch.ones(20, dtype=torch.float64)

    monkeypatch.setattr(Diffusion, "pilot", pilot)
    flags = "--eval-only --data x.npz --ckpt ckpt.pt --device cpu".split()
    assert script("train.py", *flags) == 0
    ((given, blocks),) = pairs
    assert len(given) == 2 and (given - blocks).abs().max() < 1e-6


def test_two_ranks_measure_together_what_one_does(here, monkeypatch, capsys):
    import sampler

    checkpoint("ckpt.pt")
    flat_images("x.npz", 30)
    drawn = know_terms(monkeypatch, term_of, prior_of)
    flags = "--data x.npz --ckpt ckpt.pt --eval-images 17 --batch 3 --eval-calls 20".split()
    _, alone = measure(capsys, *flags)
    terms, images = terms_csv(), [{i for i, _ in drawn}]
    said = []  # what the other rank has gathered

    def gather_last(values):
        said.append(values)
        return values

    def gather_both(values):
        return torch.cat([values, said.pop(0)])

    for rank, gather in ((1, gather_last), (0, gather_both)):
        drawn.clear()
        with monkeypatch.context() as patch:
            as_one_of(patch, rank, 2)
            patch.setattr(sampler, "gather", gather)
            assert script("train.py", "--eval-only", "--device", "cpu", *flags) == 0
        out = capsys.readouterr().out
        assert out == ("" if rank else alone)
        images.append({i for i, _ in drawn})
        assert len(drawn) == len(set(drawn)) and abs(len(images[-1]) - 8.5) < 2
    assert images[1] | images[2] == images[0] and not images[1] & images[2]
    assert terms_csv() == terms


def test_the_images_measured_are_a_random_choice_that_the_seed_repeats(here, monkeypatch, capsys):
    checkpoint("ckpt.pt")
    flat_images("x.npz", 60)
    drawn = know_terms(monkeypatch, term_of, prior_of)
    chosen = []
    for seed in (1, 1, 2):
        drawn.clear()
        flags = ["--data", "x.npz", "--ckpt", "ckpt.pt", "--eval-calls", 20]
        measure(capsys, *flags, "--eval-images", 12, "--seed", seed)
        chosen.append({i for i, _ in drawn})
        assert len(chosen[-1]) == 12 and len(drawn) == 240
        assert not chosen[-1] <= set(range(24)) and not chosen[-1] <= set(range(36, 60))
    assert chosen[0] == chosen[1] != chosen[2]
    (_, n, *_), _ = measure(capsys, *flags)  # --eval-images is the most; there are fewer
    assert n == 60


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_calls_of_the_network_are_enough_for_each_image(ranks, here, monkeypatch):
    flat_images("x.npz", 64)
    checkpoint("ckpt.pt", T=40)
    shown, predict = [], Diffusion.predict

    def counted(self, model, x_t, *given):
        shown.append(len(x_t))
        return predict(self, model, x_t, *given)

    monkeypatch.setattr(Diffusion, "predict", counted)
    if ranks > 1:
        as_one_of(monkeypatch, 1, ranks)
    flags = "--eval-only --ckpt ckpt.pt --data x.npz --batch 64 --device cpu".split()
    assert script("train.py", *flags) == 0
    assert 8 * 64 / ranks < sum(shown) <= 9 * 64 / ranks


def test_each_rank_measures_with_noise_of_its_own(here, monkeypatch):
    checkpoint("ckpt.pt")
    flat_images("x.npz", 8)
    seeds = []

    def draw_term(self, model, x0, t, y=None):
        seeds.append(torch.initial_seed())
        return torch.ones(len(x0))

    monkeypatch.setattr(Diffusion, "draw_term", draw_term)
    flags = "--eval-only --ckpt ckpt.pt --data x.npz --device cpu".split()
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            as_one_of(patch, rank, 2)
            assert script("train.py", *flags) == 0
    assert len(set(seeds)) == 2


@pytest.mark.parametrize("calls", [20, 7])
def test_one_image_is_measured_without_nan(calls, here, capsys):
    checkpoint("ckpt.pt")
    flat_images("x.npz", 3)
    flags = ["--data", "x.npz", "--ckpt", "ckpt.pt", "--eval-images", 1, "--eval-calls", calls]
    (total, n, *_), text = measure(capsys, *flags)
    assert n == 1 and total > 0
    assert "nan" not in text and "nan" not in open("terms.csv").read()


def test_digits_are_measured_on_others_than_were_trained_on(here, monkeypatch, capsys):
    import train

    draw, asked, seen = train.draw_digits, [], []

    def draw_few(n, size, seed):
        asked.append(draw(40, size, seed)[0])
        return draw(40, size, seed)

    def draw_term(self, model, x0, t, y=None):
        seen.append(to_pixels(x0).numpy())
        return torch.ones(len(x0))

    def main(*argv):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, argv)])
            patch.setattr(train, "draw_digits", draw_few)
            train.main()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    tiny = "--image-size 8 --channels 8 --channel-mult 1 --num-res-blocks 1 --attention none"
    tiny += " --num-heads 2 --T 20 --batch 4 --sample-every 0 --steps 1 --seed 3"
    main(*tiny.split())
    monkeypatch.setattr(Diffusion, "draw_term", draw_term)
    main("--eval-only", "--eval-calls", 20, "--seed", 3)
    assert "on 40 images" in capsys.readouterr().out
    trained, held_out = ({image.tobytes() for image in images} for images in asked)
    measured = {image.tobytes() for batch in seen for image in batch}
    assert measured == held_out and len(trained) == len(held_out) == 40
    assert not trained & held_out


def test_cifar10_is_measured_on_its_test_set(here, monkeypatch, capsys):
    class CIFAR10:
        classes = ["airplane", "automobile"]
        targets = [0, 1] * 5

        def __init__(self, root, train=True, download=False):
            self.data = np.full((10, 32, 32, 3), 80 if train else 20, np.uint8)
            self.data += np.arange(10, dtype=np.uint8)[:, None, None, None] * 4 + 2

    stand_in = types.SimpleNamespace(CIFAR10=CIFAR10)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", stand_in)
    checkpoint("ckpt.pt", T=4, image_size=32)
    drawn = know_terms(monkeypatch, term_of, prior_of)
    measure(capsys, "--data", "cifar10", "--ckpt", "ckpt.pt", "--eval-calls", 5)
    assert sorted({i for i, _ in drawn}) == list(range(5, 15))


# ---- Samples: from tensors to files ------------------------------------------------------------


def sample(*flags):
    assert script("sample.py", "--device", "cpu", "--dtype", "fp32", *flags) == 0


def draw_known(patch, image):
    """Have every walk pass through known images: image(k, i) uint8 (3, S, S) is the k-th image
    after step i. -> the list of the sizes of the batches."""
    sizes = []

    def trajectory(self, model, noise, *args, **more):
        begin, n = sum(sizes), len(noise)
        sizes.append(n)
        for i in reversed(range(self.num_steps)):
            x = torch.stack([image(k, i) for k in range(begin, begin + n)]).float() / 127.5 - 1
            yield i, x, x

    patch.setattr(Diffusion, "trajectory", trajectory)
    return sizes


def noise_images(n, size=8, seed=0):
    """n pictures of random pixels, uint8 (n, 3, size, size)."""
    return torch.from_numpy(
        np.random.default_rng(seed).integers(256, size=(n, 3, size, size), dtype=np.uint8)
    )


def pixels_of(path):
    """A picture's file -> int array (H, W, RGB)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_pixels_are_rounded_and_clipped():
    k = torch.arange(256, dtype=torch.float64)[:, None, None, None]
    for off, value in ((0, k), (0.45, k), (-0.45, k), (0.55, k + 1), (-0.55, k - 1)):
        pixels = to_pixels((k + off) / 127.5 - 1)
        assert pixels.dtype == torch.uint8 and torch.equal(pixels.double(), value.clamp(0, 255))
    x = torch.tensor([-1.0, 1, -1.5, 7, -100, 0.999, -0.999, 1 / 255])[None, None, None]
    assert to_pixels(x).flatten().tolist() == [0, 255, 0, 255, 0, 255, 0, 128]


def cells(picture, n, columns, size, zoom):
    """Take a grid apart -> its images (n, size, size, 3). The lines and empty cells are black."""
    rows, step = -(-n // columns), (size + 1) * zoom
    assert picture.shape == (rows * step - zoom, columns * step - zoom, 3)
    rest, found = picture.copy(), []
    for k in range(n):
        top, left = k // columns * step, k % columns * step
        block = picture[top : top + size * zoom, left : left + size * zoom]
        small = block[::zoom, ::zoom]
        assert (block == np.kron(small, np.ones((zoom, zoom, 1), int))).all()
        found.append(small)
        rest[top : top + size * zoom, left : left + size * zoom] = 0
    assert not rest.any()
    return np.array(found)


@pytest.mark.parametrize("n, columns, size, zoom", [(5, 3, 8, 8), (9, 3, 24, 2), (2, 2, 128, 1)])
def test_a_grid_shows_each_image_in_its_cell(n, columns, size, zoom):
    pixels = noise_images(n, size)
    picture = np.asarray(draw_grid(pixels)).astype(int)
    assert (cells(picture, n, columns, size, zoom) == pixels.permute(0, 2, 3, 1).numpy()).all()
    picture = np.asarray(draw_grid(pixels, columns=4)).astype(int)
    assert (cells(picture, n, 4, size, zoom) == pixels.permute(0, 2, 3, 1).numpy()).all()


@pytest.mark.parametrize("out", ["folder", "grid.png", "grid.PNG", "deep/arrays.npz"])
def test_known_images_become_known_bytes(out, here, monkeypatch, capsys):
    checkpoint("ckpt.pt", num_classes=3, class_names=("2", "0", "dog"))
    pixels = noise_images(7)
    sizes = draw_known(monkeypatch, lambda k, i: pixels[k] if i == 0 else 255 - pixels[k])
    sample("--ckpt", "ckpt.pt", "--n", 7, "--batch", 3, "--steps", 4, "--out", out)
    assert capsys.readouterr().out == f"{out}\n" and sizes == [3, 3, 1]
    expected = pixels.permute(0, 2, 3, 1).numpy()
    if out == "folder":
        assert sorted(os.listdir(out)) == [f"{k:06}.png" for k in range(7)]
        found = np.array([pixels_of(f"folder/{k:06}.png") for k in range(7)])
    elif out.endswith("npz"):
        file = np.load(out)
        found = file["arr_0"]
        assert found.dtype == np.uint8 and file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert file["class_names"].tolist() == ["2", "0", "dog"]
    else:
        found = cells(pixels_of(out), 7, 3, 8, 8)
    assert found.shape == expected.shape and (found == expected).all()


def test_the_last_allowed_size_and_folders_with_a_dot_are_allowed(here, monkeypatch):
    with command("sample.py"):
        kind_of_output = runpy.run_path(os.path.join(ROOT, "sample.py"))["kind_of_output"]
    assert kind_of_output(Namespace(out="x.gif", n=4096)) == ".gif"
    with pytest.raises(ValueError, match="--n 4097 is too much"):
        kind_of_output(Namespace(out="x.gif", n=4097))
    os.mkdir("images.v2")
    assert kind_of_output(Namespace(out="images.v2", n=5000)) == "folder"
    os.mkdir("x.png")
    with pytest.raises(ValueError, match="--out x.png is a folder"):
        kind_of_output(Namespace(out="x.png", n=1))


@pytest.mark.parametrize("out", ["locked/x.png", "locked/x.npz", "locked", "locked/new"])
def test_what_cannot_be_written_is_refused_before_anything_is_drawn(out, nobody, capsys):
    checkpoint("ckpt.pt")
    os.mkdir("locked", 0o555)
    refused(capsys, f"--out {out}: cannot write there .Permission denied", "--ckpt", "ckpt.pt",
            "--out", out)  # fmt: skip


def test_pictures_of_an_earlier_call_are_named(here, capsys):
    checkpoint("ckpt.pt")
    flags = ["--ckpt", "ckpt.pt", "--steps", 1, "--out", "images", "--n"]
    sample(*flags, 3)
    open("images/notes.txt", "w").close()
    assert "other files" not in capsys.readouterr().err
    sample(*flags, 1)
    said = "images holds 3 other files: 000001.png, 000002.png, notes.txt\n"
    assert said in capsys.readouterr().err and len(os.listdir("images")) == 4


def test_an_error_names_the_checkpoint_that_was_found(here, capsys):
    for name, about, flags, named in (
        ("up", dict(low_res=4), (), "runs/up/ckpt.pt needs --low-res"),
        ("plain", {}, ("--low-res", "x.npz"), "runs/plain/ckpt.pt has no use for --low-res"),
        ("none", {}, ("--class", 1), "--class, --guidance: runs/none/ckpt.pt knows no classes"),
        ("cond", CLASSES, ("--class", 7), "--class 7: runs/cond/ckpt.pt has the classes"),
    ):
        os.makedirs(f"runs/{name}")
        checkpoint(f"runs/{name}/ckpt.pt", **about)
        newer = time.time() + len(os.listdir("runs"))
        os.utime(f"runs/{name}/ckpt.pt", (newer, newer))
        refused(capsys, named, *flags)


def test_64_images_are_drawn_and_the_line_counts_the_steps_that_are_left(here, monkeypatch, capsys):
    checkpoint("ckpt.pt", T=200)
    walks = record_walks(monkeypatch, draw=False)
    sample("--ckpt", "ckpt.pt", "--steps", 200)
    (walk,) = walks
    assert len(walk["noise"]) == 64 and walk["self"].num_steps < 200
    assert f"ckpt.pt: 64 images in {walk['self'].num_steps} steps" in capsys.readouterr().err


def test_the_result_is_told_once_all_ranks_have_drawn(here, monkeypatch, capsys):
    checkpoint("ckpt.pt")
    told = []
    monkeypatch.setattr(
        sampler_file, "gather", lambda values: told.append(capsys.readouterr().out) or values
    )
    sample("--ckpt", "ckpt.pt", "--n", 1, "--steps", 1, "--out", "images")
    assert told == ["", ""] and capsys.readouterr().out == "images\n"


def test_arrays_without_classes_hold_no_labels(here):
    checkpoint("ckpt.pt")
    sample("--ckpt", "ckpt.pt", "--n", 1, "--steps", 1, "--out", "x.npz")
    assert np.load("x.npz").files == ["arr_0"]
    checkpoint("ckpt.pt", num_classes=2)  # whose names are not known
    sample("--ckpt", "ckpt.pt", "--n", 3, "--steps", 1, "--out", "y.npz")
    file = np.load("y.npz")
    assert sorted(file.files) == ["arr_0", "arr_1"] and file["arr_1"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("steps, frames, batch", [(6, range(5, -1, -1), 2), (120, None, 64)])
def test_a_gif_goes_from_noise_to_the_images(steps, frames, batch, here, monkeypatch):
    checkpoint("ckpt.pt", T=200)

    def flat(k, i):
        return torch.tensor([250 - 2 * i, 40 * k, 2 * i])[:, None, None].expand(3, 8, 8)

    draw_known(monkeypatch, flat)
    flags = ["--ckpt", "ckpt.pt", "--n", 5, "--steps", steps, "--batch", batch, "--order", 1]
    sample(*flags, "--out", "x.gif")
    frames = frames or [round(119 - k * 119 / 39) for k in range(40)]  # 40 at most, evenly
    with Image.open("x.gif") as gif:
        assert gif.n_frames == len(frames) and gif.info["loop"] == 0
        times = []
        for frame, i in enumerate(frames):
            gif.seek(frame)
            times.append(gif.info["duration"])
            found = cells(np.asarray(gif.convert("RGB")).astype(int), 5, 3, 8, 8)
            for k in range(5):
                assert abs(found[k] - flat(k, i).permute(1, 2, 0).numpy()).max() <= 2, (frame, k)
        assert len(set(times[:-1])) == 1 and times[-1] > 10 * times[0]


def test_ctrl_c_leaves_no_half_file(here, monkeypatch, capsys):
    checkpoint("ckpt.pt")
    save, saved = Image.Image.save, []

    def interrupted(self, file, *args, **more):
        if len(saved) == 3:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGINT)
        saved.append(save(self, file, *args, **more))

    monkeypatch.setattr(Image.Image, "save", interrupted)
    flags = ["--ckpt", "ckpt.pt", "--n", 9, "--batch", 2, "--steps", 2, "--device", "cpu"]
    assert script("sample.py", *flags, "--out", "images") == 130
    out, errors = capsys.readouterr()
    assert not out and "Traceback" not in errors
    assert sorted(os.listdir("images")) == ["000000.png", "000001.png", "000002.png"]
    for out in ("x.png", "x.gif"):
        saved[:] = [None] * 3
        assert script("sample.py", *flags, "--out", out) == 130
    assert sorted(os.listdir(".")) == ["ckpt.pt", "images"]


# ---- Samples: what is drawn --------------------------------------------------------------------


def colour_of(y):
    """The colour (N, 3) that stands for class y; -1 has one too."""
    return torch.stack([0.1 * y - 0.5, -0.15 * y + 0.3, 0.05 * y], dim=1).float()


def draw_colours(patch, T=20):
    """Replace the network by one which knows what it shall draw: the colour of its class, or, if
    it is an upsampler, its small image moved by that colour. -> what it was given, a list."""
    abar = torch.from_numpy(cosine(T))

    def out(self, x, time, y, low_res):
        target = 0 if y is None else colour_of(y)[:, :, None, None]
        if low_res is not None:
            target = target + low_res.repeat_interleave(2, 2).repeat_interleave(2, 3)
        at = abar[(time.double() * T / 1000).round().long()].view(-1, 1, 1, 1)
        eps = (x - at.sqrt() * target) / (1 - at).sqrt()
        return torch.cat([eps, torch.zeros_like(eps)], dim=1).float()

    return see_network(patch, out)


def bytes_of(x):
    """[-1, 1] -> the nearest of 0 … 255."""
    return np.clip((np.asarray(x) + 1) * 127.5, 0, 255).round().astype(int)


CLASSES = dict(num_classes=3, class_names=("2", "0", "dog"))


@pytest.mark.parametrize(
    "flags", ["", "--order 1", "--method ddim", "--guidance 3", "--guidance 0.5"]
)
def test_each_image_is_of_its_label_in_every_batch(flags, here, monkeypatch):
    checkpoint("ckpt.pt", **CLASSES, label_dropout=0.1)
    draw_colours(monkeypatch)
    flags = ["--ckpt", "ckpt.pt", "--n", 8, "--batch", 5, "--steps", 5, *flags.split()]
    sample(*flags, "--out", "x.npz")
    sample(*flags, "--out", "images")
    y = torch.arange(8) % 3  # each class in turn
    target = colour_of(y)
    if "--guidance" in flags:  # so many times as far from what is drawn without a class
        none = colour_of(torch.full_like(y, -1))
        target = none + float(flags[-1]) * (target - none)
    file = np.load("x.npz")
    assert file["arr_1"].tolist() == y.tolist()
    expected = bytes_of(target)[:, None, None]
    assert abs(file["arr_0"].astype(int) - expected).max() <= 1
    for k in range(8):
        assert abs(pixels_of(f"images/{k:06}.png") - expected[k]).max() <= 1
        info = Image.open(f"images/{k:06}.png").info
        assert (info["label"], info["class"]) == (str(k % 3), ["2", "0", "dog"][k % 3])


@pytest.mark.parametrize("name, k", [("2", 0), ("0", 1), ("dog", 2), ("1", 1)])
def test_a_class_is_found_by_its_name_then_by_its_number(name, k, here, monkeypatch):
    checkpoint("ckpt.pt", **CLASSES)
    draw_colours(monkeypatch)
    sample("--ckpt", "ckpt.pt", "--n", 3, "--class", name, "--steps", 3, "--out", "x.npz")
    file = np.load("x.npz")
    assert file["arr_1"].tolist() == [k] * 3
    assert abs(file["arr_0"].astype(int) - bytes_of(colour_of(torch.tensor([k])))).max() <= 1


def test_guidance_needs_a_network_that_knows_images_without_class(here, monkeypatch, capsys):
    for name, about in {"plain": {}, "cond": CLASSES}.items():
        checkpoint(f"{name}.pt", **about)
        flags = ["--ckpt", f"{name}.pt", "--n", 1, "--device", "cpu", "--out", "x.png"]
        assert script("sample.py", *flags, "--guidance", 2) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("sample.py: error: ") and "--guidance" in error
        assert ("classes" if name == "plain" else "--label-dropout") in error
        assert script("sample.py", *flags, "--guidance", 1, "--steps", 1) == 0  # means none
        capsys.readouterr()
        os.remove("x.png")


def test_the_newest_run_is_drawn_from_else_the_checkpoint_in_assets(here, monkeypatch, capsys):
    walks = record_walks(monkeypatch, draw=False)
    for name, size, age in (("a", 8, 30), ("b", 24, 10), ("c", 32, 20)):
        checkpoint(f"runs/{name}/ckpt.pt", image_size=size)
        now = os.stat(".").st_mtime
        os.utime(f"runs/{name}/ckpt.pt", (now - age, now - age))
    sample("--n", 1)
    assert Image.open("samples.png").size == (48, 48)  # b's, twice as large
    sample("--n", 1, "--ckpt", "runs/c")  # a run for its checkpoint
    assert Image.open("samples.png").size == (64, 64)
    os.rename("runs", "elsewhere")
    capsys.readouterr()
    sample("--n", 1)  # this is not the directory of sample.py
    assert Image.open("samples.png").size == (64, 64)
    assert walks[-1]["noise"].shape == (1, 3, 16, 16) and walks[-1]["y"].tolist() == [0]
    path = os.path.relpath(os.path.join(ROOT, "assets", "digits.pt"))
    assert path in capsys.readouterr().err


def test_a_copy_inside_a_run_is_no_run(here, monkeypatch):
    walks = record_walks(monkeypatch, draw=False)
    checkpoint("runs/a/ckpt.pt", image_size=24)
    checkpoint("runs/a/copy/ckpt.pt")
    os.utime("runs/a/ckpt.pt", (10**9, 10**9))
    sample("--n", 1)
    assert walks[0]["noise"].shape == (1, 3, 24, 24)


# ---- Samples: how they are drawn ---------------------------------------------------------------


def record_walks(patch, draw=True):
    """Record the arguments of every walk, and its process. Without draw, it is one step to 0."""
    trajectory, walks = Diffusion.trajectory, []
    signature = inspect.signature(trajectory)

    def recorded(*args, **more):
        given = signature.bind(*args, **more)
        given.apply_defaults()
        walks.append(dict(given.arguments))
        x = torch.zeros_like(walks[-1]["noise"])
        return trajectory(*args, **more) if draw else iter([(0, x, x)])

    patch.setattr(Diffusion, "trajectory", recorded)
    return walks


def test_each_flag_of_the_sampler_reaches_it_and_changes_the_image(here, monkeypatch):
    checkpoint("ckpt.pt", num_classes=3, label_dropout=0.1, T=60, noise=0.3)
    walks, found = record_walks(monkeypatch), {}
    for name, flags in enumerate((
        "", "--order 1", "--order 1 --variance small", "--order 1 --variance large",
        "--method ddim", "--method ddim --eta 0.5", "--method ddim --order 1", "--steps 5",
        "--steps 5 --spacing 2", "--guidance 2", "--class 2", "--seed 1",
    )):  # fmt: skip
        out = f"{name}.npz"
        sample("--ckpt", "ckpt.pt", "--n", 2, "--steps", 8, *flags.split(), "--out", out)
        found[flags] = np.load(out)["arr_0"].astype(int)
        words = dict(zip(flags.split()[::2], flags.split()[1::2]))
        walk = walks.pop()
        process = walk["self"]
        assert walk["method"] == words.get("--method", "ancestral")
        assert walk["order"] == int(words.get("--order", 2))
        assert walk["eta"] == float(words.get("--eta", 0))
        assert process.variance == words.get("--variance", "learned")
        assert process.num_steps == int(words.get("--steps", 8)) and not walks
        assert (process.alphas_bar[-1] >= 2 / 64) == (walk["order"] == 2)  # where it begins
        assert process.T == 60
        assert walk["y"].tolist() == ([2, 2] if "--class" in words else [0, 1])
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert abs(a[0] - b[0]).max() > 1, (one, other)


def test_a_learned_variance_is_drawn_with_where_there_is_one(here, capsys):
    checkpoint("learned.pt")
    checkpoint("large.pt", variance="large")
    flags = "--n 1 --steps 2 --order 1 --variance learned --device cpu --ckpt".split()
    assert script("sample.py", *flags, "learned.pt") == 0
    assert script("sample.py", *flags, "large.pt") == 2
    assert "--variance learned: the checkpoint predicts" in capsys.readouterr().err


def test_a_network_without_v_is_drawn_with_the_variance_of_its_training(here, monkeypatch):
    walks = record_walks(monkeypatch)
    for variance in ("small", "large"):
        checkpoint("ckpt.pt", variance=variance)
        sample("--ckpt", "ckpt.pt", "--n", 1, "--steps", 2, "--order", 1)
        assert walks[-1]["self"].variance == variance


def test_the_process_of_a_plain_state_dict_is_what_the_flags_say(here, monkeypatch):
    torch.save(golden_weights(), "plain.pt")
    walks = record_walks(monkeypatch, draw=False)
    flags = "--ckpt plain.pt --n 1 --schedule linear --T 60 --order 1 --steps 6".split()
    sample(*flags)
    sample(*flags, "--time-scale", 0.5, "--num-heads", 2)
    for walk, last, heads in zip(walks, (59 * 1000 / 60, 59 * 0.5), (4, 2)):
        alphas_bar, process = products(linear_betas(60)), walk["self"]
        assert process.T == 60 and process.times[-1] == pytest.approx(last)
        assert process.alphas_bar[-1].item() == pytest.approx(alphas_bar[-1])
        assert walk["model"].config.num_heads == heads


def test_few_steps_begin_where_the_mean_of_the_pixels_is_mostly_noise():
    assert few_steps(4000, 32) == dict(steps=25, min_alpha_bar=1 / 512, spacing=1.15)
    assert few_steps(7, 16)["steps"] == 7
    # The mean of S·S pixels of x_t is sqrt(alphas_bar)·m + noise of 1/S: for colours m of ±0.5 or
    # so, the signal may not stand out of the noise with which sampling begins.
    for size in (8, 64, 256):
        signal = 0.5 * few_steps(1000, size)["min_alpha_bar"] ** 0.5
        assert 0.5 / size < signal < 1 / size


@pytest.mark.parametrize(
    "flags, T, times",
    [
        ("--order 1 --steps 5", 20, [0, 5, 10, 14, 19]),  # 9.5 rounds to the even 10
        ("--order 1 --steps 5 --spacing 2", 20, [0, 1, 5, 11, 19]),
        ("--order 1 --steps 1", 20, [19]),
        ("--order 1", 20, range(20)),  # fewer than 25
        ("--order 1 --steps 20 --spacing 3", 20, range(20)),
        ("--order 1", 49, range(0, 49, 2)),  # 25 steps of 0 … 48
        ("", 1000, None),
        ("--steps 4 --method ddim", 1000, None),
    ],
)
def test_the_network_is_shown_the_timesteps_that_were_asked_for(flags, T, times, here, monkeypatch):
    checkpoint("ckpt.pt", T=T)
    seen = see_network(monkeypatch)
    sample("--ckpt", "ckpt.pt", "--n", 2, *flags.split())
    if times is None:  # second order begins where alphas_bar is still 2 / (8·8)
        last = np.flatnonzero(cosine(T) >= 2 / 64).max()
        assert 800 < last < 950
        steps = 4 if "--steps" in flags else 25
        times = [round((i / (steps - 1)) ** 1.15 * last) for i in range(steps)]
    expected = [t * 1000 / T for t in reversed(times)]
    assert [call["t"].tolist() for call in seen] == [pytest.approx([time] * 2) for time in expected]


def test_ddim_draws_what_plain_lines_of_it_draw(here):
    model = checkpoint("ckpt.pt", noise=0.3)
    flags = "--n 2 --order 1 --method ddim --steps 5 --spacing 2 --seed 7 --out x.npz".split()
    sample("--ckpt", "ckpt.pt", *flags)
    x = torch.stack([torch.randn(3, 8, 8, generator=generator(7, i)) for i in range(2)])
    times, abar = [0, 1, 5, 11, 19], cosine(20)
    for i in (4, 3, 2, 1, 0):
        before = abar[times[i - 1]] if i else 1.0
        with torch.no_grad():
            eps = model(x, torch.full((2,), times[i] * 50.0))[:, :3]
        at = abar[times[i]]
        x0_hat = ((x - (1 - at) ** 0.5 * eps) / at**0.5).clamp(-1, 1)
        eps = (x - at**0.5 * x0_hat) / (1 - at) ** 0.5
        x = before**0.5 * x0_hat + (1 - before) ** 0.5 * eps
    found = np.load("x.npz")["arr_0"]
    assert found.std() > 20  # something to see
    assert abs(found - bytes_of(x.permute(0, 2, 3, 1))).max() <= 1


def test_dtype_is_that_of_the_networks_products(here, monkeypatch):
    checkpoint("ckpt.pt")
    seen = see_network(monkeypatch)
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        seen.clear()
        flags = ["--ckpt", "ckpt.pt", "--n", 1, "--steps", 2, "--device", "cpu", "--dtype", name]
        assert script("sample.py", *flags) == 0
        assert [call["dtype"] for call in seen] == [dtype] * 2


@pytest.fixture(scope="module")
def drawn_by_two_ranks(tmp_path_factory, beside):
    folder = tmp_path_factory.mktemp("drawn")
    checkpoint(folder / "ckpt.pt", **CLASSES, noise=0.3)
    flags = "--ckpt ckpt.pt --n 7 --steps 4 --batch 2 --device cpu --dtype fp32 --out ranks.npz"
    torchrun = [*TORCHRUN, os.path.join(ROOT, "sample.py"), *flags.split()]
    return folder, beside.submit(run_python, folder, *torchrun)


def test_image_i_of_a_seed_is_the_same_in_any_batch_and_on_any_rank(
    drawn_by_two_ranks, monkeypatch, capsys
):
    folder, drawing = drawn_by_two_ranks
    drawn = drawing.result()
    assert drawn.returncode == 0 and drawn.stdout == "ranks.npz\n", drawn.stderr
    monkeypatch.chdir(folder)
    flags = ["--ckpt", "ckpt.pt", "--steps", 4, "--out"]
    sample(*flags, "all.npz", "--n", 7)
    sample(*flags, "parts.npz", "--n", 7, "--batch", 3)
    sample(*flags, "seed.npz", "--n", 7, "--seed", 1)
    for rank in (1, 0):  # a folder needs no exchange
        with monkeypatch.context() as patch:
            as_one_of(patch, rank, 2)
            sample(*flags, "images", "--n", 7, "--batch", 2)
        names = [f"{k:06}.png" for k in range(7)]
        assert sorted(os.listdir("images")) == (names[1::2] if rank else names)
    files = {name: np.load(f"{name}.npz") for name in ("all", "parts", "seed", "ranks")}
    found = {name: file["arr_0"].astype(int) for name, file in files.items()}
    found["images"] = np.array([pixels_of(f"images/{name}") for name in names])
    for name in ("parts", "ranks", "images"):  # the batch changes the last bit of a sum, no more
        assert abs(found["all"] - found[name]).max() <= 1, name
    assert files["ranks"]["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    several = [*found["all"], *found["seed"]]
    assert all(abs(a - b).max() > 20 for a, b in itertools.combinations(several, 2))


# ---- Samples: a folder is resumed --------------------------------------------------------------


def ages(folder="images"):
    return {name: os.stat(f"{folder}/{name}").st_mtime_ns for name in os.listdir(folder)}


def test_a_folder_is_resumed_where_it_stopped(here, monkeypatch, capsys):
    checkpoint("ckpt.pt", noise=0.3)
    flags = ["--ckpt", "ckpt.pt", "--steps", 2, "--out"]
    sample(*flags, "images", "--n", 4)
    sample(*flags, "whole", "--n", 6)
    before = ages()
    os.remove("images/000001.png")
    open("images/000002.png", "wb").close()
    open("images/000003.png", "wb").write(b"no picture")
    walks = record_walks(monkeypatch)
    assert "already" not in capsys.readouterr().err
    sample(*flags, "images", "--n", 6)
    assert "images holds 1 of these images already\n" in capsys.readouterr().err
    assert [len(walk["noise"]) for walk in walks] == [5]  # what was there is not drawn again
    assert ages()["000000.png"] == before["000000.png"]
    for k in range(6):
        one, other = (pixels_of(f"{folder}/{k:06}.png") for folder in ("images", "whole"))
        assert abs(one - other).max() <= 1
    before = ages()
    sample(*flags, "images", "--n", 5)  # all there
    assert ages() == before and len(walks) == 1


def test_a_picture_that_was_cut_short_is_drawn_again(here):
    checkpoint("ckpt.pt", noise=0.3)
    flags = ["--ckpt", "ckpt.pt", "--steps", 2, "--n", 2, "--out", "images"]
    sample(*flags)
    whole = open("images/000001.png", "rb").read()
    open("images/000001.png", "wb").write(whole[: whole.index(b"IDAT") + 40])  # half its pixels
    sample(*flags)
    assert open("images/000001.png", "rb").read() == whole


@pytest.mark.parametrize(
    "other",
    ["seed", "steps", "method", "order", "eta", "guidance", "spacing", "variance", "schedule",
     "T", "time_scale", "weights", "label"],
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused(other, here, capsys):
    checkpoint("ckpt.pt", **CLASSES, label_dropout=0.1)
    flags = "--n 2 --steps 2 --device cpu --out images --method ddim --eta 0.5".split()
    if other == "variance":
        flags[-4:] = ["--order", "1"]
    sample("--ckpt", "ckpt.pt", *flags)
    before = ages()
    more = {
        "seed": 1, "steps": 3, "method": "ancestral --eta 0", "order": 1, "eta": 0.25,
        "guidance": 2, "spacing": 2, "variance": "large", "label": "",
    }  # fmt: skip
    stored = dict(schedule="linear", T=19, time_scale=1.0)
    if other == "weights":
        checkpoint("ckpt.pt", **CLASSES, label_dropout=0.1, seed=1)
    elif other in stored:
        state = read_checkpoint("ckpt.pt")
        process = state["diffusion"] | {other: stored[other]}
        save_checkpoint("ckpt.pt", state | {"diffusion": process})
    else:
        flags += f"--{other} {more[other]}".split()
    if other == "label":
        flags[-1:] = ["--class", "dog"]
    capsys.readouterr()
    assert script("sample.py", "--ckpt", "ckpt.pt", *flags) == 2
    out, errors = capsys.readouterr()
    assert not out and ages() == before
    line = errors.splitlines()[-1]
    assert f"was drawn with another {other}: " in line and line.endswith("; take another --out")


def test_pictures_that_sample_did_not_draw_are_left_alone(here, capsys):
    checkpoint("ckpt.pt")
    os.mkdir("images")
    Image.new("RGB", (9, 9), "red").save("images/000001.png")
    flags = ["--ckpt", "ckpt.pt", "--n", 2, "--steps", 1, "--device", "cpu", "--out", "images"]
    before = ages()
    assert script("sample.py", *flags) == 2 and ages() == before
    assert "000001.png" in capsys.readouterr().err.splitlines()[-1]


def test_arrays_that_exist_are_not_overwritten(here, capsys):
    checkpoint("ckpt.pt")
    open("x.npz", "w").write("hours of work")
    assert script("sample.py", "--ckpt", "ckpt.pt", "--n", 1, "--out", "x.npz") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("sample.py: error: --out x.npz exists")
    assert open("x.npz").read() == "hours of work"


def test_a_picture_tells_how_it_was_drawn(here):
    model = checkpoint("a.pt", **CLASSES, label_dropout=0.1)
    flags = "--n 2 --seed 5 --steps 3 --spacing 2 --method ddim --order 1 --eta 0.5 --guidance 2"
    sample("--ckpt", "a.pt", *flags.split(), "--out", "images")
    sample("--ckpt", "a.pt", *flags.split(), "--out", "grid.png")
    weights = torch.cat([p.flatten() for p in model.parameters()]).detach().numpy()
    expected = {
        "seed": "5", "steps": "3", "spacing": "2.0", "method": "ddim", "order": "1", "eta": "0.5",
        "guidance": "2.0", "variance": "learned", "schedule": "cosine", "T": "20",
        "weights": f"{zlib.crc32(weights):08x}",
    }  # fmt: skip
    for name in ("images/000001.png", "grid.png"):
        info = Image.open(name).info
        assert expected.items() <= info.items()
    assert "label" not in info
    info = Image.open("images/000001.png").info
    assert info["label"] == "1" and info["class"] == "0"  # the name of class 1


def test_a_picture_of_one_class_tells_its_name(here):
    checkpoint("ckpt.pt", **CLASSES)
    sample("--ckpt", "ckpt.pt", "--n", 2, "--steps", 1, "--class", "dog", "--out", "images")
    for k in range(2):
        info = Image.open(f"images/{k:06}.png").info
        assert (info["label"], info["class"]) == ("2", "dog")


# ---- Samples: an upsampler's -------------------------------------------------------------------


def enlarged(small):
    """uint8 (N, h, w, 3) -> each pixel as 2×2, as draw_colours' upsampler does."""
    return np.asarray(small).astype(int).repeat(2, 1).repeat(2, 2)


def small_images(n, seed=0):
    return np.random.default_rng(seed).integers(256, size=(n, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("n, batch", [(None, 2), (3, 64), (8, 3)])
def test_small_arrays_are_enlarged_one_by_one(n, batch, here, monkeypatch):
    checkpoint("up.pt", low_res=4)
    draw_colours(monkeypatch)
    small = small_images(5)
    np.savez("small.npz", arr_0=small)
    flags = ["--ckpt", "up.pt", "--low-res", "small.npz", "--steps", 3, "--batch", batch]
    sample(*flags, *([] if n is None else ["--n", n]), "--out", "x.npz")
    found = np.load("x.npz")["arr_0"].astype(int)
    expected = enlarged(small[np.arange(n or 5) % 5])  # from the first again, if there are too few
    assert found.shape == expected.shape and abs(found - expected).max() <= 1


def test_small_pictures_are_enlarged_in_the_order_of_their_names(here, monkeypatch):
    checkpoint("up.pt", low_res=4)
    draw_colours(monkeypatch)
    small = small_images(3)
    os.mkdir("small")
    for name, pixels in zip(("b.png", "c.png", "a.png"), small):
        Image.fromarray(pixels).save(f"small/{name}")
    Image.fromarray(small[0]).convert("L").save("small/d.png")  # grey
    open("small/.hidden", "w").close()
    flags = ["--ckpt", "up.pt", "--steps", 3, "--out"]
    sample(*flags, "x.npz", "--low-res", "small")
    found = np.load("x.npz")["arr_0"].astype(int)
    grey = np.asarray(Image.fromarray(small[0]).convert("L"))[..., None].repeat(3, 2)
    expected = enlarged([small[2], small[0], small[1], grey])
    assert found.shape == expected.shape and abs(found - expected).max() <= 1
    sample(*flags, "y.npz", "--low-res", "small/c.png", "--n", 2)
    found = np.load("y.npz")["arr_0"].astype(int)
    assert found.shape == (2, 8, 8, 3) and abs(found - enlarged(small[[1]])).max() <= 1


def test_the_classes_of_small_arrays_are_taken_along(here, monkeypatch, capsys):
    checkpoint("up.pt", low_res=4, **CLASSES, label_dropout=0.1)
    draw_colours(monkeypatch)
    small, labels = small_images(4) // 4 + 96, np.array([2, 0, 0, 1])
    np.savez("small.npz", arr_0=small, arr_1=labels)

    def check(out, y):
        moved = enlarged(small[np.arange(len(y)) % 4]) / 127.5 - 1
        moved = moved + colour_of(torch.tensor(y))[:, None, None].numpy()
        file = np.load(out)
        assert file["arr_1"].tolist() == list(y)
        assert abs(file["arr_0"].astype(int) - bytes_of(moved)).max() <= 1

    flags = ["--ckpt", "up.pt", "--low-res", "small.npz", "--steps", 3, "--batch", 3, "--out"]
    sample(*flags, "a.npz")
    check("a.npz", [0, 1, 1, 1])  # the classes are named 2, 0 and dog: 1 is number 1
    sample(*flags, "b.npz", "--n", 6)
    check("b.npz", [0, 1, 1, 1, 0, 1])
    sample(*flags, "c.npz", "--class", "0")
    check("c.npz", [1, 1, 1, 1])
    sample(*flags, "d.npz", "--guidance", 1.5, "--class", "2")
    assert np.load("d.npz")["arr_1"].tolist() == [0] * 4
    np.savez("small.npz", arr_0=small, arr_1=labels + 1)
    assert script("sample.py", *flags, "e.npz") in (1, 2)
    assert "small.npz" in capsys.readouterr().err.splitlines()[-1]
    assert not os.path.exists("e.npz")


def test_the_classes_of_small_arrays_may_be_any_whole_numbers(here):
    checkpoint("up.pt", low_res=4, **CLASSES)
    for kind in (np.uint8, np.int32, np.int64):
        np.savez("small.npz", arr_0=small_images(3), arr_1=np.array([2, 0, 1], kind))
        out = f"{np.dtype(kind)}.npz"
        sample("--ckpt", "up.pt", "--low-res", "small.npz", "--steps", 1, "--out", out)
        assert np.load(out)["arr_1"].tolist() == [0, 1, 1]  # 1 is no name, but a number


def test_the_classes_of_small_arrays_are_matched_by_name(here, monkeypatch, capsys):
    checkpoint("up.pt", low_res=4, **CLASSES)  # the classes 2, 0 and dog
    np.savez(
        "small.npz", arr_0=small_images(3), arr_1=np.array([0, 1, 1]),
        class_names=np.array(["dog", "2"]),
    )  # fmt: skip
    flags = ["--ckpt", "up.pt", "--low-res", "small.npz", "--steps", 1, "--device", "cpu"]
    sample(*flags, "--out", "x.npz")
    assert np.load("x.npz")["arr_1"].tolist() == [2, 0, 0]


def test_a_folder_of_enlarged_images_is_that_of_its_small_images(here, capsys):
    checkpoint("up.pt", low_res=4)
    flags = ["--ckpt", "up.pt", "--low-res", "small.npz", "--steps", 1, "--out", "images"]
    np.savez("small.npz", arr_0=small_images(3))
    sample(*flags)
    sample(*flags)  # nothing is left to draw
    np.savez("small.npz", arr_0=small_images(3)[::-1])
    assert script("sample.py", *flags, "--device", "cpu") == 2
    assert "was drawn with another low_res" in capsys.readouterr().err


def test_each_enlarged_image_is_compared_with_its_own_small_one(here, capsys):
    checkpoint("up.pt", low_res=4)
    flags = ["--ckpt", "up.pt", "--low-res", "small.npz", "--steps", 1, "--out", "images"]
    np.savez("small.npz", arr_0=small_images(3))
    sample(*flags)
    np.savez("small.npz", arr_0=small_images(3)[[0, 2, 1]])
    assert script("sample.py", *flags, "--device", "cpu") == 2
    assert "000001.png was drawn with another low_res" in capsys.readouterr().err


def test_a_folder_that_is_resumed_enlarges_the_small_images_that_are_left(here, monkeypatch):
    checkpoint("up.pt", low_res=4)
    draw_colours(monkeypatch)
    small = small_images(3)
    np.savez("small.npz", arr_0=small)
    flags = ["--ckpt", "up.pt", "--low-res", "small.npz", "--steps", 3, "--out", "images"]
    sample(*flags, "--batch", 1)
    os.remove("images/000002.png")
    sample(*flags, "--batch", 1)
    assert abs(pixels_of("images/000002.png") - enlarged(small)[2]).max() <= 1


def test_a_small_picture_of_16_bits_is_that_of_8_bits(here):
    checkpoint("up.pt", low_res=4)
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(grey).save("8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save("16.png")
    for name in ("8", "16"):
        flags = ["--ckpt", "up.pt", "--low-res", f"{name}.png", "--steps", 1]
        sample(*flags, "--out", f"{name}.npz")
    assert (np.load("8.npz")["arr_0"] == np.load("16.npz")["arr_0"]).all()


def write_small_inputs():
    """What --low-res may wrongly be given, beside the right small.npz."""
    small = small_images(2)
    np.savez("small.npz", arr_0=small)
    np.savez("large.npz", arr_0=noise_images(2).permute(0, 2, 3, 1).numpy())
    np.savez("other.npz", other=small)
    np.savez("short.npz", arr_0=small, arr_1=np.zeros(1, int))
    np.savez("none.npz", arr_0=small[:0])
    np.savez("grey.npz", arr_0=small[..., 0])
    np.savez("float.npz", arr_0=small / 127.5 - 1)
    np.savez("flat.npz", arr_0=small[0, 0])
    np.save("array.npy", small)
    os.rename("array.npy", "array.npz")
    whole = open("small.npz", "rb").read()
    open("half.npz", "wb").write(whole[: len(whole) // 2])
    Image.new("RGB", (6, 4)).save("wide.png")
    os.mkdir("empty")
    os.mkdir("mixed")
    Image.new("RGB", (4, 4)).save("mixed/a.png")
    open("mixed/notes.txt", "w").write("no picture")


BAD_LOW_RES = """
    up.pt||up.pt.needs.--low-res
    plain.pt|--low-res=small.npz|plain.pt.has.no.use.for.--low-res
    up_cond.pt|--low-res=small.npz|--class.*small.npz
    up_cond.pt|--low-res=short.npz|short.npz
    up.pt|--low-res=nowhere.npz|nowhere.npz
    up.pt|--low-res=nowhere|nowhere
    up.pt|--low-res=large.npz|large.npz.*4.×.4;.found.8.×.8
    up.pt|--low-res=wide.png|wide.png.*4.×.4;.found.6.×.4
    up.pt|--low-res=other.npz|other.npz
    up.pt|--low-res=none.npz|none.npz
    up.pt|--low-res=grey.npz|grey.npz
    up.pt|--low-res=float.npz|float.npz
    up.pt|--low-res=flat.npz|flat.npz
    up.pt|--low-res=array.npz|array.npz
    up.pt|--low-res=half.npz|half.npz
    up.pt|--low-res=empty|empty
    up.pt|--low-res=mixed|notes.txt
    up.pt|--low-res=file|file
""".split()


@pytest.mark.parametrize("case", BAD_LOW_RES)
def test_wrong_small_images_end_in_one_line(case, here, capsys):
    ckpt, flags, named = case.split("|")
    checkpoint("plain.pt")
    checkpoint("up.pt", low_res=4)
    checkpoint("up_cond.pt", low_res=4, num_classes=3)
    write_small_inputs()
    open("file", "w").write("no picture")
    refused(capsys, named, "--ckpt", ckpt, *flags.split())


def refused(capsys, named, *flags):
    """The command must end in one line, which matches `named`, and write nothing."""
    before = sorted(os.walk("."))
    status = script("sample.py", "--device", "cpu", "--steps", 1, *flags)
    out, errors = capsys.readouterr()
    assert status in (1, 2) and not out and errors.count("\n") == 1
    assert errors.startswith("sample.py: error: ") and len(errors) < 400
    assert re.search(named, errors) and sorted(os.walk(".")) == before


BAD_SAMPLE = """
    --ckpt=nowhere.pt|nowhere.pt --ckpt=folder.png|folder.png --ckpt=file|file --ckpt=x.npz|x.npz
    --n=0|--n --n=-1|--n --n=x|--n --n=1e3|--n --n=99999|--n.99999 --n|--n
    --class=3|--class.3.*2,.0,.dog --class=-1|--class.*2,.0,.dog --class=cat|--class.cat.*2,.0,.dog
    --class=|--class --class=1.0|--class
    --guidance=-1|--guidance --guidance=x|--guidance --guidance=nan|--guidance
    --guidance=2|--label-dropout
    --seed=-1|--seed --seed=4294967296|--seed --seed=x|--seed
    --out=x.jpg|--out.x.jpg --out=|--out --out=folder.png|folder.png --out=file|file
    --out=file/x.png|file --out=file/x|file --out=x.npz|--out.x.npz
    --steps=0|--steps --steps=x|--steps --steps=21|--steps.21:.ckpt.pt.has.T.=.20 --spacing=0.5|--spacing --spacing=11|--spacing
    --method=none|--method --order=3|--order --order=x|--order --eta=1|--eta.*--method
    --method=ddim,--eta=2|--eta --method=ddim,--eta=nan|--eta --variance=fixed|--variance
    --variance=small|--variance.*--order.1 --method=ddim,--order=1,--variance=large|--variance
    --batch=0|--batch --batch=x|--batch --device=gpu|--device --dtype=fp8|--dtype
    --T=1|--T --schedule=x|--schedule --time-scale=-1|--time-scale --num-heads=0|--num-heads
    --num-heads=4|--num-heads.4.*ckpt.pt.has.2 --unknown|--unknown --step=3|--step word|word
""".split()


@pytest.mark.parametrize("case", BAD_SAMPLE)
def test_wrong_flags_of_sample_end_in_one_line(case, here, capsys):
    flags, named = case.split("|")
    checkpoint("ckpt.pt", **CLASSES)
    open("file", "w").write("no checkpoint")
    open("x.npz", "w").write("no arrays")
    os.mkdir("folder.png")
    refused(capsys, named.replace(".pt", r"\.pt"), "--ckpt", "ckpt.pt", *flags.split(","))


def test_a_class_of_a_network_without_classes_is_refused(here, capsys):
    checkpoint("ckpt.pt")
    refused(capsys, "--class", "--ckpt", "ckpt.pt", "--class", 0)


def test_a_device_that_is_not_there_is_refused(here, monkeypatch, capsys):
    checkpoint("ckpt.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capsys, "--device cuda", "--ckpt", "ckpt.pt", "--device", "cuda", "--n", 1)


def test_the_help_of_sample_fits_a_screen_and_names_every_flag(capsys):
    assert script("sample.py", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    flags = set(re.findall(r"^  (--[\w-]+)", "\n".join(lines), re.M))
    contract = "ckpt n class guidance low-res seed out steps spacing method order eta variance"
    contract += " batch device dtype T schedule time-scale num-heads"
    assert flags == {f"--{name}" for name in contract.split()}
    for default in ("samples.png", "ancestral", "2", "auto"):
        assert f"(default: {default})" in " ".join(lines)


# ---- The checkpoint in assets ------------------------------------------------------------------


def test_the_checkpoint_in_assets_draws_the_digits_asked_for(here, capsys):
    import train

    path = os.path.join(ROOT, "assets", "digits.pt")
    assert os.path.getsize(path) < 2_500_000
    sample("--n", 4, "--steps", 3, "--class", 7)  # where there are no runs
    assert capsys.readouterr().out == "samples.png\n"
    assert Image.open("samples.png").size == (2 * 68 - 4, 2 * 68 - 4)
    model, process = load_checkpoint(path)
    pixels, digits = train.draw_digits(64, 16, seed=5)
    x0, y = torch.from_numpy(pixels).float() / 127.5 - 1, torch.tensor([int(d) for d in digits])
    t, noise = torch.full((64,), 700), torch.randn(x0.shape, generator=generator(0, 1))
    walk = Diffusion(**process)
    with torch.no_grad():
        right, wrong = (
            walk.losses(model, x0, t, k, noise, "simple")[0].mean() for k in (y, (y + 1) % 10)
        )
    assert right < 0.03 and wrong > 1.1 * right
