"""The mathematics of Improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672), for any network.

This file stands alone: copy it beside a network of your own. A `model` here is any callable
(x_t, time, y) -> (N, C or 2C, H, W) which predicts the noise ε that is in x_t (N, C, H, W) and, for
variance="learned", v in C more channels: -1 is β̃, 1 is β. Equation numbers are the paper's.

Images are in [-1, 1]. The code's t = 0 … T-1 is the paper's t = 1 … T: x_t at t = 0 is its x_1.
Docstrings write p(x_{t-1} | x_t) with the paper's t, but L_t with the code's: L_0 is the decoder
(eq. 5), L_1 … L_{T-1} are KLs (eq. 6), and L_T is the prior (eq. 7), all in bits per dimension.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

LAMBDA = 0.001  # weight of L_vlb in L_hybrid (eq. 16)

# The scripts' default, chosen by measurement (README, "Few steps").
FEW_STEPS, FEW_STEPS_SPACING = 25, 1.15
FEW_STEPS_SAMPLER = dict(method="ancestral", order=2)
METHODS = ("ancestral", "ddim")


# ---- Noise schedules ---------------------------------------------------------------------------


def linear_betas(T):
    """Ho et al.'s betas, 1e-4 … 0.02 for T = 1000, scaled to any T -> float64 (T,)."""
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(T, s=0.008):
    """Betas of alphas_bar ∝ cos²((t/T + s) / (1 + s) · π/2), at most 0.999 (eq. 17) -> (T,)."""
    time = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_bar = torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def select_timesteps(steps, last, spacing):
    """`steps` of the timesteps 0 … last, both ends among them (one step: last) -> a rising list.

    t_i = (i / (steps-1))^spacing · last: spacing 1 lays them evenly, 2 and 3 ever closer together
    towards t = 0, where the terms of the bound are largest. No two are equal.
    """
    if steps == 1:
        return [last]
    return [max(i, round((i / (steps - 1)) ** spacing * last)) for i in range(steps)]


# ---- The process -------------------------------------------------------------------------------


class Diffusion:
    """The forward process q, the reverse process p, the losses, the likelihood and the samplers.

    schedule       one of SCHEDULES, or betas (a tensor or list, each in (0, 1)), which then set T
    T              number of steps of the process that the network is trained on
    variance       Σ of p: "learned" (eq. 15), "small" (β̃) or "large" (β)
    steps          run only this many of the T timesteps (an int), or just the listed ones: the same
                   process with the betas of eq. 19. None: all of them
    spacing        how an int of steps is laid, 1 … 10: see select_timesteps
    time_scale     the network is given t·time_scale. None: 1000/T, so that it need not know T
    min_alpha_bar  leave out the last timesteps, whose alphas_bar is smaller, unless steps is a
                   list. In x0_hat, the error of ε is divided by sqrt(alphas_bar), which is only
                   1e-5 at the end of the cosine schedule of T = 4000

    Everywhere t (N,) int64 counts the steps of this process, 0 … num_steps-1. Only the network is
    given the original timestep. The tables are float64, made once, on the CPU until `.to(device)`.
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self, schedule="cosine", T=4000, variance="learned", steps=None, spacing=1.0,
        time_scale=None, min_alpha_bar=0.0,
    ):  # fmt: skip
        if variance not in ("learned", "small", "large"):
            raise ValueError(f"variance must be learned, small or large, not {variance!r}")
        if not 1 <= spacing <= 10:
            raise ValueError(f"spacing must be 1 … 10, not {spacing}")
        if isinstance(schedule, str):
            if schedule not in SCHEDULES or T < 2:
                raise ValueError(f"{schedule=} must be in {list(SCHEDULES)}, {T=} at least 2")
            schedule = SCHEDULES[schedule](T)
        betas = torch.as_tensor(schedule, dtype=torch.float64).cpu()
        T = len(betas)
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must lie between 0 and 1")

        alphas_bar = torch.cumprod(1 - betas, 0)
        last = max(0, int((alphas_bar >= min_alpha_bar).sum()) - 1)
        chosen = T if steps is None else steps
        if isinstance(chosen, (int, np.integer)):
            chosen = select_timesteps(min(chosen, last + 1), last, spacing)
        timesteps = torch.tensor(sorted(set(chosen)))
        too_many = isinstance(steps, (int, np.integer)) and steps > T
        if too_many or not len(timesteps) or timesteps[0] < 0 or timesteps[-1] >= T:
            raise ValueError(f"steps must be 1 … {T}, or a list of 0 … {T - 1}, not {steps}")
        self.T, self.variance, self.num_steps = T, variance, len(timesteps)
        self.times = (timesteps * (1000 / T if time_scale is None else time_scale)).float()

        # The tables, each (num_steps,), by the paper's formulas.
        self.alphas_bar = alphas_bar = alphas_bar[timesteps]
        self.alphas_bar_prev = before = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        alphas = alphas_bar / before
        self.betas = betas = 1 - alphas  # eq. 19; if no step is skipped, the schedule's own
        self.posterior_variance = small = betas * (1 - before) / (1 - alphas_bar)  # β̃, eq. 10
        self.sqrt_alphas_bar = alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - alphas_bar).sqrt()
        self.posterior_x0 = betas * before.sqrt() / (1 - alphas_bar)  # of x0 in eq. 11
        self.posterior_x_t = (1 - before) * alphas.sqrt() / (1 - alphas_bar)  # of x_t in eq. 11
        # β̃ is 0 at t = 0, where x_0 is known; but the decoder (eq. 5) needs a width. β̃ of t = 1
        # takes its place, also in large and in learned's v = -1, as in the released code.
        first = small[1:2] if len(betas) > 1 else betas
        self.log_betas = betas.log()
        self.log_small = torch.cat([first, small[1:]]).log()
        self.log_large = torch.cat([first, betas[1:]]).log()
        # Order 2's factor (λ_{i-1} - λ_i) / (2(λ_i - λ_{i+1})): 0 in the first and the last step.
        widths = (alphas_bar / (1 - alphas_bar)).log().diff()  # in log SNR, Lu et al.'s 2λ
        self.extrapolation = torch.zeros_like(betas)
        self.extrapolation[1:-1] = widths[:-1] / (2 * widths[1:])

    def to(self, device):
        """Move the tables, as float32 to devices that know no float64. Returns self."""
        mps = torch.device(device).type == "mps"
        for name, table in vars(self).items():
            if torch.is_tensor(table):
                setattr(self, name, (table.float() if mps else table).to(device))
        return self

    @staticmethod
    def _at(table, t, x):
        """The table's value for each image, in the precision of x, shaped to multiply x."""
        return table[t].to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    # -- q: from data to noise

    def add_noise(self, x0, t, noise):
        """A sample of q(x_t | x0): x0, noise (N, C, H, W), t (N,) -> x_t (eq. 8, 9)."""
        signal = self._at(self.sqrt_alphas_bar, t, x0) * x0
        return signal + self._at(self.sqrt_one_minus_alphas_bar, t, x0) * noise

    def posterior(self, x0, x_t, t):
        """q(x_{t-1} | x_t, x0) -> mean, log_variance, each (N, C, H, W) (eq. 10, 11, 12)."""
        mean = self._at(self.posterior_x0, t, x_t) * x0 + self._at(self.posterior_x_t, t, x_t) * x_t
        return mean, self._at(self.log_small, t, x_t).expand_as(x_t)

    def prior(self, x0):
        """L_T = KL(q(x_T | x0) || N(0, 1)) -> (N,) bits per dimension (eq. 7). Needs no network."""
        mean = self.sqrt_alphas_bar[-1] * x0
        log_variance = 2 * self.sqrt_one_minus_alphas_bar[-1].log().to(x0.dtype)
        zero = x0.new_zeros(())
        return bits(normal_kl(mean, log_variance, zero, zero))

    # -- p: from noise to data

    def predict(self, model, x_t, t, y=None):
        """Call the model (only this method does) -> ε and v (or None), each (N, C, H, W).

        Raises ValueError if the model returns another number of channels than it must.
        """
        out = model(x_t, self.times[t], y).to(x_t.dtype)
        C, n = x_t.shape[1], out.shape[1]
        if n != 2 * C and (n != C or self.variance == "learned"):
            raise ValueError(f"the model returned {n} channels: ε takes {C}, a learned v {C} more")
        return out[:, :C], (out[:, C:] if n > C else None)

    def reverse(self, eps, v, x_t, t, clip=True):
        """p(x_{t-1} | x_t) -> mean, log_variance, x0_hat, each (N, C, H, W) (eq. 3).

        x0_hat is the x0 that follows from ε, clipped to [-1, 1] if clip; the mean follows from it.
        """
        x0_hat = x_t - self._at(self.sqrt_one_minus_alphas_bar, t, x_t) * eps
        x0_hat = x0_hat / self._at(self.sqrt_alphas_bar, t, x_t)  # eq. 9, solved for x0
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        mean, log_variance = self.posterior(x0_hat, x_t, t)  # eq. 11; if not clipped, eq. 13
        if self.variance == "large":
            log_variance = self._at(self.log_large, t, x_t).expand_as(x_t)
        elif self.variance == "learned":  # eq. 15
            frac = (v + 1) / 2
            log_variance = frac * self._at(self.log_betas, t, x_t) + (1 - frac) * log_variance
        return mean, log_variance, x0_hat

    # -- Losses and likelihood

    def vlb_term(self, x0, x_t, t, mean, log_variance):
        """L_t (N,) in bits per dimension, for the mean and log_variance that p has at x_t."""
        true_mean, true_log_variance = self.posterior(x0, x_t, t)
        kl = bits(normal_kl(true_mean, true_log_variance, mean, log_variance))  # eq. 6
        nll = -bits(decoder_log_likelihood(x0, mean, log_variance))  # eq. 5
        return torch.where(t == 0, nll, kl)

    def losses(self, model, x0, t, y=None, noise=None, objective="hybrid"):
        """The training loss (N,) at timesteps t (N,), and T·L_t (N,), whose mean is L_vlb - L_T.

        "simple"  L_simple: the mean of (ε - ε̂)² over C·H·W (eq. 14 has the sum); v learns nothing
        "vlb"     T·L_t, an estimate of L_vlb (eq. 4) but for L_T, which has no gradient
        "hybrid"  L_simple + λ·T·L_t (eq. 16). λ = 0.001 is for this L_simple, and for L_t in bits.
                  p's mean in L_t is detached: ε learns from L_simple alone, v from L_vlb alone
        x0_hat is never clipped here: a clipped estimate has no gradient.
        Raises ValueError for another objective, or for "hybrid" without a learned variance.
        """
        if objective not in ("simple", "hybrid", "vlb"):
            raise ValueError(f"objective must be simple, hybrid or vlb, not {objective!r}")
        if objective == "hybrid" and self.variance != "learned":
            raise ValueError("objective hybrid needs variance learned: its second term trains it")
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.add_noise(x0, t, noise)
        eps, v = self.predict(model, x_t, t, y)
        simple = (noise - eps).square().flatten(1).mean(1)
        eps = eps if objective == "vlb" else eps.detach()
        mean, log_variance, _ = self.reverse(eps, v, x_t, t, clip=False)
        # L_vlb is a sum of num_steps terms; num_steps times a random one estimates it.
        vlb = self.num_steps * self.vlb_term(x0, x_t, t, mean, log_variance)
        loss = {"simple": simple, "vlb": vlb, "hybrid": simple + LAMBDA * vlb}[objective]
        return loss, vlb.detach()

    def draw_term(self, model, x0, t, y=None):
        """L_t (N,) in bits per dimension at one draw of x_t, x0_hat clipped as when sampling."""
        x_t = self.add_noise(x0, t, torch.randn_like(x0))
        eps, v = self.predict(model, x_t, t, y)
        mean, log_variance, _ = self.reverse(eps, v, x_t, t)
        return self.vlb_term(x0, x_t, t, mean, log_variance)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, y=None, progress=False):
        """Every term of the variational bound: x0 (N, C, H, W) -> terms (N, num_steps), prior (N,).

        The bound of an image is the sum of its terms and its prior (eq. 4). Costs num_steps calls.
        """
        terms = []
        for i in tqdm(range(self.num_steps), "bits/dim", disable=not progress, leave=False):
            t = torch.full(x0.shape[:1], i, device=x0.device)
            terms.append(self.draw_term(model, x0, t, y))
        return torch.stack(terms, 1), self.prior(x0)

    @torch.no_grad()
    def estimate_bits_per_dim(self, model, x0, p, calls, y=None):
        """An unbiased estimate of the variational bound from 1 + calls calls of the model.

        x0 (N, C, H, W) -> total (N,), terms (N, num_steps) with NaN where t was not drawn, prior
        (N,). L_0 is always computed. Each image draws `calls` timesteps t ≥ 1 from p (num_steps,),
        see pilot: one in each of `calls` equal parts of p's mass.
        """
        N, device = len(x0), x0.device
        p = p[1:] / p[1:].sum()
        u = torch.arange(calls, device=device)[:, None] + torch.rand(calls, N, device=device)
        ends = p.cumsum(0)[:-1]  # the last is 1, but a sum of floats may end below it
        drawn = 1 + torch.searchsorted(ends, u.to(p.dtype) / calls, right=True)
        weights = torch.cat([p.new_ones(1), 1 / (calls * p)]).to(x0.dtype)
        total = prior = self.prior(x0)
        terms = x0.new_full((N, self.num_steps), math.nan)
        for t in torch.cat([torch.zeros_like(drawn[:1]), drawn]):
            L_t = self.draw_term(model, x0, t, y)
            terms.scatter_(1, t[:, None], L_t[:, None])
            total = total + weights[t] * L_t
        return total, terms, prior

    @torch.no_grad()
    def pilot(self, model, x0, y=None, points=32):
        """What estimate_bits_per_dim draws t from: p (num_steps,) ∝ sqrt(E[L_t²]), 0 at t = 0.

        L_t is measured on the images x0 at `points` timesteps, most of them near t = 0, where it is
        large, and interpolated between them. Raises ValueError for fewer than 3 steps.
        """
        if (last := self.num_steps - 1) < 2:
            raise ValueError("so few steps need no pilot: compute every term")
        knots = [1 + t for t in select_timesteps(min(points, last), last - 1, spacing=3)]
        log_rms = []
        for knot in knots:
            t = torch.full(x0.shape[:1], knot, device=x0.device)
            L_t = self.draw_term(model, x0, t, y)
            log_rms.append(L_t.square().mean().sqrt().clamp(min=1e-12).log().item())
        p = np.exp(np.interp(np.arange(1, self.num_steps), knots, log_rms))
        p = 0.98 * p / p.sum() + 0.02 / last  # no t is so rare that its weight spoils the estimate
        return torch.from_numpy(np.concatenate([[0.0], p])).to(self.betas)

    # -- Samplers

    @torch.no_grad()
    def trajectory(
        self, model, noise, y=None, method="ancestral", eta=0.0, order=1, clip=True, generators=None
    ):
        """Yield (i, x after step i, x0_hat) for i = num_steps-1 … 0, from noise (N, C, H, W).

        The x of i = 0 is the image. Each step costs one call of the model.

        method      "ancestral": draw from p(x_{t-1} | x_t); "ddim": with eta 0 (no noise) … 1
        order       1, or 2: the step uses x0_hat extrapolated half a step ahead, from this call and
                    the one before (Lu et al. 2022, arXiv 2211.01095). With ddim and eta 0 this is
                    DPM-Solver++(2M), with ancestral its SDE variant, whose variance is always β̃
        clip        whether x0_hat is clipped to [-1, 1]; an extrapolated one is not clipped again
        generators  one torch.Generator for each image, on the device of noise: then an image does
                    not depend on the others of its batch. None: the global one
        Raises ValueError for another method, eta or order.
        """
        if method not in METHODS or not 0 <= eta <= 1 or order not in (1, 2):
            given = f"{method=}, {eta=}, {order=}"
            raise ValueError(f"method must be in {METHODS}, eta 0 … 1, order 1 or 2: {given}")
        x, previous = noise, 0.0
        for i in reversed(range(self.num_steps)):
            t = torch.full(x.shape[:1], i, device=x.device)
            eps, v = self.predict(model, x, t, y)
            mean, log_variance, x0_hat = self.reverse(eps, v, x, t, clip)
            ahead = x0_hat
            if order == 2:  # the factor is 0 in the first step, which has no previous x0_hat
                ahead = x0_hat + self.extrapolation[i] * (x0_hat - previous)
                # A learned Σ adds the error of x0_hat to β̃. Order 2 leaves less of it: β̃ is used.
                mean, log_variance = self.posterior(ahead, x, t)
            if method == "ancestral":
                std = torch.exp(0.5 * log_variance)
            else:  # Song et al. 2021, their (12) and (16)
                eps = (x - self.sqrt_alphas_bar[i] * ahead) / self.sqrt_one_minus_alphas_bar[i]
                before, variance = self.alphas_bar_prev[i], eta**2 * self.posterior_variance[i]
                mean = before.sqrt() * ahead + (1 - before - variance).clamp(min=0).sqrt() * eps
                std = variance.sqrt()
            x, previous = mean, x0_hat
            if i > 0 and (method != "ddim" or eta > 0):  # the last step adds no noise
                z = randn(x.shape[1:], generators) if generators else torch.randn_like(x)
                x = torch.addcmul(mean, std, z)
            yield i, x, x0_hat

    def sample(self, model, noise, *args, progress=False, **more):
        """Images (N, C, H, W) in [-1, 1] from x_T = noise. The other arguments are trajectory's."""
        steps = self.trajectory(model, noise, *args, **more)
        for _, x, _ in tqdm(steps, "sampling", self.num_steps, disable=not progress, leave=False):
            pass
        return x.clamp(-1, 1)


def guided(model, scale):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): a model to sample from.

    ε is ε_uncond + scale·(ε_cond - ε_uncond), and v is the conditional one, from one call of the
    model with twice the batch. Scale 1 is the conditional model, 0 the unconditional one. The model
    must have been trained with y = -1, no class, now and then.
    """

    def guided_model(x_t, time, y, **inputs):
        labels = torch.cat([y, torch.full_like(y, -1)])
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        out = model(torch.cat([x_t, x_t]), torch.cat([time, time]), labels, **twice)
        cond, uncond = out.to(x_t.dtype).chunk(2)
        C = x_t.shape[1]
        eps = torch.lerp(uncond[:, :C], cond[:, :C], float(scale))
        return torch.cat([eps, cond[:, C:]], dim=1)

    return guided_model


def few_steps(T, image_size):
    """Diffusion's arguments for FEW_STEPS of images (N, C, image_size, image_size).

    Sampling begins where alphas_bar is 2/(H·W). If it is smaller, x0_hat is mostly error. If it is
    larger, the mean pixel of x_t shows the colour of x0, which pure noise (0 ± 1/sqrt(H·W)) lacks.
    The spacing is the best of those measured for 10 calls, and costs hardly any quality at 25.
    """
    return dict(steps=min(FEW_STEPS, T), spacing=FEW_STEPS_SPACING, min_alpha_bar=2 / image_size**2)


# ---- Gaussians ---------------------------------------------------------------------------------


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N1 || N2) of each element, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.expm1() - ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def decoder_log_likelihood(x0, mean, log_variance):
    """log p(x0 | x_1) of each element, in nats: a Gaussian integrated over each pixel's bin.

    x0 in [-1, 1] on the grid of 256 values. Bins are 2/255 wide; those at ±1 are open to infinity.
    """
    inv_std = torch.exp(-0.5 * log_variance)
    upper = torch.where(x0 > 0.999, 1e6, inv_std * (x0 - mean + 1 / 255))
    lower = torch.where(x0 < -0.999, -1e6, inv_std * (x0 - mean - 1 / 255))
    # log P(lower < z < upper), mirrored into the left tail, where log_ndtr keeps all its digits.
    mirror = upper + lower > 0
    upper, lower = torch.where(mirror, -lower, upper), torch.where(mirror, -upper, lower)
    log_upper = torch.special.log_ndtr(upper)
    log_ratio = (torch.special.log_ndtr(lower) - log_upper).clamp(max=-1e-12)
    return log_upper + torch.log(-torch.expm1(log_ratio))


def bits(nats):
    """Nats of each element (N, ...) -> bits per dimension (N,)."""
    return nats.flatten(1).mean(1) / math.log(2)


# ---- Randomness --------------------------------------------------------------------------------

# Each stream has its own range of indices, so that no two streams of a seed meet. The indices of
# "noise" are training steps or sampled images; "dropout" has steps and ranks, "order" epochs.
STREAMS = {"noise": 0, "dropout": 2**30, "order": 2**31}


def generator(seed, index, device="cpu", stream="noise"):
    """A torch.Generator for one use: it depends on the seed, the stream and the index alone."""
    number = (seed * 0x9E3779B1 + STREAMS[stream] + index) % 2**32  # the CPU reads 32 bits alone
    return torch.Generator(device).manual_seed(number)


def randn(shape, generators):
    """Normal noise (N, *shape) on the generators' device: one generator for each image."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])
