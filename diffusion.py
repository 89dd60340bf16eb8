"""The mathematics of Improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672), for any network.

This file stands alone. A `model` is any callable (x_t, time, y) -> (N, C or 2C, H, W) that predicts
the noise ε in x_t (N, C, H, W) and, for variance="learned", v in [-1, 1] after it. Equation numbers
are the paper's. Index t = 0 … T-1 is its t = 1 … T, while L_t has its index: L_0 is the decoder
(eq. 5), L_1 … L_{T-1} are KLs (eq. 6). Images are in [-1, 1], L_t in bits per dimension.
"""

import math

import torch
from tqdm import tqdm

LAMBDA = 0.001  # weight of L_vlb in L_hybrid (eq. 16)


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


# ---- Gaussians ---------------------------------------------------------------------------------


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N1 || N2) of each element, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.expm1() - ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def decoder_log_likelihood(x0, mean, log_variance):
    """log p(x0 | x_1) of each element, in nats: a Gaussian summed over the bin of each pixel value.

    x0 in [-1, 1] on the grid of 256 values; bins are 2/255 wide, those at ±1 open to infinity.
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
    """(N, ...) nats of each element -> (N,) bits per dimension."""
    return nats.flatten(1).mean(1) / math.log(2)


def generator(seed, index, device="cpu"):
    """A torch.Generator for image or step `index` of a seed; those of one seed all differ."""
    # The CPU's generator looks at the lower 32 bits alone.
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + index) % 2**32)


def randn(shape, generators):
    """Normal noise (N, *shape), that of each image from its own generator, on their device."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


# ---- The process -------------------------------------------------------------------------------


class Diffusion:
    """A diffusion process: q, p, losses, likelihood and samplers.

    schedule    one of SCHEDULES, or betas (a tensor or list, each in (0, 1)), which then set T
    T           number of steps of the process that the network is trained on
    variance    of p: "learned" (eq. 15), "small" (β̃) or "large" (β; at t = 0, as in the released
                code, β̃ of t = 1)
    steps       run only this many of the T timesteps, evenly spaced with both ends (an int), or
                just the listed ones: the same process with the betas of eq. 19. None: all of them
    time_scale  the network sees t·time_scale; None: 1000/T, so that it need not know T

    Everywhere t (N,) counts the steps of this process, 0 … num_steps-1; only the network is given
    the original timestep. Tables are float64, made once, on the CPU until `.to(device)`.
    Raises ValueError for arguments out of range.
    """

    def __init__(self, schedule="cosine", T=4000, variance="learned", steps=None, time_scale=None):
        if variance not in ("learned", "small", "large"):
            raise ValueError(f"variance must be learned, small or large, not {variance!r}")
        if isinstance(schedule, str):
            if schedule not in SCHEDULES:
                raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, not {schedule!r}")
            if T < 2:
                raise ValueError(f"T must be at least 2, not {T}")
            betas = SCHEDULES[schedule](T)
        else:
            betas = torch.as_tensor(schedule, dtype=torch.float64).cpu()
            T = len(betas)
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must lie between 0 and 1")
        if steps is None:
            steps = range(T)
        elif isinstance(steps, int):
            if not 1 <= steps <= T:
                raise ValueError(f"steps must be 1 … {T}, as the process has T = {T}, not {steps}")
            stride = (T - 1) / max(steps - 1, 1)
            steps = [round(i * stride) for i in range(steps)] if steps > 1 else [T - 1]
        timesteps = torch.tensor(sorted(set(steps)))
        if not len(timesteps) or timesteps[0] < 0 or timesteps[-1] >= T:
            raise ValueError(f"steps must be timesteps between 0 and {T - 1}")

        self.T, self.variance, self.num_steps = T, variance, len(timesteps)
        self.times = (timesteps * (1000 / T if time_scale is None else time_scale)).float()

        # The tables, each (num_steps,), with the paper's formulas.
        alphas_bar = torch.cumprod(1 - betas, 0)[timesteps]
        alphas_bar_prev = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        alphas = alphas_bar / alphas_bar_prev
        betas = 1 - alphas  # eq. 19; if no step is skipped, the schedule's own
        posterior_variance = betas * (1 - alphas_bar_prev) / (1 - alphas_bar)  # β̃, eq. 10
        # β̃ is 0 at t = 0, where x_0 is known. The decoder needs a width there: the next step's, as
        # in the released code.
        first = posterior_variance[1:2] if len(betas) > 1 else betas
        self.alphas_bar, self.alphas_bar_prev, self.betas = alphas_bar, alphas_bar_prev, betas
        self.posterior_variance = posterior_variance
        self.sqrt_alphas_bar = alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - alphas_bar).sqrt()
        # The coefficients of x0 and x_t in eq. 11.
        self.posterior_x0 = betas * alphas_bar_prev.sqrt() / (1 - alphas_bar)
        self.posterior_x_t = (1 - alphas_bar_prev) * alphas.sqrt() / (1 - alphas_bar)
        self.log_betas = betas.log()
        self.log_small = torch.cat([first, posterior_variance[1:]]).log()
        self.log_large = torch.cat([first, betas[1:]]).log()

    def to(self, device):
        """Move the tables, as float32 to devices that know no float64. Returns self."""
        for name, table in vars(self).items():
            if torch.is_tensor(table):
                mps = torch.device(device).type == "mps"
                setattr(self, name, (table.float() if mps else table).to(device))
        return self

    @staticmethod
    def _like(values, x):
        """A value an image, in the precision of x, shaped to multiply it."""
        return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def _at(self, table, t, x):
        return self._like(table[t], x)

    # -- q: from data to noise

    def add_noise(self, x0, t, noise):
        """A sample of q(x_t | x0): x0, noise (N, C, H, W), t (N,) -> x_t (eq. 8, 9)."""
        signal = self._at(self.sqrt_alphas_bar, t, x0) * x0
        return signal + self._at(self.sqrt_one_minus_alphas_bar, t, x0) * noise

    def posterior(self, x0, x_t, t):
        """q(x_{t-1} | x_t, x0) -> mean, log_variance (N, C, H, W) (eq. 10, 11, 12).

        At t = 0 its variance is 0; log_variance is that of t = 1 instead, to stay finite.
        """
        mean = self._at(self.posterior_x0, t, x_t) * x0 + self._at(self.posterior_x_t, t, x_t) * x_t
        return mean, self._at(self.log_small, t, x_t).expand_as(x_t)

    def prior(self, x0):
        """L_T = KL(q(x_T | x0) || N(0, 1)) -> (N,) bits per dimension (eq. 7). Needs no network."""
        t = torch.full(x0.shape[:1], self.num_steps - 1, device=x0.device)
        mean = self._at(self.sqrt_alphas_bar, t, x0) * x0
        log_variance = self._at(2 * self.sqrt_one_minus_alphas_bar.log(), t, x0)
        zero = mean.new_zeros(())
        return bits(normal_kl(mean, log_variance, zero, zero))

    # -- p: from noise to data

    def _network(self, model, x_t, t, y):
        """The model's ε and v (of no channels if it has none), their number checked."""
        out = model(x_t, self.times[t], y).to(x_t.dtype)
        C = x_t.shape[1]
        if out.shape[1] not in (C, 2 * C) or (self.variance == "learned" and out.shape[1] == C):
            wanted = f"2·{C}, ε and v" if self.variance == "learned" else f"{C} or 2·{C}"
            raise ValueError(
                f"the model returned {out.shape[1]} channels; with variance={self.variance!r} it"
                f" must return {wanted}"
            )
        return out[:, :C], out[:, C:]

    def reverse(self, model, x_t, t, y=None, clip=True):
        """p(x_{t-1} | x_t) -> mean, log_variance, x0_hat, each (N, C, H, W) (eq. 3).

        x0_hat is the model's estimate of x0, clipped to [-1, 1] if clip, before the mean is formed.
        """
        eps, v = self._network(model, x_t, t, y)
        x0_hat = x_t - self._at(self.sqrt_one_minus_alphas_bar, t, x_t) * eps
        x0_hat = x0_hat / self._at(self.sqrt_alphas_bar, t, x_t)  # eq. 9, solved for x0
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        mean, log_small = self.posterior(x0_hat, x_t, t)  # eq. 11; unclipped: eq. 13
        if self.variance == "small":
            return mean, log_small, x0_hat
        if self.variance == "large":
            return mean, self._at(self.log_large, t, x_t).expand_as(x_t), x0_hat
        frac = (v + 1) / 2
        log_variance = frac * self._at(self.log_betas, t, x_t) + (1 - frac) * log_small  # eq. 15
        return mean, log_variance, x0_hat

    # -- Likelihood and losses

    def vlb_term(self, model, x0, x_t, t, y=None, clip=True):
        """L_t (N,) in bits per dimension: a KL, or at t = 0 the negative log-likelihood of x0."""
        mean, log_variance, _ = self.reverse(model, x_t, t, y, clip)
        true_mean, true_log_variance = self.posterior(x0, x_t, t)
        kl = bits(normal_kl(true_mean, true_log_variance, mean, log_variance))  # eq. 6
        nll = -bits(decoder_log_likelihood(x0, mean, log_variance))  # eq. 5
        return torch.where(t == 0, nll, kl)

    def loss(self, model, x0, t, y=None, noise=None, objective="hybrid"):
        """The training loss of each image (N,), at its timestep t (N,). See losses."""
        return self.losses(model, x0, t, y, noise, objective)[0]

    def losses(self, model, x0, t, y=None, noise=None, objective="hybrid"):
        """The training loss (N,), and for the log T·L_t (N,), whose mean over t estimates L_vlb.

        objective  "simple": L_simple, the mean over C·H·W of (ε - ε̂)² (eq. 14 writes the sum),
                             which teaches v nothing
                   "vlb":    T·L_t, an estimate of L_vlb in bits per dimension (eq. 4)
                   "hybrid": L_simple + λ·T·L_t, the mean in L_t detached, so that ε learns from
                             L_simple alone and v from L_vlb alone (eq. 16); λ = 0.001 belongs
                             to this mean and to bits per dimension
        The predicted x0 is never clipped here: a clipped prediction has no gradient.
        """
        if objective not in ("simple", "hybrid", "vlb"):
            raise ValueError(f"objective must be simple, hybrid or vlb, not {objective!r}")
        if objective == "hybrid" and self.variance != "learned":
            raise ValueError("objective hybrid needs variance learned: its second term trains it")
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.add_noise(x0, t, noise)
        eps, v = self._network(model, x_t, t, y)
        simple = (noise - eps).square().flatten(1).mean(1)
        outputs = torch.cat([eps if objective == "vlb" else eps.detach(), v], dim=1)
        # L_vlb is a sum over steps, t one step drawn from them: hence the number of steps.
        vlb = self.num_steps * self.vlb_term(lambda *_: outputs, x0, x_t, t, clip=False)
        loss = {"simple": simple, "vlb": vlb, "hybrid": simple + LAMBDA * vlb}[objective]
        return loss, vlb.detach()

    @torch.no_grad()
    def bits_per_dim(self, model, x0, y=None, p=None, calls=None, progress=False):
        """The variational bound of images, exactly or estimated from a few calls of the model.

        x0 (N, C, H, W) -> total (N,), terms (N, num_steps), prior (N,); total = Σ terms + prior.
        p None      every L_t: num_steps calls of the model
        p, calls    an unbiased estimate of the total from 1 + calls of them: L_0, and `calls`
                    timesteps t ≥ 1 drawn from p (num_steps,), see pilot; the terms not drawn
                    are NaN. Each image has one t in each of `calls` equal parts of p's mass
        """
        if (p is None) != (calls is None):
            raise ValueError("p and calls go together")
        N, device = len(x0), x0.device
        times = torch.arange(self.num_steps, device=device)[:, None].expand(-1, N)
        weights = torch.ones(self.num_steps, device=device)
        if p is not None:
            p = p[1:] / p[1:].sum()
            u = torch.arange(calls, device=device)[:, None] + torch.rand(calls, N, device=device)
            drawn = 1 + torch.searchsorted(p.cumsum(0), u.to(p.dtype) / calls, right=True)
            times = torch.cat([times[:1], drawn.clamp(max=self.num_steps - 1)])
            weights[1:] /= calls * p
        total = prior = self.prior(x0)
        terms = x0.new_full((N, self.num_steps), math.nan)
        for t in tqdm(times, "bits/dim", disable=not progress, leave=False):
            x_t = self.add_noise(x0, t, torch.randn_like(x0))
            L_t = self.vlb_term(model, x0, x_t, t, y)
            terms.scatter_(1, t[:, None], L_t[:, None])
            total = total + weights[t] * L_t
        return total, terms, prior

    @torch.no_grad()
    def pilot(self, model, x0, y=None, points=32):
        """What bits_per_dim draws t from: p (num_steps,) ∝ sqrt(E[L_t²]), 0 at t = 0.

        L_t is measured on the images x0 at `points` timesteps, its logarithm interpolated.
        Raises ValueError for a process of fewer than 3 steps.
        """
        if (last := self.num_steps - 1) < 2:
            raise ValueError("so few steps need no pilot: compute every term")
        fractions = torch.linspace(0, 1, points // 2, dtype=torch.float64)
        knots = torch.cat([last**fractions, 1 + (last - 1) * fractions]).round().long().unique()
        rms = []
        for knot in knots.tolist():
            t = torch.full(x0.shape[:1], knot, device=x0.device)
            x_t = self.add_noise(x0, t, torch.randn_like(x0))
            rms.append(self.vlb_term(model, x0, x_t, t, y).square().mean().sqrt())
        log_rms = torch.stack(rms).cpu().double().clamp(min=1e-12).log()
        t = torch.arange(1, self.num_steps)
        right = torch.searchsorted(knots, t).clamp(min=1)
        fraction = (t - knots[right - 1]) / (knots[right] - knots[right - 1])
        p = torch.lerp(log_rms[right - 1], log_rms[right], fraction.double()).exp()
        p = 0.98 * p / p.sum() + 0.02 / last  # no t is so rare that its weight spoils the estimate
        return torch.cat([p.new_zeros(1), p]).to(self.betas)

    # -- Samplers

    def _ddim(self, x_t, t, x0_hat, eta):
        """Mean and standard deviation of a DDIM step (Song et al. 2021, eq. 12 and 16)."""
        eps = x_t - self._at(self.sqrt_alphas_bar, t, x_t) * x0_hat
        eps = eps / self._at(self.sqrt_one_minus_alphas_bar, t, x_t)
        before, variance = self.alphas_bar_prev[t], eta**2 * self.posterior_variance[t]  # float64
        mean = self._like(before.sqrt(), x_t) * x0_hat
        mean = mean + self._like((1 - before - variance).clamp(min=0).sqrt(), x_t) * eps
        return mean, self._like(variance.sqrt(), x_t)

    @torch.no_grad()
    def trajectory(
        self, model, noise, y=None, method="ancestral", eta=0.0, clip=True, generators=None
    ):
        """Yield (i, x after step i, x0_hat) for i = num_steps-1 … 0, from noise (N, C, H, W).

        The x of i = 0 is the image. Raises ValueError for another method or eta.

        method      "ancestral": draw from p(x_{t-1} | x_t); "ddim": eta 0 (no noise) … 1
        generators  one torch.Generator an image, on the device of noise: then an image does not
                    depend on the others of its batch. None: the global one
        """
        if method not in ("ancestral", "ddim"):
            raise ValueError(f"method must be ancestral or ddim, not {method!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 … 1, not {eta}")
        x = noise
        for i in reversed(range(self.num_steps)):
            t = torch.full(x.shape[:1], i, device=x.device)
            mean, log_variance, x0_hat = self.reverse(model, x, t, y, clip)
            if method == "ddim":
                mean, std = self._ddim(x, t, x0_hat, eta)
            else:
                std = torch.exp(0.5 * log_variance)
            x = mean
            if i > 0 and (method == "ancestral" or eta > 0):  # the last step adds no noise
                z = randn(x.shape[1:], generators) if generators else torch.randn_like(x)
                x = torch.addcmul(mean, std, z)
            yield i, x, x0_hat

    def sample(
        self, model, noise, y=None, method="ancestral", eta=0.0, generators=None, progress=False
    ):
        """Images (N, C, H, W) in [-1, 1] from x_T = noise. The arguments are trajectory's."""
        steps = self.trajectory(model, noise, y, method, eta, generators=generators)
        for _, x, _ in tqdm(steps, "sampling", self.num_steps, disable=not progress, leave=False):
            pass
        return x.clamp(-1, 1)
