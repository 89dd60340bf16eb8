"""What the code claims, and what shows it: the mathematics, the samplers of t, and the network.

Mathematics is compared with closed forms, float64 arithmetic written anew, Monte Carlo within 4.5
standard errors, or numbers from OpenAI's code. GPUs and MPS are hidden: what is claimed to the bit
is claimed for CPUs, and a wrong device must be wrong everywhere.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import os
import pickle
import re
import runpy
import types

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # one thread: tiny networks

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.distributions import Normal, kl_divergence

torch.backends.mps.is_available = functools.cache(lambda: False)

import model as model_file
import sampler as sampler_file
from diffusion import (
    SAMPLERS, SCHEDULES, Diffusion, ancestral, bits, cosine_betas, ddim, decoder_log_likelihood,
    estimate_bits_per_dim, few_steps, generator, guided, linear_betas, normal_kl, randn_like,
    select_timesteps,
)  # fmt: skip
from model import (
    Attention, GroupNorm, ResBlock, UNet, UNetConfig, attend, autocast, from_openai,
    load_checkpoint, make_picture, number, pick_device, pick_dtype, timestep_embedding, to_pixels,
)  # fmt: skip
from sampler import ImportanceSampler, UniformSampler

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
        (5, 99, 1, [0, 25, 50, 74, 99]),  # 0, 24.75, 49.5 (to even), 74.25, 99
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
        *((dict(steps=steps), "steps") for steps in (
            0, 4001, -1, [], [-1, 5], [4000], [5, 5], [5, 4], [0, 2, 1], np.array([1.0, 2.0]),
            [[1, 2]], np.int64(4001), torch.tensor([3, 1]), [math.nan])),
        *((dict(schedule=betas), "betas") for betas in (
            [0.5, 1.5], [0.0, 0.5], [0.5, 1.0], [0.5, math.nan], [-0.1, 0.5], [[0.1]], [], 0.1)),
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
        (few_steps, dict(steps=25, schedule="cosine")),
        (estimate_bits_per_dim, dict(y=None, calls=8)), (randn_like, dict(generators=None)),
        (generator, dict(device="cpu", stream="noise")), (make_picture, dict(columns=None)),
        (ImportanceSampler, dict(history=10, uniform=0.001)),
    ):  # fmt: skip
        parameters = inspect.signature(function).parameters.values()
        found = {p.name: p.default for p in parameters if p.default is not p.empty}
        assert found == expected, function
    assert list(SAMPLERS) == ["ancestral", "ddim", "dpm++"]
    assert dataclasses.asdict(UNetConfig()) == CIFAR10 | dict(dropout=0.3, norm_groups=0)

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
    for t in map(torch.tensor, ([0, 9], [-1, 3])):
        for method, given in (("add_noise", (x, t, x)), ("posterior", (x, x, t)),
                              ("losses", (toy, x, t)), ("reverse", (x, x, x, t))):  # fmt: skip
            with pytest.raises(ValueError, match=r"\bt must be 0 … 8"):
                getattr(diffusion, method)(*given)
    t, pixels = torch.tensor([1, 8]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for method, given in (("add_noise", (pixels, t, x)), ("losses", (toy, pixels, t, None, x)),
                          ("prior", (pixels,))):  # fmt: skip
        with pytest.raises(ValueError, match="x0 .*must be .* not torch.uint8"):
            getattr(diffusion, method)(*given)

def test_the_mean_without_clipping_is_eq_13():
    diffusion, x_t, eps = Diffusion("linear", 100), randn(3, 3, 4, 4), randn(3, 3, 4, 4, seed=1)
    t = torch.tensor([0, 17, 99])
    mean = diffusion.reverse(eps, eps, x_t, t, clip=False)[0]
    alphas_bar = (1 - linear_betas(100)).cumprod(0)
    beta, a = (table[t].view(3, 1, 1, 1) for table in (linear_betas(100), alphas_bar))
    expected = (x_t - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()
    assert_allclose(mean, expected, atol=1e-9)

def test_learned_variance_lies_between_small_and_large():
    t, x_t = torch.tensor([0, 1, 30]), randn(3, 3, 4, 4)
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
        with pytest.raises(ValueError, match=f"returned {channels} channels"):
            Diffusion(variance=variance).predict(model, x, t)

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

def test_every_term_of_the_bound_is_measured_with_x0_hat_clipped():
    # x0_hat is far outside [-1, 1] at large t.
    model, seen = watched(lambda x, time, y: 3 * toy(x, time))
    diffusion, x0, y = Diffusion("linear", 300, steps=6), images(3, size=32), torch.arange(3)
    torch.manual_seed(0)
    terms, prior = diffusion.bits_per_dim(model, x0, y)
    assert terms.shape == (3, 6) and torch.equal(prior, diffusion.prior(x0))
    assert [time.tolist() for _, time, _ in seen] == [[k] * 3 for k in diffusion.times.tolist()]
    for i, (x_t, time, label) in enumerate(seen):
        assert torch.equal(label, y)
        eps, v = (3 * toy(x_t, time)).chunk(2, dim=1)
        expected = terms_by_hand(diffusion, torch.tensor([i] * 3), eps, v, x0, x_t)
        assert_allclose(terms[:, i], expected, rtol=1e-6)
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
    for calls in (21, 41, 81):
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
    for calls in (21, 41, 81):
        assert errors[2, calls] < errors[1, calls] / 20
    for order, factor in ((1, 2), (2, 4)):  # half the step
        assert errors[order, 21] / errors[order, 41] == pytest.approx(factor, rel=0.15)
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

# ---- Beyond the paper: few steps, guidance, the bound from a few calls -------------------------

@pytest.mark.parametrize("T, size, schedule", [(4000, 32, "cosine"), (400, 8, "linear")])
def test_few_steps_begin_where_the_mean_pixel_is_lost_in_noise(T, size, schedule):
    # The last timestep whose alphas_bar is at least 2/(H·W). With the cosine schedule, alphas_bar
    # of index t is cos²(((t+1)/T + s)/(1+s)·π/2) / cos²(s/(1+s)·π/2).
    a = np.cumprod([1 - 1000 / T * (1e-4 + 0.0199 * t / (T - 1)) for t in range(T)])
    if schedule == "cosine":
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        a = f[1:] / f[0]
    last = max(t for t in range(T) if a[t] >= 2 / size**2)
    for n in (10, 25):
        steps = [max(i, round((i / (n - 1)) ** 1.15 * last)) for i in range(n)]
        assert few_steps(T, size, n, schedule) == steps and steps[-1] == last < T - 1
    # More steps than are left: all that are left. At least one.
    assert few_steps(T, size, T, schedule) == [*range(last + 1)]
    assert few_steps(T, 1, 25, schedule) == [0]

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

def test_each_call_of_an_estimate_has_noise_of_its_own_and_clips_x0_hat():
    torch.manual_seed(0)
    (model, seen), diffusion, x0 = watched(), Diffusion("cosine", 200), images(3, size=32)
    terms = estimate_bits_per_dim(diffusion, model, x0, calls=4)[1]
    assert_noise(noise_seen(diffusion, x0, seen))
    drawn = steps_seen(diffusion, seen)
    for t, (x_t, time, _) in zip(drawn, seen):
        expected = terms_by_hand(diffusion, t, *toy(x_t, time).split(3, 1), x0, x_t)
        once = (drawn == t).sum(0) == 1  # t was not drawn again
        assert_allclose(terms.gather(1, t[:, None])[once, 0], expected[once], rtol=1e-6)
    total, terms, prior = estimate_bits_per_dim(Diffusion("linear", 2), toy, x0, calls=1)
    assert_allclose(total, terms.sum(1) + prior, rtol=1e-6)  # there is one t ≥ 1

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

def test_uniform_sampler_draws_each_t_equally():
    sampler = UniformSampler(5)
    t, weights = sampler.sample(50_000, generator(0, 0))
    assert (weights == 1).all() and (abs(torch.bincount(t) - 10_000) < 4.5 * 8000**0.5).all()
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(t, sampler.sample(50_000, generator(0, 0))[0])  # all randomness is its
    sampler.update(t, weights)
    assert sampler.state_dict() == {} and sampler.sample(3)[0].shape == (3,)  # old runs load
    assert sampler_file.T_SAMPLERS == dict(uniform=UniformSampler, importance=ImportanceSampler)

def second_rank(monkeypatch, values):
    """Be one of two ranks, the other of which has these values."""
    sent = []

    def all_gather(rows, mine):
        assert len(rows) == 2 and all(row.shape == mine.shape for row in rows)
        theirs = mine.new_zeros(mine.shape) if sent else torch.tensor([len(values)])
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
    monkeypatch.setattr(sampler_file, "dist", group)

@pytest.mark.parametrize("T, length, uniform", [(4, 10, 0.001), (3, 2, 0.2)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_importance_sampler_keeps_the_last_losses_of_each_t(T, length, uniform, ranks, monkeypatch):
    how = {} if length == 10 else dict(history=length, uniform=uniform)
    rng, sampler = np.random.default_rng(0), ImportanceSampler(T, **how)
    history = [collections.deque(maxlen=length) for _ in range(T)]
    for size in (1, 3, 70, 5, 0, 40, 9, 1, 1, 80, 2):  # with 70, a t occurs more than ten times
        sizes = (size, abs(size - 4))[:ranks]  # ranks may have different numbers
        t = [rng.integers(T, size=size) for size in sizes]
        losses = [rng.uniform(0, 5, size) for size in sizes]
        for each in losses:
            for bad in (np.nan, np.inf, -np.inf):
                each[rng.uniform(size=len(each)) < 0.1] = bad
        if ranks == 2:
            second_rank(monkeypatch, torch.tensor(np.stack([t[1], losses[1]], 1)).float())
        sampler.update(torch.from_numpy(t[0]), torch.from_numpy(losses[0]))
        for i, loss in zip(np.concatenate(t), np.concatenate(losses)):
            history[i] += [loss] if np.isfinite(loss) else []
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
    monkeypatch.undo()
    assert sampler_file.gather(torch.tensor([3])).tolist() == [3]  # without other ranks

def test_importance_sampler_is_uniform_until_every_t_has_ten_losses():
    sampler, none, uniform = ImportanceSampler(3), ImportanceSampler(3), pytest.approx([1 / 3] * 3)
    sampler.update(torch.tensor([0] * 40 + [1] * 40 + [2] * 9), torch.arange(89.0))
    for loss, is_uniform in ((math.nan, True), (1.0, False)):
        assert sampler.probabilities().tolist() == uniform
        sampler.update(torch.tensor([2]), torch.tensor([loss]))
        assert (sampler.probabilities().tolist() == uniform) == is_uniform
    none.update(torch.arange(3).repeat(10), torch.zeros(30))  # no t is better than another
    assert none.probabilities().tolist() == uniform

def test_importance_weights_are_unbiased():
    sampler = ImportanceSampler(8)
    level = torch.tensor([50.0, 20, 9, 5, 3, 2, 1, 1])
    sampler.update(torch.arange(8).repeat(10), level.repeat(10))
    p, f = sampler.probabilities(), torch.arange(8.0) ** 2
    t, weights = sampler.sample(100_000, generator(1, 1))
    values = weights * f[t]
    assert abs(values.mean() - f.mean()) < 4.5 * values.std() / 100_000**0.5
    counts = torch.bincount(t, minlength=8)
    assert (abs(counts - 100_000 * p) < 4.5 * (100_000 * p).sqrt()).all()
    assert p[0] > 0.5 and torch.equal(t, sampler.sample(100_000, generator(1, 1))[0])

# ==== model.py: the network =====================================================================

def small_unet(**changes):
    """A small UNet whose parameters are all random, also those that start as zeros."""
    config = dict(image_size=8, channels=16, channel_mult=(1, 2), num_res_blocks=1, dropout=0.0,
                  attention_resolutions=(4,), num_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = UNet(UNetConfig(**config | changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
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
    assert torch.allclose(none.double(), model.double()(x.double(), t, y), atol=1e-5)

@pytest.mark.parametrize("low_res", [1, 4])
def test_an_upsampler_sees_the_enlarged_image_beside_x(low_res):
    model = small_unet(low_res=low_res, num_classes=2)
    plain = small_unet(in_channels=6, num_classes=2)
    plain.load_state_dict(model.state_dict())
    x, small = torch.randn(2, 3, 8, 8), torch.randn(2, 3, low_res, low_res)
    t, y = torch.tensor([3.0, 500]), torch.tensor([1, -1])
    large = torch.nn.functional.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    expected = plain(torch.cat([x, large], dim=1), t, y)
    assert torch.allclose(model(x, t, y, low_res=small), expected, atol=1e-5)
    for net, given, missing in (
        (model, (x, t, y), "low_res"), (small_unet(num_classes=2), (x, t, y, small), "low_res"),
        (small_unet(num_classes=2), (x, t), "y"), (small_unet(), (x, t, y), "y"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{missing} must be given if and only if"):
            net(*given)

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

def test_attention_is_softmax_attention_of_the_published_layout():
    layer, heads, C = Attention(8, UNetConfig(num_heads=2)).double(), 2, 8
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, conv1d = randn(2, C, 3, 3), torch.nn.functional.conv1d
    h = conv1d(layer.norm(x).flatten(2), layer.qkv.weight[..., 0], layer.qkv.bias)
    out = []
    for head in h.chunk(heads, dim=1):  # each head's channels are its q, its k, its v
        q, k, v = head.chunk(3, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / (C // heads) ** 0.5, dim=-1)
        out.append(torch.einsum("bts,bcs->bct", weight, v))
    h = conv1d(torch.cat(out, 1), layer.proj.weight[..., 0], layer.proj.bias)
    assert torch.allclose(layer(x), x + h.view_as(x), atol=1e-12)

@pytest.mark.parametrize("dtype, n", [(torch.float32, 3), (torch.bfloat16, 37)])
def test_attend_is_attention_in_any_precision(dtype, n):
    q, k, v = (randn(n, 2, 9, 4, seed=s).to(dtype) for s in (1, 2, 3))
    scores = torch.einsum("nhid,nhjd->nhij", q.double(), k.double()) / 2  # √4
    expected = torch.einsum("nhij,nhjd->nhid", scores.softmax(-1), v.double())
    found = attend(q, k, v)
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found - expected).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-5)

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
def test_in_autocast_products_have_16_bits_and_norms_32():
    torch.manual_seed(0)
    layer, x = Attention(32, UNetConfig(num_heads=4)), torch.randn(20, 32, 8, 8)
    torch.nn.init.normal_(layer.proj.weight)
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float32, 1e-6)):
        with autocast(torch.device("cpu"), dtype):
            found, normed, product = layer(x), layer.norm(x.to(dtype) + 100), x @ x
        assert (found - layer(x)).norm() / layer(x).norm() < tolerance and product.dtype == dtype
        expected = layer.norm((x.to(dtype) + 100).float())  # which bfloat16's sums would have lost
        assert normed.dtype == dtype and (normed - expected).abs().max() < 0.02

def test_impossible_networks_are_refused():
    for changes, message in (
        (dict(image_size=30), "image_size 30"), (dict(channel_mult=()), "image_size 32"),
        (dict(attention_resolutions=(5,)), "attention at 5"), (dict(channels=10), r"\b10\b"),
        (dict(num_heads=3, attention_resolutions=()), "heads"),  # of the middle
        (dict(num_heads=3, channel_mult=(1, 2, 3)), "heads"),
        *((dict(low_res=size), f"low_res {size}") for size in (5, 32, 64)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            UNetConfig(**changes)

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

def checkpoint_of(model):
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    process = dict(schedule="linear", T=30, variance="learned")
    about = dict(unet=vars(model.config), diffusion=process, classes=["cat", "Ü"], config={"lr": 1})
    return about | dict(ema=model.state_dict(), model=weights)

def test_a_checkpoint_gives_the_averaged_weights_ready_to_sample(tmp_path, monkeypatch):
    model = small_unet(dropout=0.5, num_classes=4, low_res=4)
    torch.save(checkpoint_of(model), tmp_path / "ckpt.pt")
    os.link(tmp_path / "ckpt.pt", tmp_path / "cifar10_uncond.pt")  # ours, whatever its name
    given = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2]), torch.tensor([0, 2])
    small, load, asked = torch.rand(2, 3, 4, 4), torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **how: asked.append(how) or load(*a, **how))
    for path in (tmp_path / "ckpt.pt", str(tmp_path), tmp_path, tmp_path / "cifar10_uncond.pt"):
        loaded, ckpt = load_checkpoint(path)
        assert loaded.config == model.config and not loaded.training
        assert torch.equal(loaded(*given, small), model(*given, small))
        assert ckpt["diffusion"] == dict(schedule="linear", T=30, variance="learned")
        assert ckpt["classes"] == ["cat", "Ü"] and ckpt["config"] == {"lr": 1}
    # A file written on a GPU is read where there is none.
    assert all(str(how["map_location"]) == "cpu" and how["weights_only"] for how in asked)

def test_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return os.system, ("touch was_run",)

    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint_of(small_unet()), "good")
    good = open("good", "rb").read()
    contents = {"cut": good[:-100], "half": good[: len(good) // 2], "empty": b""}
    contents |= {"text": b"hello", "pickle": pickle.dumps(Malicious())}
    for name, content in contents.items():
        open(name, "wb").write(content)
    foreign = {"malicious": {"unet": Malicious()}, "list": [1, 2], "numbers": {7: 8}, "seven": 7}
    # A file is OpenAI's by its own name, not its folder's.
    foreign["lsun_uncond/mine"] = {"some": torch.ones(1)}
    os.mkdir("lsun_uncond")
    for name, content in foreign.items():
        torch.save(content, name)
    for name in [*contents, *foreign]:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(name)
    assert not os.path.exists("was_run")
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

def test_numbers_of_flags_lie_between_their_limits(capsys):
    p = argparse.ArgumentParser()
    p.add_argument("--n", type=number(int, 1, 5)), p.add_argument("--x", type=number(float, 0))
    assert vars(p.parse_args(["--n", "5", "--x", "1e9"])) == dict(n=5, x=1e9)
    assert vars(p.parse_args(["--n", "1", "--x", "0"])) == dict(n=1, x=0.0)
    for wrong in ("--n 0", "--n 6", "--n 2.5", "--n two", "--x -0.1", "--x nan", "--x b"):
        with pytest.raises(SystemExit):
            p.parse_args(wrong.split())
        words = rf"error: argument {wrong[:3]}: (must be|invalid (int|float) value)"
        assert re.search(words, capsys.readouterr().err)
