"""What the code claims, and what shows it. Maths is compared with closed forms, torch.distributions,
numeric integration or Monte Carlo with a stated error; scripts run as a user runs them."""

import argparse
import collections
import contextlib
import fcntl
import functools
import glob
import hashlib
import http.server
import itertools
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

from diffusion import (
    Diffusion, cosine_betas, decoder_log_likelihood, generator, linear_betas, normal_kl,
)  # fmt: skip
from model import (
    OPENAI_NAMES, Attention, GroupNorm, UNet, UNetConfig, dropout, load_checkpoint, pick_device,
    read_checkpoint, save_checkpoint, timestep_embedding,
)  # fmt: skip
from sampler import ImportanceSampler, UniformSampler

LN2 = math.log(2)
PIXELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def images(n, size=4, seed=0):
    """Random images (n, 3, size, size) on the grid of pixel values, float64."""
    return PIXELS[torch.randint(256, (n, 3, size, size), generator=generator(seed, 0))]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, 1), dtype=torch.float64)


def constant_model(*outputs):
    """A model that always returns these ε (and v), whatever it is shown."""
    return lambda x, time, y: torch.cat(outputs, dim=1)


# ---- Schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [100, 1000, 4000])
def test_linear_betas_are_ho_et_als_scaled_to_T(T):
    expected = [1000 / T * (1e-4 + (0.02 - 1e-4) * i / (T - 1)) for i in range(T)]
    np.testing.assert_allclose(linear_betas(T), expected, rtol=1e-12)


@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_cosine_betas_follow_eq_17(T):
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T + 1)]
    np.testing.assert_allclose(cosine_betas(T), expected, rtol=1e-9)
    # The tables too, which a float32 schedule would miss by 1e-4 of a β: alphas_bar = f(t) / f(0).
    alphas_bar = Diffusion("cosine", T).alphas_bar
    np.testing.assert_allclose(alphas_bar[:-1], [f(t) / f(0) for t in range(1, T)], rtol=1e-9)


def test_index_0_has_one_step_of_noise():
    diffusion = Diffusion("linear", 1000)
    assert diffusion.alphas_bar[0] == pytest.approx(1 - 1e-4, abs=1e-15)
    product = 1.0
    for t, beta in enumerate(linear_betas(1000).tolist()):
        product *= 1 - beta
        assert diffusion.alphas_bar[t].item() == pytest.approx(product, rel=1e-12)


def test_skipped_steps_keep_both_ends_and_alphas_bar():
    whole, part = Diffusion("cosine", 1000), Diffusion("cosine", 1000, steps=7)
    steps = [0, 166, 333, 500, 666, 832, 999]  # round(i · 999 / 6), 499.5 to even
    assert torch.equal(part.alphas_bar, whole.alphas_bar[steps])
    ratios = [1 - whole.alphas_bar[b] / whole.alphas_bar[a] for a, b in zip(steps, steps[1:])]
    np.testing.assert_allclose(part.betas[1:], ratios, rtol=1e-12)  # eq. 19
    assert torch.equal(part.betas[:1], whole.betas[:1])
    assert torch.equal(Diffusion("cosine", 1000, steps=steps).betas, part.betas)
    assert torch.equal(Diffusion("cosine", 1000, steps=1000).betas, whole.betas)


def test_any_betas_make_a_process():
    sigmoid = torch.linspace(-6, 6, 50).sigmoid() * 0.02
    diffusion = Diffusion(sigmoid)
    assert diffusion.T == 50
    np.testing.assert_allclose(diffusion.alphas_bar, np.cumprod(1 - sigmoid.double()), rtol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [dict(schedule="sigmoid"), dict(T=1), dict(variance="fixed"), dict(steps=0), dict(steps=4001),
     dict(steps=[]), dict(steps=[-1, 5]), dict(steps=[4000]), dict(schedule=[0.5, 1.5])],
)  # fmt: skip
def test_impossible_processes_are_refused(arguments):
    with pytest.raises(ValueError):
        Diffusion(**arguments)


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


# ---- Gaussians ---------------------------------------------------------------------------------


def test_normal_kl_is_that_of_torch():
    m1, v1, m2, v2 = randn(4, 1000)
    expected = kl_divergence(Normal(m1, (v1 / 2).exp()), Normal(m2, (v2 / 2).exp()))
    np.testing.assert_allclose(normal_kl(m1, v1, m2, v2), expected, rtol=1e-9, atol=1e-12)


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


def test_decoder_has_a_finite_gradient_far_from_the_pixel():
    x0 = PIXELS.float()
    mean = torch.zeros(256, requires_grad=True)
    log_p = decoder_log_likelihood(x0, mean, torch.full((256,), -14.0))
    log_p.sum().backward()
    assert log_p.isfinite().all() and mean.grad.isfinite().all()
    assert (mean.grad.sign()[:120] == -1).all() and (mean.grad.sign()[-120:] == 1).all()


def test_prior_is_the_kl_to_the_standard_normal():
    diffusion, x0 = Diffusion("linear", 1000, steps=20), images(3)
    last = diffusion.alphas_bar[-1]
    kl = kl_divergence(Normal(last.sqrt() * x0, (1 - last).sqrt()), Normal(0 * x0, 1))
    np.testing.assert_allclose(diffusion.prior(x0), kl.flatten(1).mean(1) / LN2, rtol=1e-9)


# ---- p -----------------------------------------------------------------------------------------


def test_x0_hat_inverts_add_noise():
    diffusion, x0, noise = Diffusion("cosine", 1000), images(5), randn(5, 3, 4, 4)
    t = torch.tensor([0, 1, 300, 700, 950])
    x_t = diffusion.add_noise(x0, t, noise)
    model = constant_model(noise, 0 * noise)
    mean, _, x0_hat = diffusion.reverse(model, x_t, t)
    assert torch.allclose(x0_hat, x0, atol=1e-9)
    assert torch.allclose(mean, diffusion.posterior(x0, x_t, t)[0], atol=1e-9)


def test_x0_hat_is_clipped_before_the_mean_is_formed():
    diffusion, x_t, t = Diffusion("cosine", 100), randn(2, 3, 4, 4), torch.tensor([40, 90])
    model = constant_model(-50 + 0 * x_t, x_t)
    mean, _, x0_hat = diffusion.reverse(model, x_t, t)
    assert (x0_hat == 1).all()
    assert torch.equal(mean, diffusion.posterior(torch.ones_like(x_t), x_t, t)[0])
    assert diffusion.reverse(model, x_t, t, clip=False)[2].min() > 1


def test_learned_variance_lies_between_small_and_large():
    t, x_t = torch.tensor([1, 30]), randn(2, 3, 4, 4)
    learned, small, large = (Diffusion("linear", 100, v) for v in ("learned", "small", "large"))
    beta, alphas_bar = linear_betas(100)[t], learned.alphas_bar
    tilde = beta * (1 - alphas_bar[t - 1]) / (1 - alphas_bar[t])
    for v, log in (
        (-1, tilde.log()),
        (1, beta.log()),
        (0.5, 0.75 * beta.log() + 0.25 * tilde.log()),
    ):
        found = learned.reverse(constant_model(x_t, v + 0 * x_t), x_t, t)[1]
        np.testing.assert_allclose(found[:, 0, 0, 0], log, rtol=1e-9)  # eq. 15
    ignored = constant_model(x_t, 0.3 + 0 * x_t)
    np.testing.assert_allclose(small.reverse(ignored, x_t, t)[1][:, 0, 0, 0], tilde.log())
    np.testing.assert_allclose(large.reverse(ignored, x_t, t)[1][:, 0, 0, 0], beta.log())


def test_the_network_sees_the_original_time_times_1000_over_T():
    seen = []

    def model(x, time, y):
        seen.append(time)
        return torch.cat([x, x], dim=1)

    x, t = randn(2, 3, 4, 4), torch.tensor([1, 4])
    Diffusion("cosine", 4000).reverse(model, x, t)
    Diffusion("cosine", 4000, steps=5).reverse(model, x, t)  # 0, 1000, 2000, 2999, 3999
    Diffusion("cosine", 4000, steps=5, time_scale=1).reverse(model, x, t)
    assert [time.tolist() for time in seen] == [[0.25, 1], [250, 999.75], [1000, 3999]]
    assert seen[0].dtype == torch.float32


def test_a_network_with_the_wrong_channels_is_refused():
    x, t = randn(1, 3, 4, 4), torch.tensor([3])
    for variance, channels in (("learned", 3), ("learned", 9), ("small", 4)):
        with pytest.raises(ValueError, match=f"returned {channels} channels"):
            Diffusion(variance=variance).reverse(
                lambda x, t, y: x.new_zeros(1, channels, 4, 4), x, t
            )


# ---- Likelihood and losses ---------------------------------------------------------------------


def test_vlb_terms_are_kls_and_a_negative_log_likelihood_in_bits():
    diffusion, x0, noise = Diffusion("linear", 50), images(3), randn(3, 3, 4, 4)
    t = torch.tensor([0, 1, 30])
    x_t = diffusion.add_noise(x0, t, noise)
    model = constant_model(0.8 * noise, randn(3, 3, 4, 4, seed=1).tanh())
    found = diffusion.vlb_term(model, x0, x_t, t)
    mean, log_variance, _ = diffusion.reverse(model, x_t, t)
    p = Normal(mean, (log_variance / 2).exp())
    true_mean, true_log_variance = diffusion.posterior(x0, x_t, t)
    kl = kl_divergence(Normal(true_mean, (true_log_variance / 2).exp()), p)
    edge = torch.full_like(x0, math.inf)
    upper = p.cdf(torch.where(x0 > 0.999, edge, x0 + 1 / 255))
    lower = p.cdf(torch.where(x0 < -0.999, -edge, x0 - 1 / 255))
    nll = -(upper - lower).log()
    expected = torch.cat([nll[:1], kl[1:]]).flatten(1).mean(1) / LN2
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] > 0


@pytest.mark.parametrize("T, steps", [(50, None), (4000, None), (4000, 10)])
def test_hybrid_is_simple_plus_a_thousandth_of_T_times_the_term(T, steps):
    diffusion, x0, noise = Diffusion("cosine", T, steps=steps), images(2), randn(2, 3, 4, 4)
    t = torch.tensor([0, 7])
    model = constant_model(0.5 * noise, 0.3 * noise)
    term = diffusion.vlb_term(model, x0, diffusion.add_noise(x0, t, noise), t, clip=False)
    simple = (0.25 * noise**2).flatten(1).mean(1)
    losses = {o: diffusion.loss(model, x0, t, None, noise, o) for o in ("simple", "hybrid", "vlb")}
    np.testing.assert_allclose(losses["simple"], simple, rtol=1e-9)
    np.testing.assert_allclose(losses["vlb"], (steps or T) * term, rtol=1e-9)
    np.testing.assert_allclose(losses["hybrid"], simple + 0.001 * (steps or T) * term, rtol=1e-9)


def test_hybrid_teaches_eps_by_simple_alone_and_v_by_the_bound_alone():
    diffusion, x0, noise = Diffusion("cosine", 100), images(3), randn(3, 3, 4, 4)
    t = torch.tensor([0, 20, 60])
    gradients = {}
    for objective in ("simple", "hybrid", "vlb"):
        eps, v = (0.5 * noise).requires_grad_(), (0.1 * noise).requires_grad_()
        diffusion.loss(constant_model(eps, v), x0, t, None, noise, objective).sum().backward()
        gradients[objective] = eps.grad, v.grad
    eps, v = gradients["hybrid"]
    assert torch.allclose(eps, gradients["simple"][0], rtol=1e-12) and eps.abs().min() > 0
    assert torch.allclose(v, 0.001 * gradients["vlb"][1], rtol=1e-9) and v.abs().max() > 0
    assert (gradients["simple"][1] == 0).all()
    assert gradients["vlb"][0].abs().min() > 0


def test_the_loss_does_not_clip_x0():
    diffusion, x0, noise = Diffusion("cosine", 100), images(1), randn(1, 3, 4, 4)
    t, eps = torch.tensor([50]), (noise - 5).requires_grad_()  # x0_hat is far above 1
    loss = diffusion.loss(constant_model(eps, 0 * noise), x0, t, None, noise, "vlb")
    loss.sum().backward()
    assert eps.grad.abs().min() > 0
    x_t = diffusion.add_noise(x0, t, noise)
    clipped = diffusion.vlb_term(constant_model(eps, 0 * noise), x0, x_t, t)
    assert loss.item() > 100 * clipped.item() * 1.5


def test_hybrid_needs_a_learned_variance():
    with pytest.raises(ValueError, match="hybrid needs variance learned"):
        Diffusion(variance="small").loss(None, images(1), torch.tensor([0]))


def test_wrong_arguments_of_the_process_are_refused():
    diffusion, x0 = Diffusion(), images(1)
    for message, wrong in {
        "objective must be": lambda: diffusion.loss(None, x0, torch.tensor([0]), objective="mse"),
        "p and calls": lambda: diffusion.bits_per_dim(None, x0, calls=5),
        "every term": lambda: Diffusion(T=2).pilot(None, x0),
        "method must be": lambda: next(diffusion.trajectory(None, x0, method="euler")),
        "eta must be": lambda: next(diffusion.trajectory(None, x0, eta=2.0)),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


def gaussian_data(diffusion):
    """Data N(mean, covariance) in 4 dimensions, (N, 1, 2, 2), and the best model of it: ε exact,
    v so that the variance of p is the true one of x_{t-1} given x_t, averaged over dimensions."""
    root = randn(4, 4, seed=5) * 0.08
    covariance, mean = root @ root.T + 0.01 * torch.eye(4), torch.tensor([0.3, -0.2, 0.1, 0.0])

    def parts(t):
        """E[x0 | x_t] = mean + gain (x_t - sqrt(ᾱ) mean), with this gain."""
        a = diffusion.alphas_bar[t]
        return a, a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(4))

    def model(x, time, y):
        t = (diffusion.times - time[0]).abs().argmin()
        a, gain = parts(t)
        x0 = mean + (x.flatten(1) - a.sqrt() * mean) @ gain.T
        eps = (x - a.sqrt() * x0.view_as(x)) / (1 - a).sqrt()
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    return mean.double(), covariance, parts, model


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [None, 50])
def test_the_bound_on_gaussian_data_is_the_exact_sum_of_kls(schedule, steps):
    diffusion = Diffusion(schedule, 1000, "learned", steps)
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
    exact = torch.stack(exact)
    N = 1000 if steps is None else 4000
    x0 = mean + randn(N, 4, seed=2) @ torch.linalg.cholesky(covariance).T
    torch.manual_seed(0)
    _, terms, prior = diffusion.bits_per_dim(model, x0.view(N, 1, 2, 2))
    error = terms[:, 1:].std(0) / N**0.5
    z = (terms[:, 1:].mean(0) - exact) / error
    assert abs(z).max() < 5
    total, total_error = terms[:, 1:].sum(1).mean(), terms[:, 1:].sum(1).std() / N**0.5
    assert abs(total - exact.sum()) < 4 * total_error < 0.05 * exact.sum()


def exact_samples(diffusion, mean, covariance, parts, method, eta):
    """Mean and covariance of what a sampler makes of gaussian_data's model: each step is linear."""
    eye, m, C = torch.eye(4, dtype=torch.float64), torch.zeros(4), torch.eye(4)
    m, C = m.double(), C.double()
    for t in reversed(range(diffusion.num_steps)):
        a, gain = parts(t)
        before = diffusion.alphas_bar[t - 1] if t else torch.tensor(1.0)
        beta = 1 - a / before
        variance = beta * (1 - before) / (1 - a) * (1 if method == "ancestral" else eta**2)
        # x_{t-1} = of_x0 E[x0 | x_t] + of_x x_t + noise, E[x0 | x_t] = mean + gain (x_t - √a mean)
        if method == "ancestral":
            of_x0 = before.sqrt() * beta / (1 - a)
            of_x = (1 - before) * (a / before).sqrt() / (1 - a)
        else:
            of_x = ((1 - before - variance) / (1 - a)).sqrt()
            of_x0 = before.sqrt() - of_x * a.sqrt()
        step = of_x0 * gain + of_x * eye
        m = step @ m + of_x0 * (mean - a.sqrt() * gain @ mean)
        C = step @ C @ step.T + variance * eye
    return m, C


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "steps, method, eta",
    [(None, "ancestral", 0), (100, "ancestral", 0), (1000, "ddim", 0), (100, "ddim", 1), (50, "ddim", 0.5)],
)  # fmt: skip
def test_samples_of_gaussian_data_have_its_mean_and_covariance(schedule, steps, method, eta):
    diffusion = Diffusion(schedule, 1000, "small", steps)
    mean, covariance, parts, model = gaussian_data(diffusion)
    exact_mean, exact = exact_samples(diffusion, mean, covariance, parts, method, eta)
    scale = covariance.diagonal().sqrt()
    if diffusion.num_steps == 1000:  # then they are nearly the data's
        assert (abs(exact_mean - mean) < 0.01 * scale).all()
        assert (abs(exact - covariance) < 0.05 * scale.outer(scale)).all()
    N = 10_000
    torch.manual_seed(0)
    *_, (_, x, _) = diffusion.trajectory(model, randn(N, 1, 2, 2), None, method, eta, clip=False)
    x = x.flatten(1)
    assert (abs(x.mean(0) - exact_mean) < 4.5 * scale / N**0.5).all()
    assert (abs(x.T.cov() - exact) < 4.5 * (2 / N) ** 0.5 * scale.outer(scale)).all()


def test_few_calls_estimate_the_bound_without_bias_and_two_estimates_tell_their_error():
    diffusion, N, calls, repeats = Diffusion("linear", 200), 16, 4, 200
    x0, level = images(N), torch.linspace(0.5, 1.5, N, dtype=torch.float64).view(-1, 1, 1, 1)

    def model(x, time, y):  # wrong in a way that depends on t and on the image
        return torch.cat([0.3 * x * level + (time / 1000).view(-1, 1, 1, 1), 0 * x], dim=1)

    torch.manual_seed(0)
    exact = torch.stack([diffusion.bits_per_dim(model, x0)[0] for _ in range(10)])
    p = diffusion.pilot(model, x0)
    assert p[0] == 0 and p.sum().item() == pytest.approx(1) and p[1:].min() > 0
    seen, totals = torch.zeros(200), torch.empty(repeats, 2, N, dtype=torch.float64)
    for both in totals:
        for total in both:
            total[:], terms, prior = diffusion.bits_per_dim(model, x0, None, p, calls)
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
    means = totals.mean((1, 2))
    assert abs(means.mean() - exact.mean()) < 4 * means.std() / repeats**0.5 + 0.001 * exact.mean()
    double = torch.stack([diffusion.bits_per_dim(model, x0, None, 2 * p, 20)[0] for _ in range(20)])
    assert abs(double.mean() - exact.mean()) < 0.02 * exact.mean()  # p is normalised
    errors = ((totals[:, 0] - totals[:, 1]) / 2).norm(dim=1) / N
    inside = (abs(means - exact.mean()) < 1.96 * errors).double().mean()
    assert 0.86 < inside < 0.99 and 0.85 < errors.square().mean().sqrt() / means.std() < 1.15


# ---- Samplers ----------------------------------------------------------------------------------


def toy(x, time, y):
    return torch.cat([0.5 * x, x.tanh()], dim=1)


@pytest.mark.parametrize("method, eta", [("ancestral", 0), ("ddim", 1)])
def test_the_last_step_adds_no_noise(method, eta):
    diffusion, noise = Diffusion("cosine", 20), randn(2, 3, 4, 4)
    *_, (_, before, _), (i, x, _) = diffusion.trajectory(toy, noise, None, method, eta)
    assert i == 0
    assert torch.equal(x, diffusion.reverse(toy, before, torch.zeros(2, dtype=torch.int64))[0]) or (
        method == "ddim"
        and torch.allclose(x, diffusion.reverse(toy, before, torch.tensor([0, 0]))[2])
    )


def test_trajectory_yields_every_step():
    steps = list(Diffusion("cosine", 30, steps=6).trajectory(toy, randn(1, 3, 4, 4)))
    assert [i for i, _, _ in steps] == [5, 4, 3, 2, 1, 0]
    assert all(x.shape == x0.shape == (1, 3, 4, 4) for _, x, x0 in steps)


def test_an_image_does_not_depend_on_its_batch():
    diffusion, noise = Diffusion("cosine", 20), randn(4, 3, 4, 4).float()

    def draw(rows):
        generators = [generator(9, i) for i in rows]
        return diffusion.sample(toy, noise[rows], generators=generators)

    whole = draw([0, 1, 2, 3])
    assert torch.equal(torch.cat([draw([0]), draw([1, 2]), draw([3])]), whole)
    assert whole.abs().max() <= 1 and len(whole.unique()) > 50


def test_ddim_without_eta_is_deterministic_and_with_eta_1_ancestral():
    diffusion, noise = Diffusion("linear", 50, "small"), 0.1 * randn(2, 3, 4, 4)
    a, b = (diffusion.sample(toy, noise, method="ddim") for _ in range(2))
    assert torch.equal(a, b)
    t = torch.tensor([30, 12])  # at eta 1 DDIM's step is q's posterior
    mean, _, x0_hat = diffusion.reverse(toy, noise, t)
    found, std = diffusion._ddim(noise, t, x0_hat, 1.0)
    assert torch.allclose(found, mean, atol=1e-12)
    assert torch.allclose(std.flatten() ** 2, diffusion.posterior_variance[t])


def test_the_label_reaches_the_network():
    seen = []

    def model(x, time, y):
        seen.append(y)
        return toy(x, time, y)

    diffusion, x, y = Diffusion("cosine", 4), randn(2, 3, 4, 4), torch.tensor([5, 7])
    diffusion.sample(model, x, y)
    diffusion.loss(model, x, torch.tensor([0, 1]), y)
    diffusion.bits_per_dim(model, x, y)
    assert len(seen) == 9 and all(label is y for label in seen)


# ---- Which timesteps to train on ---------------------------------------------------------------


def test_uniform_sampler_draws_each_t_equally():
    t, weights = UniformSampler(5).sample(50_000, generator(0, 0))
    assert (weights == 1).all() and (abs(torch.bincount(t) - 10_000) < 450).all()  # 5 σ


def test_importance_sampler_keeps_the_last_ten_losses_of_each_t():
    rng = np.random.default_rng(0)
    sampler, history = ImportanceSampler(4), [collections.deque(maxlen=10) for _ in range(4)]
    for size in (1, 3, 70, 5, 0, 40, 9):  # with 70, a t occurs more than ten times
        t, losses = rng.integers(4, size=size), rng.uniform(0, 5, size).astype(np.float32)
        losses[rng.uniform(size=size) < 0.1] = np.nan
        losses[rng.uniform(size=size) < 0.1] = np.inf
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        for i, loss in zip(t, losses):
            history[i] += [loss] if np.isfinite(loss) else []
        if min(map(len, history)) < 10:
            expected = np.full(4, 0.25)
        else:
            root = np.array([np.sqrt(np.mean(np.square(h))) for h in history])
            expected = 0.999 * root / root.sum() + 0.001 / 4  # eq. 18, and a uniform share
        np.testing.assert_allclose(sampler.probabilities(), expected, rtol=1e-5)
    assert min(map(len, history)) == 10
    copy = ImportanceSampler(4)
    copy.load_state_dict(sampler.state_dict())
    assert torch.equal(copy.probabilities(), sampler.probabilities())
    with pytest.raises(ValueError):
        ImportanceSampler(5).load_state_dict(sampler.state_dict())


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
    assert p[0] > 0.5


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


def test_the_papers_cifar10_network_has_52_5_million_parameters():
    assert sum(p.numel() for p in UNet(UNetConfig()).parameters()) == 52_546_438


@pytest.mark.parametrize(
    "changes", [{}, {"scale_shift_norm": False, "channels": 64}, {"channels": 24}, {"channels": 12, "num_heads": 3}]
)
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


def test_the_network_starts_at_zero():
    model = UNet(
        UNetConfig(image_size=8, channels=16, channel_mult=(1, 2), attention_resolutions=())
    )
    assert (model(torch.randn(1, 3, 8, 8), torch.zeros(1)) == 0).all()


def test_dropout_is_for_training_alone():
    model, x, t = small_unet(dropout=0.5), torch.randn(1, 3, 8, 8), torch.zeros(1)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.allclose(model(x, t), model(x, t))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_dropout_keeps_each_element_with_probability_1_minus_p(p):
    x = torch.ones(2, 5, 33, 301)  # not a multiple of the four elements a random number serves
    y = dropout(x, p)
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)), rtol=1e-4)
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    flat = kept.permute(0, 2, 3, 1).flatten().float() - (1 - p)
    for lag in range(1, 9):  # neighbours share a random number, but know nothing of each other
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 4 * p * (1 - p) / x.numel() ** 0.5
    x.requires_grad_()
    y = dropout(x, p)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())  # of all ones


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
    h = torch.nn.functional.conv1d(
        torch.cat(out, 1), layer.proj.weight[..., 0], layer.proj.bias
    )
    assert torch.allclose(layer(x), x + h.view_as(x), atol=1e-12)


def test_bf16_attention_and_norm_stay_close_to_float32():
    layer = Attention(32, UNetConfig(num_heads=4))
    layer.qkv.weight.data *= 4
    torch.nn.init.normal_(layer.proj.weight)
    x = torch.randn(20, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, normed = layer(x), layer.norm(x.bfloat16() + 100)
    assert (found - layer(x)).norm() / layer(x).norm() < 0.02
    expected = layer.norm((x.bfloat16() + 100).float())  # which bfloat16's sums would have lost
    assert normed.dtype == torch.bfloat16 and (normed - expected).abs().max() < 0.02


@pytest.mark.parametrize("native", [False, True])
def test_auto_takes_bf16_only_where_it_is_native(monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pick_device("cpu", "auto")[1]:
        assert torch.is_autocast_enabled("cpu") == native
    with pick_device("cpu", "fp32")[1]:
        assert not torch.is_autocast_enabled("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="more processes than GPUs"):
        pick_device("auto", "auto")


def test_timestep_embedding_has_cosines_first():
    t = torch.tensor([0.0, 7.25, 999])
    freqs = [10_000 ** (-i / 4) for i in range(4)]
    expected = [[f(x * w) for f in (math.cos, math.sin) for w in freqs] for x in t.tolist()]
    np.testing.assert_allclose(timestep_embedding(t, 8), expected, atol=1e-4)


def test_norms_have_groups_of_4_channels_or_32_groups():
    found = {c: GroupNorm(c, 0).num_groups for c in (8, 32, 36, 64, 96, 128, 192, 512)}
    assert found == {8: 2, 32: 8, 36: 9, 64: 16, 96: 24, 128: 32, 192: 32, 512: 32}
    assert GroupNorm(64, 32).num_groups == 32  # as improved-diffusion's
    for channels in (37, 3, 74):
        with pytest.raises(ValueError, match=f"{channels} channels"):
            GroupNorm(channels, 0)


def test_a_norm_leaves_the_mean_colour_in_its_groups():
    dark, bright = torch.rand(2, 1, 32, 4, 4) + torch.tensor([0.0, 3]).view(2, 1, 1, 1, 1)
    dark[:, ::4] -= 2  # channels differ by another amount in dark than in bright images
    means = [GroupNorm(32, 0)(x).mean((2, 3)) for x in (dark, bright)]
    assert (means[0] - means[1]).abs().max() > 0.5


@pytest.mark.parametrize(
    "changes, message",
    [(dict(image_size=30), "image size 30"), (dict(attention_resolutions=(5,)), "resolution 5"),
     (dict(num_heads=3), "3 heads"), (dict(channel_mult=()), "image size 32")],
)  # fmt: skip
def test_impossible_networks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(UNetConfig(**changes))


def test_the_network_compiles_as_one_graph():
    model = small_unet(num_classes=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2]), torch.tensor([0, 2])
    assert torch.allclose(compiled(*given), model(*given), atol=1e-6)


# ---- Checkpoints -------------------------------------------------------------------------------


def checkpoint_of(model):
    process = dict(schedule="linear", T=30, variance="learned")
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    return dict(unet=vars(model.config), diffusion=process, ema=model.state_dict(), model=weights)


def test_a_checkpoint_gives_the_averaged_weights_ready_to_sample(tmp_path):
    model = small_unet(dropout=0.5, num_classes=4)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(model))
    loaded, process = load_checkpoint(tmp_path / "ckpt.pt")
    assert loaded.config == model.config and not loaded.training
    given = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2]), torch.tensor([0, 2])
    assert torch.equal(loaded(*given), model(*given))
    assert process == dict(schedule="linear", T=30, variance="learned")
    other = load_checkpoint(tmp_path / "ckpt.pt", "cosine", 50, 0.5)[1]  # what is given goes before
    assert other == dict(schedule="cosine", T=50, variance="learned", time_scale=0.5)


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
    for name, content in {"cut": good[:-100], "half": good[: len(good) // 2], "empty": b"",
                          "text": b"hello", "pickle": pickle.dumps(Malicious())}.items():  # fmt: skip
        open(name, "wb").write(content)
    for name in set(os.listdir()) - {"good"}:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(name)
    assert not os.path.exists("was_run")
    with pytest.raises(OSError):
        load_checkpoint("missing")


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


def test_a_failing_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": 2, "bad": lambda: None})
    assert read_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["ckpt.pt"]


def as_openai_has_it(state):
    """Our state dict under improved-diffusion's names, its attention as 1×1 convolutions."""
    theirs = {}
    for name, value in state.items():
        if name.startswith("down.") and name.endswith(("0.weight", "0.bias")) and name[5:7] != "0.":
            name = name.replace(".0.weight", ".0.op.weight").replace(".0.bias", ".0.op.bias")
        elif name.startswith("up.") and name.split(".")[3] == "1":
            name = name.replace(".1.weight", ".conv.weight").replace(".1.bias", ".conv.bias")
        if ".qkv.weight" in name or ".proj.weight" in name:
            value = value[..., 0]
        for key, ours in OPENAI_NAMES.items():
            if ours not in (".", ".1."):
                parts = name.split(".")
                name = ".".join(key if part == ours else part for part in parts)
        theirs[name] = value
    return theirs


@pytest.mark.parametrize(
    "file, changes, T, schedule, scale",
    [
        ("cifar10_uncond_50M_500K.pt", {}, 4000, "cosine", 0.25),
        ("cifar10_uncond_vlb_50M_500K.pt", {}, 4000, "cosine", 0.25),
        ("imagenet64_uncond_100M_1500K.pt", dict(image_size=64, channel_mult=(1, 2, 3, 4)), 4000, "cosine", 0.25),
        ("imagenet64_uncond_vlb_100M_1500K.pt", dict(image_size=64, channel_mult=(1, 2, 3, 4)), 4000, "cosine", 0.25),
        ("imagenet64_cond_270M_250K.pt", dict(image_size=64, channel_mult=(1, 2, 3, 4), num_classes=7), 4000, "cosine", 1),
        ("lsun_uncond_100M_1200K_bs128.pt", dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4),
         attention_resolutions=(16,), num_heads=1, scale_shift_norm=False), 1000, "linear", 1),
        ("lsun_uncond_100M_2400K_bs64.pt", dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4),
         attention_resolutions=(16,), num_heads=1, scale_shift_norm=False), 1000, "linear", 1),
    ],
)  # fmt: skip
def test_released_files_load_by_their_names(tmp_path, file, changes, T, schedule, scale):
    standard = dict(
        image_size=32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16, 8), num_heads=4,
        norm_groups=32,
    )  # fmt: skip
    model = small_unet(**standard | changes)
    torch.save(as_openai_has_it(model.state_dict()), tmp_path / file)
    loaded, process = load_checkpoint(tmp_path / file)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    assert (
        process["T"] == T and process["schedule"] == schedule and process["variance"] == "learned"
    )
    assert Diffusion(**process).times[-1] == (T - 1) * scale


def test_other_plain_state_dicts_need_their_process(tmp_path):
    shape = dict(image_size=32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16, 8))
    model = small_unet(**shape, norm_groups=32)
    state = as_openai_has_it(model.state_dict())
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="give --schedule and --T"):
        load_checkpoint(tmp_path / "mine.pt")
    loaded, process = load_checkpoint(tmp_path / "mine.pt", "linear", 500, num_heads=2)
    assert loaded.config == model.config and process["T"] == 500
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt", "linear", 500, num_heads=2)[0].config == model.config
    state["input_blocks.0.0.weight"] = torch.zeros(16, 6, 3, 3)
    torch.save(state, tmp_path / "upsample_cond_500K.pt")
    with pytest.raises(ValueError, match="holds no UNet"):
        load_checkpoint(tmp_path / "upsample_cond_500K.pt", "linear", 500)


def plain_state_dict(path):
    shape = dict(image_size=32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16, 8))
    model = small_unet(**shape, norm_groups=32)
    torch.save(as_openai_has_it(model.state_dict()), path)


# ---- The scripts, as a user runs them ----------------------------------------------------------

ROOT = os.path.dirname(os.path.abspath(__file__))
TINY = (
    "--image-size 8 --channels 8 --channel-mult 1,2 --num-res-blocks 1 --attention 4 --num-heads 2"
    " --T 20 --batch 8 --log-every 3 --save-every 3 --sample-every 100 --device cpu"
).split()


def script(name, *argv):
    """Run a script of ours in this process, as `python name argv` would -> its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        try:
            runpy.run_path(os.path.join(ROOT, name), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
    return 0


def start(name, *argv, processes=1):
    """Start a script in processes of its own."""
    python = [sys.executable]
    if processes > 1:
        python += f"-m torch.distributed.run --standalone --nproc-per-node {processes} --".split()
    command = map(str, [*python, os.path.join(ROOT, name), *argv])
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def log_without_times(run):
    return [row.split(",")[:6] for row in open(f"{run}/log.csv")]


def assert_equal(a, b):
    """Two checkpoints' contents, to the bit, apart from times and the number of steps asked for."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "log", "config"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_equal(one, other)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a tiny class-conditional run."""
    folder = tmp_path_factory.mktemp("trained")
    assert script("train.py", *TINY, "--steps", 3, "--out", folder / "run") == 0
    return folder / "run" / "ckpt.pt"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_then_sample_without_arguments_about_the_run(here, capsys):
    assert script("train.py", *TINY, "--steps", 3, "--sample-every", 2) == 0
    assert capsys.readouterr().out == "runs/digits/ckpt.pt\n"
    assert sorted(os.listdir("runs/digits/samples")) == ["0000002.png", "0000003.png"]
    assert Image.open("runs/digits/samples/0000003.png").size == (530, 530)
    assert script("sample.py", "--n", 4) == 0  # the newest run under runs/
    assert capsys.readouterr().out == "samples.png\n"
    assert Image.open("samples.png").size == (8 * (2 * 8 + 1), 8 * (2 * 8 + 1))


def test_interrupted_runs_go_on_to_the_bit(here):
    flags = TINY + "--t-sampler importance --objective vlb --accum 2 --dropout 0.1".split()
    flags += "--T 4 --flip --grad-clip 1 --warmup 4 --schedule linear --seed 3 --ema 0.9".split()
    assert script("train.py", *flags, "--steps", 9, "--out", "whole") == 0
    assert script("train.py", *flags, "--steps", 3, "--out", "parts") == 0
    assert script("train.py", *flags, "--steps", 6, "--out", "parts") == 0
    assert script("train.py", "--steps", 9, "--out", "parts") == 0  # flags come from the run
    whole, parts = (read_checkpoint(f"{run}/ckpt.pt") for run in ("whole", "parts"))
    assert whole["step"] == 9 and (whole["t_sampler"]["counts"] >= 10).all()
    assert_equal(whole, parts)
    assert log_without_times("whole") == log_without_times("parts")


def test_a_killed_run_goes_on_to_the_bit(here):
    flags = TINY + ["--t-sampler", "importance", "--steps", 60]
    assert script("train.py", *flags, "--out", "whole") == 0
    killed = start("train.py", *flags, "--out", "killed")
    while not os.path.exists("killed/ckpt.pt"):
        time.sleep(0.01)
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert script("train.py", *flags, "--out", "killed") == 0
    assert_equal(read_checkpoint("whole/ckpt.pt"), read_checkpoint("killed/ckpt.pt"))
    assert log_without_times("whole") == log_without_times("killed")


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_stops(here, processes):
    flags = TINY + ["--steps", 10**6, "--save-every", 10**6, "--log-every", 1, "--out", "run"]
    run = start("train.py", *flags, processes=processes)
    while not os.path.exists("run/log.csv"):
        time.sleep(0.01)
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == (143 if processes == 1 else 1)  # torchrun has its own
    assert stderr.count("stopping after this step") == 1
    state = read_checkpoint("run/ckpt.pt")
    assert state["step"] >= 1 and not os.path.exists("run/ckpt.pt.tmp")


def test_two_processes_compute_what_one_does(here):
    flags = "--dtype fp32 --steps 6 --log-every 1 --t-sampler importance --T 4 --batch 9"
    flags = TINY + flags.split()
    assert script("train.py", *flags, "--out", "one") == 0
    assert start("train.py", *flags, "--out", "two", processes=2).wait() == 0
    for one, two in zip(log_without_times("one")[1:], log_without_times("two")[1:]):
        assert [float(x) for x in one] == pytest.approx([float(x) for x in two], rel=1e-5)
    one, two = (read_checkpoint(f"{run}/ckpt.pt") for run in ("one", "two"))
    assert torch.equal(one["t_sampler"]["counts"], two["t_sampler"]["counts"])
    flags = "--ckpt two --dtype fp32 --n 5 --steps 3 --batch 2 --out".split()
    assert script("sample.py", *flags, "one.npz") == 0
    assert start("sample.py", *flags, "two.npz", processes=2).wait() == 0
    one, two = np.load("one.npz"), np.load("two.npz")
    assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert (one["arr_1"] == two["arr_1"]).all()


def test_conflicting_flags_of_a_resumed_run_are_refused(trained, here, capsys):
    before = open(trained, "rb").read()
    assert script("train.py", "--out", trained.parent, "--lr", 0.5) == 2
    assert "--lr 0.5: the run in" in capsys.readouterr().err
    assert open(trained, "rb").read() == before


def test_a_finished_run_is_left_as_it_is(trained, here):
    before = open(trained, "rb").read()
    for steps in (3, 2):
        assert script("train.py", "--out", trained.parent, "--steps", steps) == 0
        assert open(trained, "rb").read() == before


def test_samples_come_from_weights_averaged_over_the_run(here):
    flags = [*TINY, "--lr", 0.01, "--warmup", 1, "--ema", 0.2, "--out", "run"]
    average = None
    for step in range(1, 4):
        assert script("train.py", *flags, "--steps", step) == 0
        state = read_checkpoint("run/ckpt.pt")
        if average is not None:
            decay = min(0.2, step / (9 + step))  # at step 2 still the ramp, at step 3 --ema
            for name, weights in state["model"].items():
                mean = decay * average[name] + (1 - decay) * weights
                assert torch.allclose(state["ema"][name], mean, atol=1e-6)
        average = state["ema"]


def test_the_average_keeps_no_graph_of_earlier_steps(here, monkeypatch):
    import train

    found = []
    monkeypatch.setattr(train, "draw_grid", lambda *given: found.extend(given[3].parameters()))
    config, state = train.configure([*map(str, TINY), "--steps", "2", "--out", "run"])
    train.train(config, state, torch.device("cpu"), contextlib.nullcontext())
    assert found and not any(average.requires_grad for average in found)


def test_init_starts_from_the_weights_and_shape_of_a_file(trained, here):
    flags = TINY[:2] + ["--T", 20, "--lr", 0, "--ema", 0, "--steps", 1, "--init", trained]
    assert script("train.py", *flags, "--batch", 8, "--out", "run") == 0
    assert_equal(read_checkpoint("run/ckpt.pt")["model"], read_checkpoint(trained)["ema"])


@pytest.mark.parametrize(
    "flags",
    [
        "--objective simple --variance small --no-class-cond",
        "--objective vlb --variance large --attention none",
        "--dtype bf16",
        "--compile --dropout 0.1",
    ],
)
def test_other_ways_to_train(here, flags, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda net: torch._dynamo.optimize("eager", nopython=True)(net)
    )
    assert script("train.py", *TINY, *flags.split(), "--steps", 2, "--out", "run") == 0
    assert script("sample.py", "--ckpt", "run", "--n", 1, "--steps", 2) == 0


def test_a_step_without_finite_gradient_is_skipped_and_counted(here, monkeypatch):
    import train

    original = train.load_batch

    def poisoned(config, images, labels, t_sampler, step, device):
        x0, y, t, weights, noise = original(config, images, labels, t_sampler, step, device)
        noise[0, 0, 0, 0] = float("nan") if step in bad else noise[0, 0, 0, 0]
        return x0, y, t, weights, noise

    monkeypatch.setattr(train, "load_batch", poisoned)

    def run(out, steps):
        argv = [*TINY, "--t-sampler", "importance", "--log-every", 1, "--lr", 0.01, "--out", out]
        config, state = train.configure([*map(str, argv), "--steps", str(steps)])
        os.makedirs(f"{out}/samples", exist_ok=True)
        train.train(config, state, torch.device("cpu"), contextlib.nullcontext())
        return read_checkpoint(f"{out}/ckpt.pt")

    bad = {2}
    before, after = run("run", 2), run("run", 3)
    assert_equal(before["model"], after["model"])
    assert_equal(before["optimizer"]["state"], after["optimizer"]["state"])
    assert after["t_sampler"]["counts"].sum() == before["t_sampler"]["counts"].sum() + 7
    assert run("run", 4)["t_sampler"]["losses"].isfinite().all()
    assert [row[5] for row in log_without_times("run")] == ["skipped", "0", "0", "1", "0"]
    bad = set(range(1000))
    with pytest.raises(SystemExit):  # rather than compute nothing for ever
        run("hopeless", 1000)
    assert (
        not os.path.exists("hopeless/ckpt.pt") or read_checkpoint("hopeless/ckpt.pt")["step"] < 150
    )


def test_a_full_disk_costs_no_checkpoint(here, monkeypatch, capsys):
    assert script("train.py", *TINY, "--steps", 3, "--out", "run") == 0
    before = open("run/ckpt.pt", "rb").read()

    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left")

    monkeypatch.setattr(torch, "save", full)
    assert script("train.py", *TINY, "--steps", 8, "--out", "run") == 1
    errors = capsys.readouterr().err
    assert "train.py: error: cannot write run/ckpt.pt" in errors
    assert open("run/ckpt.pt", "rb").read() == before
    assert sorted(os.listdir("run")) == [".lock", "ckpt.pt", "log.csv", "samples"]


def test_a_second_run_in_the_same_directory_is_refused(here, capsys):
    os.mkdir("run")
    with open("run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert script("train.py", *TINY, "--steps", 1, "--out", "run") == 1
    assert "another run is writing to run" in capsys.readouterr().err


def make_folder(root):
    """Images of all kinds, of 12×8 pixels: left third red, middle third green, right third blue."""
    stripes = np.zeros((8, 12, 3), np.uint8)
    for i in range(3):
        stripes[:, 4 * i : 4 * i + 4, i] = 255
    image = Image.fromarray(stripes)
    for folder in ("cats", "dogs/puppies"):
        os.makedirs(f"{root}/{folder}")
    image.save(f"{root}/cats/rgb.png")
    image.quantize(4).save(f"{root}/cats/palette.gif")
    image.convert("CMYK").save(f"{root}/cats/cmyk.jpg", quality=100)
    image.convert("L").save(f"{root}/dogs/grey.png")
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(f"{root}/dogs/deep.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(f"{root}/dogs/clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.rotate(90, expand=True).save(f"{root}/dogs/puppies/turned.jpg", exif=exif, quality=100)
    Image.new("RGB", (1, 1), "red").save(f"{root}/dogs/puppies/one.bmp")
    Image.new("RGB", (20_000, 2), "red").save(f"{root}/dogs/wide.png")
    os.symlink("..", f"{root}/dogs/loop")
    os.makedirs(f"{root[:-1]}")
    os.rename(f"{root}/dogs/grey.png", f"{root[:-1]}/grey.png")
    os.symlink(f"../{root[:-1]}", f"{root}/linked")
    os.symlink(".", f"{root}/again")
    open(f"{root}/cats/notes.txt", "w").write("not an image")


def test_a_folder_of_any_images_becomes_one_array(here, capsys, monkeypatch):
    import train

    make_folder("pets")
    whole = open("pets/cats/rgb.png", "rb").read()
    open("pets/cats/cut.png", "wb").write(whole[: len(whole) // 2])
    open("pets/dogs/empty.jpg", "wb").close()
    config = argparse.Namespace(data="pets", image_size=8, class_cond=True, seed=0)
    images, labels, classes = train.load_data(config)
    assert (
        "left out 2 of 11 images, which are broken: cats/cut.png, dogs/empty.jpg"
        in capsys.readouterr().err
    )
    paths = np.load(glob.glob("data/cache/pets-8-*/paths.npy")[0]).tolist()
    assert classes == 3 and labels.tolist() == [["cats", "dogs", "linked"].index(path.split("/")[0]) for path in paths]
    found = {os.path.basename(path): image for path, image in zip(paths, images)}
    assert len(found) == 9 and images.dtype == np.uint8 and images.shape[1:] == (3, 8, 8)
    for name in ("rgb.png", "palette.gif", "cmyk.jpg", "turned.jpg"):  # the centre: green
        assert abs(found[name][:, 4, 4].astype(int) - [0, 255, 0]).max() < 30, name
        assert found[name][0, 4, 0] > found[name][2, 4, 0] and found[name][2, 4, 7] > 100, name
    assert (found["deep.png"] == 100).all() and (found["clear.png"] == 255).all()
    with monkeypatch.context() as patch:
        patch.setattr(train, "read_image", None)  # the second time nothing is decoded
        assert (train.load_data(config)[0] == images).all()
    Image.new("RGB", (8, 8)).save("pets/cats/new.png")
    assert len(train.load_data(config)[0]) == 10
    Image.new("RGB", (8, 8)).save("pets/loose.png")
    with pytest.raises(ValueError, match="loose.png in pets is in no subfolder"):
        train.load_data(config)


def test_a_folder_trains_and_is_measured(here, capsys):
    make_folder("pets")
    flags = TINY + ["--data", "pets", "--steps", 3]
    assert script("train.py", *flags, "--class-cond") == 0
    assert read_checkpoint("runs/pets/ckpt.pt")["unet"]["num_classes"] == 3
    assert script("train.py", "--data", "./pets/", "--steps", 4) == 0  # goes on
    assert script("train.py", "--eval-only", "--data", "pets", "--ckpt", "runs/pets") == 0
    assert "bits/dim" in capsys.readouterr().out
    assert script("train.py", "--eval-only", "--data", "digits", "--ckpt", "runs/pets") == 1
    assert "digits has 10 classes, the network 3" in capsys.readouterr().err


def stand_in_cifar10(root, patch):
    """An archive in CIFAR-10's format with 6 images a batch, where torchvision looks for it."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    folder = f"{root}/source/cifar-10-batches-py"
    os.makedirs(folder)
    sums = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        batch = {
            "data": rng.integers(256, size=(6, 3072), dtype=np.uint8),
            "labels": [0, 1, 2, 3, 4, 9],
        }
        names = {"label_names": [str(i) for i in range(10)]}
        with open(f"{folder}/{name}", "wb") as file:
            pickle.dump(names if name == "batches.meta" else batch, file)
        sums[name] = hashlib.md5(open(f"{folder}/{name}", "rb").read()).hexdigest()
    archive = shutil.make_archive(f"{root}/cifar", "gztar", f"{root}/source")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")
    patch.setattr(CIFAR10, "tgz_md5", hashlib.md5(open(archive, "rb").read()).hexdigest())
    patch.setattr(CIFAR10, "train_list", [[n, s] for n, s in sums.items() if n.startswith("data")])
    patch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return server


def test_cifar10_is_downloaded_verified_trained_on_and_measured(here, monkeypatch, capsys):
    server = stand_in_cifar10(here, monkeypatch)
    flags = "--data cifar10 --channels 8 --num-res-blocks 1 --num-heads 2 --T 8 --batch 4".split()
    flags += "--device cpu --steps 1 --sample-every 9".split()
    assert script("train.py", *flags, "--class-cond") == 0
    assert read_checkpoint("runs/cifar10/ckpt.pt")["config"]["flip"]
    flags = "--eval-only --data cifar10 --eval-calls 8 --eval-images 9 --device cpu".split()
    assert script("train.py", *flags) == 0
    assert "on 6 images, every term computed" in capsys.readouterr().out  # those of the test set
    shutil.rmtree("data")
    server.shutdown()
    server.server_close()
    assert script("train.py", *flags) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "cannot download CIFAR-10" in errors[-1] and "cifar-10-python.tar.gz" in errors[-1]


def test_eval_measures_the_same_exactly_and_cheaply(trained, here, capsys):
    flags = "--eval-only --eval-images 256 --batch 64 --device cpu --ckpt".split() + [trained]
    totals = []
    for more in ("--eval-calls 20", "--eval-calls 8", "--eval-calls 20 --variance large",
                 "--eval-steps 5"):  # fmt: skip
        assert script("train.py", *TINY[:2], *flags, *more.split()) == 0
        out = capsys.readouterr().out.split()
        totals.append(float(out[1]))
        assert float(out[out.index("L_0") + 1].strip(",")) < totals[-1]
    error = float(out[out.index("±") + 1])
    exact, cheap, large, strided = totals
    assert abs(exact - cheap) < 0.05 and strided > exact and abs(large - exact) > 0.01
    rows = [row.split(",") for row in open(trained.parent / "terms.csv")]
    assert rows[0] == ["t", "bits_per_dim", "draws\n"] and len(rows) == 6


def test_eval_is_shared_out_among_processes(trained, here):
    flags = "--eval-only --eval-images 50 --eval-calls 20 --batch 16 --device cpu --ckpt".split()
    run = start("train.py", *TINY[:2], *flags, trained, processes=2)
    out, _ = run.communicate()
    assert run.returncode == 0 and "on 50 images" in out


def test_samples_depend_on_their_seed_and_place_alone(trained, here):
    flags = ["--ckpt", trained, "--steps", 4, "--out"]
    assert script("sample.py", *flags, "a.npz", "--n", 5) == 0
    assert script("sample.py", *flags, "b.npz", "--n", 3, "--batch", 2) == 0
    assert script("sample.py", *flags, "c.npz", "--n", 3, "--seed", 1) == 0
    a, b, c = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert a.shape == (5, 8, 8, 3) and np.load("a.npz")["arr_0"].dtype == np.uint8
    assert np.load("a.npz")["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert abs(a[:3] - b).max() <= 1  # the batch size changes the last bit of a sum, no more
    assert abs(b - c).max() > 10
    assert script("sample.py", *flags, "a.npz") == 1  # may have cost hours


def test_class_ddim_and_variance_reach_the_sampler(here):
    process = dict(schedule="cosine", T=20, variance="learned", time_scale=None)
    model = small_unet(num_classes=10)  # of random weights: it listens to all it is given
    state = dict(unet=vars(model.config), diffusion=process, ema=model.state_dict())
    save_checkpoint("random.pt", state)
    flags = ["--ckpt", "random.pt", "--n", 2, "--steps", 4, "--batch", 1]
    for name, more in {
        "7": ["--class", 7], "ddim": ["--method", "ddim"], "ddpm": [],
        "eta": ["--method", "ddim", "--eta", 1], "large": ["--variance", "large"],
    }.items():  # fmt: skip
        assert script("sample.py", *flags, *more, "--out", f"{name}.npz") == 0
    found = {name: np.load(f"{name}.npz") for name in ("7", "ddim", "ddpm", "eta", "large")}
    assert found["7"]["arr_1"].tolist() == [7, 7] and found["ddpm"]["arr_1"].tolist() == [0, 1]
    images = [f["arr_0"].astype(int) for f in found.values()]
    assert all(abs(a - b).max() > 1 for a, b in itertools.combinations(images, 2))


def test_a_plain_state_dict_is_sampled_measured_and_trained_on(here, capsys):
    plain_state_dict("plain.pt")
    make_folder("pets")
    process = "--schedule linear --T 12 --num-heads 2 --device cpu".split()
    flags = ["--ckpt", "plain.pt", "--n", 1, "--steps", 3, *process]
    assert script("sample.py", *flags, "--out", "a.npz") == 0
    assert script("sample.py", *flags, "--out", "b.npz", "--time-scale", 1, "--dtype", "fp32") == 0
    a, b = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "ab")
    assert abs(a - b).max() > 1
    flags = ["--data", "pets", *process, "--batch", 4]
    assert script("train.py", "--eval-only", "--ckpt", "plain.pt", *flags, "--eval-images", 4) == 0
    assert "on 4 images" in capsys.readouterr().out
    assert script("train.py", "--init", "plain.pt", *flags, "--steps", 1) == 0
    state = read_checkpoint("runs/pets/ckpt.pt")
    assert state["unet"]["image_size"] == 32 and state["diffusion"]["T"] == 12
    assert script("train.py", "--init", "plain.pt", *flags, "--channels", 32, "--out", "x") == 2
    assert "--channels 32: the network of --init has 16" in capsys.readouterr().err


def test_a_folder_of_samples_goes_on_where_it_stopped(trained, here, capsys):
    flags = ["--ckpt", trained, "--steps", 2, "--out", "images"]
    assert script("sample.py", *flags, "--n", 2) == 0
    first = os.stat("images/000001.png").st_mtime_ns
    assert script("sample.py", *flags, "--n", 3) == 0
    assert sorted(os.listdir("images")) == ["000000.png", "000001.png", "000002.png"]
    assert os.stat("images/000001.png").st_mtime_ns == first
    image = Image.open("images/000002.png")
    assert image.size == (8, 8) and image.info["seed"] == "0" and image.info["steps"] == "2"
    assert image.info["checkpoint"] == str(trained)
    assert script("sample.py", *flags, "--n", 3, "--seed", 5) == 1
    assert "was drawn with another seed" in capsys.readouterr().err
    state = read_checkpoint(trained)
    state["ema"]["out.2.bias"] += 1
    save_checkpoint("other.pt", state)
    flags[1] = "other.pt"
    assert script("sample.py", *flags, "--n", 3) == 1
    assert "was drawn with another weights" in capsys.readouterr().err
    open("images/000001.png", "w").close()  # not a picture: drawn again
    flags[1] = trained
    assert script("sample.py", *flags, "--n", 3) == 0 and Image.open("images/000001.png")


def test_a_gif_shows_the_denoising(trained, here):
    assert script("sample.py", "--ckpt", trained, "--n", 2, "--steps", 6, "--out", "x.gif") == 0
    gif = Image.open("x.gif")
    assert gif.n_frames == 6 and gif.size == (8 * (2 * 8 + 1), 8 * 9 - 8)


def test_ctrl_c_leaves_no_half_file(trained, here):
    flags = ["--ckpt", trained, "--n", 10**5, "--batch", 4, "--steps", 2, "--out", "images"]
    run = start("sample.py", *flags)
    while not os.path.exists("images/000003.png"):
        time.sleep(0.01)
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=20)
    assert run.returncode == 130 and not out and "Traceback" not in errors
    for name in os.listdir("images"):
        Image.open(f"images/{name}").load()


def test_the_checkpoint_in_assets_draws_the_digits_asked_for(here, capsys):
    import train

    path = os.path.join(ROOT, "assets", "digits.pt")
    assert os.path.getsize(path) < 2_500_000
    assert script("sample.py", "--n", 4, "--steps", 2, "--class", 7) == 0  # where there are no runs
    out, errors = capsys.readouterr()
    assert out == "samples.png\n" and errors.startswith(f"{os.path.relpath(path)}: 4 images in 2 steps")
    model, process = load_checkpoint(path)
    pixels, labels = train.draw_digits(64, 16, seed=5)
    x0, y = torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(labels)
    t, noise = torch.full((64,), 700), randn(*x0.shape).float()
    loss = functools.partial(Diffusion(**process).loss, model, x0, t, noise=noise)
    with torch.no_grad():
        right, wrong = (loss(k, objective="simple").mean() for k in (y, (y + 1) % 10))
    assert right < 0.03 and wrong > 1.1 * right


BAD_TRAIN = """
    --steps=0 --steps=-1 --steps=x --steps=1e3 --batch=0 --batch=-4 --batch=x --accum=0 --accum=x
    --image-size=0 --image-size=x --image-size=-8 --image-size=4 --image-size=15 --out= --data= --objective=mse --objective=
    --schedule=sigmoid --T=1 --T=0 --T=x --T=999999999 --variance=fixed --t-sampler=best
    --channels=0 --channels=-1 --channels=x --channels=7 --channels=37 --channels=1000000000 --device=cuda --device=mps --channel-mult=0
    --channel-mult=1,,2 --channel-mult=x --channel-mult=1,-2 --num-res-blocks=0 --num-res-blocks=x
    --attention=5 --attention=x --attention=16,8,64 --num-heads=0 --num-heads=3 --num-heads=x
    --dropout=-0.1 --dropout=1 --dropout=x --dropout=nan --lr=-1 --lr=x --lr=nan --lr=2
    --warmup=-1 --warmup=x --ema=-0.1 --ema=1.1 --ema=x --ema=nan --grad-clip=-1 --grad-clip=x
    --seed=-1 --seed=x --seed=99999999999 --device=gpu --dtype=fp16 --log-every=0 --log-every=x
    --sample-every=0 --save-every=0 --save-every=x --unknown --data --data=nowhere --init=nowhere.pt
    --data=cifar10|--image-size=16 --eval-images=0 --eval-images=1 --eval-images=x --eval-steps=0 --eval-steps=x --eval-calls=0 --eval-calls=x
    --ckpt=x.pt --eval-only --class-cond=yes --data=train.py --out=file --out=file/deeper
    --init=file --batch=1|--accum=2 --objective=hybrid|--variance=small --eval-only|--ckpt=nowhere.pt
    --channel-mult=none --eval-only|--ckpt=file --eval-only|--ckpt=. --eval-only|--ckpt=CKPT|--eval-steps=21
""".split()
BAD_SAMPLE = """
    --n=0 --n=-1 --n=x --n=99999 --steps=0 --steps=21 --steps=x --method=euler --eta=1 --seed=-1
    --eta=2|--method=ddim --eta=x --class=10 --class=-1 --class=x --seed=x --batch=0 --batch=x
    --out=x.jpg --out= --out=folder.png --out=file/x.png --out=file/x --ckpt=nowhere --ckpt=file
    --ckpt=. --device=cuda --device=gpu --dtype=fp16 --T=1 --num-heads=0 --schedule=x --unknown
""".split()


@pytest.mark.parametrize(
    "name, flags", [("train.py", f) for f in BAD_TRAIN] + [("sample.py", f) for f in BAD_SAMPLE]
)
def test_wrong_input_ends_in_one_line(name, flags, trained, here, capsys):
    open("file", "w").write("no checkpoint")
    os.mkdir("folder.png")
    before = sorted(os.listdir("."))
    ours = [] if name == "train.py" else ["--ckpt", trained, "--n", 1, "--steps", 2]
    given = flags.replace("CKPT", str(trained)).split("|")
    status = script(name, *ours, *given)
    out, errors = capsys.readouterr()
    errors = [line for line in errors.splitlines() if not line.startswith(("data=", str(trained)))]
    assert status in (1, 2) and not out
    assert len(errors) == 1 and errors[0].startswith(f"{name}: error: ") and len(errors[0]) < 400
    assert [file for file in sorted(os.listdir(".")) if file != "runs"] == before


def test_the_readme_leads_to_the_line_of_each_equation():
    readme = open(os.path.join(ROOT, "README.md")).read()
    cells = re.findall(r"\| ([\d, ]+) \| [^|]+ \| \[(\w+\.py):(\d+)\]\(\2#L\3\) ", readme)
    found = {int(n) for numbers, _, _ in cells for n in numbers.split(", ")}
    assert found == set(range(3, 20))
    for numbers, file, line in cells:
        text = open(os.path.join(ROOT, file)).read().splitlines()[int(line) - 1]
        assert f"eq. {numbers}" in text


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_help_fits_a_screen_and_names_every_flag(name, capsys):
    assert script(name, "--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_every_flag_is_tried_above(name, capsys):
    assert script(name, "--help") == 0
    tests = open(__file__).read().split("BAD_TRAIN = ")[0]
    flags = set(re.findall(r"  (--[\w-]+)", capsys.readouterr().out))
    assert len(flags) > 10 and not {flag for flag in flags if flag not in tests}


def test_help_shows_the_defaults_of_the_data(capsys):
    assert script("train.py", "--data", "cifar10", "--help") == 0
    cifar10 = capsys.readouterr().out
    assert "(default: 500000)" in cifar10 and "(default: 0.3)" in cifar10
    assert script("train.py", "--help") == 0
    assert "(default: 500000)" not in capsys.readouterr().out
