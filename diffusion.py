"""The mathematics of Improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672), for any network.
This file stands alone: copy it beside a network of your own. Equation numbers are the paper's.
A `model` here is any callable (x_t, time, y) -> (N, C or 2C, H, W) that predicts the noise ε in
x_t (N, C, H, W) and, for a learned variance, v in C more channels. It is -1 for β̃ and 1 for β:
the paper's v is (v + 1) / 2.

Images are in [-1, 1]. The code's t = 0 … T-1 is the paper's t = 1 … T: x_t at t = 0 is its x_1.
Docstrings write x_t and x_{t-1} as the paper does. The terms of the bound have the same subscripts
in both: L_0 is the decoder (eq. 5), L_1 … L_{T-1} are KLs (eq. 6), and L_T the prior (eq. 7), all
in bits per dimension. L_t is the term whose t the code calls t."""

import math
from functools import partial

import torch
from tqdm import tqdm

LAMBDA = 0.001  # the weight of L_vlb in L_hybrid (eq. 16)
VARIANCES = ["learned", "small", "large"]

# ---- Noise schedules ---------------------------------------------------------------------------

def linear_betas(T):
    """Ho et al.'s betas, 1e-4 … 0.02 for T = 1000, scaled to any T -> float64 (T,)."""
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64).clamp(max=0.999)

def cosine_betas(T, s=0.008):
    """Betas, at most 0.999, of alphas_bar ∝ cos²((t/T + s) / (1 + s) · π/2) (eq. 17)."""
    time = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_bar = torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)

SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}

def select_timesteps(steps, last, spacing=1.0):
    """Timesteps t_i = (i / (steps-1))^spacing · last, no two equal: a rising list, 0 to last.
    Spacing 1 is even; 2 and 3 are ever denser near t = 0, where the bound's terms are largest."""
    if steps == 1:
        return [last]
    return [max(i, round((i / (steps - 1)) ** spacing * last)) for i in range(steps)]

# ---- The process -------------------------------------------------------------------------------

class Diffusion:
    """The forward process q, the reverse process p, the losses and the likelihood.

    schedule    one of SCHEDULES for T timesteps, or the betas themselves, between 0 and 1
    variance    Σ of p: "learned" (eq. 15), "small" (β̃) or "large" (β)
    steps       the timesteps to run: a number of them, evenly spaced, or a rising list. None: all
    time_scale  the network is given t·time_scale. None: 1000/T, so that it is below 1000

    Everywhere t (N,) int64 counts the steps of this process, 0 … num_steps-1. Only the network is
    given the original timestep. The tables are float64, made once, on the CPU until `.to(device)`.
    16-bit images are converted to float32. Raises ValueError for arguments out of range."""

    def __init__(self, schedule="cosine", T=4000, variance="learned", steps=None, time_scale=None):
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {VARIANCES}, not {variance!r}")
        if isinstance(schedule, str):
            if schedule not in SCHEDULES or T < 1:
                raise ValueError(f"no schedule {schedule!r} in {list(SCHEDULES)} with T = {T}")
            schedule = SCHEDULES[schedule](T)
        betas = torch.as_tensor(schedule, dtype=torch.float64).detach().cpu()
        between = betas.ndim == 1 and len(betas) and ((betas > 1e-15) & (betas < 1)).all()
        if not between or (1 - betas).prod() < 1e-76:  # its root would underflow in float32
            raise ValueError("schedule: betas must be one row between 0 and 1, with alphas_bar > 0")
        T = len(betas)
        given = torch.as_tensor(T if steps is None else steps).cpu()
        timesteps = given.long()
        if timesteps.ndim == 0 and 1 <= timesteps <= T:
            timesteps = torch.tensor(select_timesteps(int(timesteps), T - 1), device="cpu")
        rising = timesteps.ndim == 1 and len(timesteps) and (timesteps.diff() > 0).all()
        if not rising or given.is_floating_point() or timesteps[0] < 0 or timesteps[-1] >= T:
            raise ValueError(f"steps must be 1 … {T}, or a rising list below {T}, not {steps}")
        self.T, self.variance, self.num_steps = T, variance, len(timesteps)
        self.times = (timesteps * (1000 / T if time_scale is None else time_scale)).float()
        # The tables, each (num_steps,), by the paper's formulas.
        self.alphas_bar = alphas_bar = torch.cumprod(1 - betas, 0)[timesteps]
        self.alphas_bar_prev = before = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        alphas = alphas_bar / before
        self.betas = betas = 1 - alphas  # eq. 19; if no step is skipped, the schedule's own
        self.posterior_variance = small = betas * (1 - before) / (1 - alphas_bar)  # β̃, eq. 10
        self.sqrt_alphas_bar = alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - alphas_bar).sqrt()
        self.posterior_x0 = betas * before.sqrt() / (1 - alphas_bar)  # of x0 in eq. 11
        self.posterior_x_t = (1 - before) * alphas.sqrt() / (1 - alphas_bar)  # of x_t in eq. 11
        # β̃ is 0 at t = 0, where x_0 is known; but the decoder (eq. 5) needs a width. As in the
        # released code, β̃ of t = 1 (the paper's 2) takes its place, also in large and for v = -1.
        first = small[1:2] if len(betas) > 1 else betas
        self.log_betas = betas.log()
        self.log_small = torch.cat([first, small[1:]]).log()
        self.log_large = torch.cat([first, betas[1:]]).log()

    def to(self, device):
        """Move the tables, as float32 to devices that know no float64. Returns self."""
        mps = torch.device(device).type == "mps"
        for name, table in vars(self).items():
            if torch.is_tensor(table):
                setattr(self, name, (table.float() if mps else table).to(device))
        return self

    def _at(self, table, t, x):
        """The table's value for each image, in at least float32, shaped to multiply x."""
        if not x.is_floating_point():
            raise ValueError(f"x0 and x_t must be floating-point numbers, not {x.dtype}")
        right = t.dtype == torch.int64 and t.shape == x.shape[:1]
        if not right or (t.is_cpu and not ((t >= 0) & (t < self.num_steps)).all()):
            raise ValueError(f"t must be 0 … {self.num_steps - 1}, int64 (N,), not {t.tolist()}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        return table.gather(0, t).to(dtype).view(-1, *[1] * (x.ndim - 1))

    # -- q: from data to noise
    def add_noise(self, x0, t, noise):
        """A sample of q(x_t | x0): x0, noise (N, C, H, W), t (N,) -> x_t (eq. 8, 9)."""
        if noise.shape != x0.shape:  # each image needs noise of its own
            raise ValueError(f"noise is {tuple(noise.shape)}, but x0 {tuple(x0.shape)}")
        signal = self._at(self.sqrt_alphas_bar, t, x0) * x0
        return (signal + self._at(self.sqrt_one_minus_alphas_bar, t, x0) * noise).to(x0.dtype)

    def posterior(self, x0, x_t, t):
        """q(x_{t-1} | x_t, x0) -> mean, log_variance, each (N, C, H, W) (eq. 10, 11, 12)."""
        mean = self._at(self.posterior_x0, t, x_t) * x0 + self._at(self.posterior_x_t, t, x_t) * x_t
        return mean, self._at(self.log_small, t, x_t).expand_as(x_t)

    def prior(self, x0):
        """L_T = KL(q(x_T | x0) || N(0, 1)) -> (N,) bits per dimension (eq. 7). Needs no network."""
        if x0.is_cpu and (x0.abs() > 1.001).any():  # the decoder knows no other pixels
            raise ValueError("bits per dimension are of x0 in [-1, 1]")
        last = torch.full(x0.shape[:1], self.num_steps - 1, device=x0.device)
        mean = self._at(self.sqrt_alphas_bar, last, x0) * x0
        variance = self._at(1 - self.alphas_bar, last, x0)
        return bits(0.5 * (mean**2 + variance - 1 - variance.log()))

    # -- p: from noise to data
    def predict(self, model, x_t, t, y=None):
        """Call the model (only this method does) -> ε and v (or None), each (N, C, H, W)."""
        time = self._at(self.times, t, x_t).flatten().float()
        out = model(x_t, time, y).to(torch.promote_types(x_t.dtype, torch.float32))
        N, C, *size = x_t.shape
        shapes = [(N, 2 * C, *size)]  # ε and v
        if self.variance != "learned":
            shapes.append((N, C, *size))  # ε alone
        if out.shape not in shapes:
            raise ValueError(f"the model returned {tuple(out.shape)}, not {shapes}")
        return out[:, :C], (out[:, C:] if out.shape == shapes[0] else None)

    def reverse(self, eps, v, x_t, t, clip=True):
        """p(x_{t-1} | x_t) -> mean, log_variance, x0_hat, each (N, C, H, W) (eq. 3). x0_hat is the
        x0 that follows from ε, clipped to [-1, 1] if clip; the mean follows from it."""
        x0_hat = x_t - self._at(self.sqrt_one_minus_alphas_bar, t, x_t) * eps
        x0_hat = x0_hat / self._at(self.sqrt_alphas_bar, t, x_t)  # eq. 9, solved for x0
        if clip:
            x0_hat = x0_hat.clamp(-1, 1) + 0 * x0_hat  # an infinite ε gives NaN, not ±1
        mean, log_variance = self.posterior(x0_hat, x_t, t)  # eq. 11; if not clipped, eq. 13
        if self.variance == "large":
            log_variance = self._at(self.log_large, t, x_t).expand_as(x_t)
        elif self.variance == "learned":  # eq. 15
            frac = (v + 1) / 2  # what the paper calls v
            log_variance = frac * self._at(self.log_betas, t, x_t) + (1 - frac) * log_variance
        return mean, log_variance, x0_hat

    # -- Losses, likelihood and samples
    def vlb_term(self, x0, x_t, t, mean, log_variance):
        """L_t (N,) in bits per dimension, for the mean and log_variance that p has at x_t."""
        true_mean, true_log_variance = self.posterior(x0, x_t, t)
        kl = bits(normal_kl(true_mean, true_log_variance, mean, log_variance))  # eq. 6
        nll = -bits(decoder_log_likelihood(x0, mean, log_variance))  # eq. 5
        return torch.where(t == 0, nll, kl)

    def losses(self, model, x0, t, y=None, noise=None, objective="hybrid"):
        """The training loss (N,) at timesteps t (N,), and T·L_t (N,), whose mean is L_vlb - L_T.

        "simple"  L_simple: (ε - ε̂)², a mean over C·H·W (a sum in eq. 14); v learns nothing
        "vlb"     T·L_t, an estimate of L_vlb (eq. 4) but for L_T, which has no gradient
        "hybrid"  L_simple + λ·T·L_t (eq. 16). λ = 0.001 assumes such a mean, and L_t in bits.
                  p's mean in L_t is detached: ε learns from L_simple alone, v from L_vlb alone
        x0_hat is never clipped here: a clipped estimate has no gradient."""
        learned = ("hybrid",) if self.variance == "learned" else ()  # its second term trains v
        if objective not in ("simple", "vlb", *learned):
            raise ValueError(f"objective {objective!r} with variance {self.variance!r}: try simple")
        noise = randn_like(x0) if noise is None else noise
        x_t = self.add_noise(x0, t, noise)
        eps, v = self.predict(model, x_t, t, y)
        simple = (noise - eps).square().flatten(1).mean(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and objective != "simple"):
            mean_eps = eps if objective == "vlb" else eps.detach()
            mean, log_variance, _ = self.reverse(mean_eps, v, x_t, t, clip=False)
            # L_vlb is a sum of num_steps terms; num_steps times a random one estimates it.
            vlb = self.num_steps * self.vlb_term(x0, x_t, t, mean, log_variance)
        loss = {"simple": simple, "vlb": vlb, "hybrid": simple + LAMBDA * vlb}[objective]
        return loss, vlb.detach()

    def draw_term(self, model, x0, t, y=None):
        """L_t (N,) in bits per dimension at one draw of x_t, x0_hat clipped as when sampling."""
        x_t = self.add_noise(x0, t, randn_like(x0))
        mean, log_variance, _ = self.reverse(*self.predict(model, x_t, t, y), x_t, t)
        return self.vlb_term(x0, x_t, t, mean, log_variance)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, y=None, progress=False):
        """The terms of the bound of x0 (N, C, H, W) -> (N, num_steps), and its prior (N,), all of
        which sum to the bound (eq. 4). Costs num_steps calls of the model."""
        terms = []
        for i in tqdm(range(self.num_steps), "bits/dim", disable=not progress, leave=False):
            t = torch.full(x0.shape[:1], i, device=x0.device)
            terms.append(self.draw_term(model, x0, t, y))
        return torch.stack(terms, 1), self.prior(x0)

    def sample(self, model, noise, y=None, sampler="ancestral", progress=False, **options):
        """Images (N, C, H, W) from x_T = noise: the last x of one of SAMPLERS, with its options;
        clip=False for data outside [-1, 1]. The model must be in eval mode."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be in {list(SAMPLERS)}, not {sampler!r}")
        walk = SAMPLERS[sampler](self, model, noise, y, **options)
        for _, x, _ in tqdm(walk, "sampling", self.num_steps, disable=not progress, leave=False):
            pass
        return x

@torch.no_grad()
def ancestral(diffusion, model, x, y=None, clip=True, generators=None):
    """The paper's sampler: draw each x_{t-1} from p(x_{t-1} | x_t), beginning with x = x_T.
    Yields (i, x after step i, x0_hat) for i = num_steps-1 … 0, each at the cost of a call of the
    model. The x of i = 0 are the images. clip: whether x0_hat is clipped to [-1, 1]. generators:
    one for each image, so that no image depends on the others of its batch. None: torch's own."""
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full(x.shape[:1], i, device=x.device)
        eps, v = diffusion.predict(model, x, t, y)
        mean, log_variance, x0_hat = diffusion.reverse(eps, v, x, t, clip)
        noise = randn_like(x, generators) if i > 0 else 0  # the last step adds none
        x = (mean + torch.exp(0.5 * log_variance) * noise).to(x.dtype)
        yield i, x, x0_hat

SAMPLERS = {"ancestral": ancestral}

# ---- Gaussians ---------------------------------------------------------------------------------

def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N1 || N2) of each element, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.expm1() - ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))

def decoder_log_likelihood(x0, mean, log_variance):
    """log p(x0 | x_1) of each element, in nats: a Gaussian integrated over each pixel's bin.
    The 256 bins of [-1, 1] are 2/255 wide; those at ±1 are open to infinity."""
    x0, inv_std = x0.to(mean.dtype), torch.exp(-0.5 * log_variance)
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

# ==== Beyond the paper ==========================================================================

@torch.no_grad()
def ddim(diffusion, model, x, y=None, clip=True, generators=None, eta=0.0, order=1):
    """DDIM (Song et al. 2021, arXiv 2010.02502) and, with order 2, DPM-Solver++ (Lu et al. 2022,
    arXiv 2211.01095). Yields what `ancestral` does. A learned variance is not used.
    eta    the share of noise: 0 for none, 1 for the posterior's standard deviation sqrt(β̃)
    order  1, or 2: x0_hat is extrapolated half a step ahead, from this call and the one before,
           and not clipped again. Eta 0 gives DPM-Solver++(2M), eta 1 its SDE variant"""
    if not 0 <= eta <= 1 or order not in (1, 2):
        raise ValueError(f"eta must be 0 … 1 and order 1 or 2, not {eta=}, {order=}")
    alphas_bar, before = diffusion.alphas_bar, diffusion.alphas_bar_prev
    variance = eta**2 * diffusion.posterior_variance
    log_snr = (alphas_bar / (1 - alphas_bar)).log()  # Lu et al.'s 2λ
    previous = None  # the x0_hat of the step before
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # small steps add up
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full(x.shape[:1], i, device=x.device)
        eps, v = diffusion.predict(model, x.to(dtype), t, y)
        x0_hat = diffusion.reverse(eps, v, x, t, clip)[2]
        ahead = x0_hat
        if order == 2 and 0 < i < diffusion.num_steps - 1:
            ratio = (log_snr[i - 1] - log_snr[i]) / (log_snr[i] - log_snr[i + 1])
            ahead = x0_hat + ratio / 2 * (x0_hat - previous)
        eps = (x - alphas_bar[i].sqrt() * ahead) / (1 - alphas_bar[i]).sqrt()
        mean = before[i].sqrt() * ahead + (1 - before[i] - variance[i]).clamp(min=0).sqrt() * eps
        if i > 0 and eta > 0:  # the last step adds no noise
            mean = mean + variance[i].sqrt() * randn_like(x.to(dtype), generators)
        x, previous = mean, x0_hat
        yield i, x.to(dtype), x0_hat

SAMPLERS |= {"ddim": ddim, "dpm++": partial(ddim, eta=1.0, order=2)}

def few_steps(T, image_size, steps=25, schedule="cosine", upsampler=False):
    """The timesteps at which "dpm++" draws images of image_size pixels a side best -> a list.
    Sampling begins where alphas_bar is 0.2/(H·W). If it is smaller, x0_hat is mostly error. If it
    is larger, the mean pixel of x_t shows the colour of x0, which noise (0 ± 1/sqrt(H·W)) lacks:
    colours would be too similar. An upsampler begins at 0.3, from start_upsampling. Sampling ends
    where 1 - alphas_bar is 0.001: one more step, to t = 0, would be so long in log-SNR that order 2
    would overshoot: grain, saturated pixels. The constants were tried on digits and photographs."""
    alphas_bar = Diffusion(schedule, T).alphas_bar
    start = 0.3 if upsampler else 0.2 / image_size**2
    noisiest = max(0, int((alphas_bar >= start).sum()) - 1)
    cleanest = min(noisiest, int((alphas_bar > 0.999).sum()))
    between = noisiest - cleanest
    return [cleanest + t for t in select_timesteps(min(steps, between + 1), between, spacing=1.2)]

def start_upsampling(diffusion, low_res, noise):
    """x_T (N, C, H, W) for few_steps of an upsampler: the small images (N, C, h, w), enlarged, with
    noise (N, C, H, W) added, as in SDEdit (Meng et al. 2021, arXiv 2108.01073)."""
    last = torch.full(noise.shape[:1], diffusion.num_steps - 1, device=noise.device)
    large = torch.nn.functional.interpolate(low_res, noise.shape[2:], mode="bilinear")
    return diffusion.add_noise(large, last, noise)

def guided(model, scale):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): a model to sample from.
    ε is ε_uncond + scale·(ε_cond - ε_uncond), v the conditional one, both from one call of the
    model with twice the batch. It must have been trained with y = -1, no class, now and then."""

    def guided_model(x_t, time, y, **inputs):
        labels = torch.cat([y.long(), torch.full_like(y, -1, dtype=torch.int64)])
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        out = model(torch.cat([x_t, x_t]), torch.cat([time, time]), labels, **twice)
        cond, uncond = out.to(torch.promote_types(x_t.dtype, torch.float32)).chunk(2)
        C = x_t.shape[1]
        eps = torch.lerp(uncond[:, :C], cond[:, :C], float(scale))
        return torch.cat([eps, cond[:, C:]], dim=1)

    return guided_model

@torch.no_grad()
def estimate_bits_per_dim(diffusion, model, x0, y=None, calls=8):
    """An unbiased estimate of the bound of x0 (N, C, H, W) from 1 + calls calls of the model
    -> total (N,), terms (N, num_steps) with NaN where t was not drawn, prior (N,). L_0 is always
    computed. The mass of p ∝ (t+1)^-1.2, mixed with 5 % of a uniform p, is cut into `calls` equal
    parts; each image draws one t ≥ 1 from each part, and its term has weight 1/(calls·p)."""
    N, T, device = len(x0), diffusion.num_steps, x0.device
    if calls < 1 or T < 2:
        raise ValueError(f"calls must be at least 1, and T 2, not {calls} and {T}")
    p = torch.arange(2, T + 1, device=device) ** -1.2
    p = 0.95 * p / p.sum() + 0.05 / (T - 1)
    u = torch.arange(calls, device=device)[:, None] + torch.rand(calls, N, device=device)
    ends = p.cumsum(0)[:-1]  # without the last, which is 1: a sum of floats may end below it
    drawn = 1 + torch.searchsorted(ends, u / calls, right=True)
    weights = torch.cat([p.new_ones(1), 1 / (calls * p)])
    total = prior = diffusion.prior(x0)
    terms = prior.new_full((N, T), math.nan)
    for t in torch.cat([drawn.new_zeros(1, N), drawn]):
        L_t = diffusion.draw_term(model, x0, t, y)
        terms.scatter_(1, t[:, None], L_t[:, None])
        total = total + weights[t] * L_t
    return total, terms, prior

# ---- Randomness --------------------------------------------------------------------------------

def generator(seed, index, device="cpu", stream="noise"):
    """A torch.Generator for one use: a function of the seed, the stream and the index, which counts
    training steps or sampled images ("noise"), steps and ranks ("dropout"), or epochs ("order")."""
    start = {"noise": 0, "dropout": 2**30, "order": 2**31}[stream]  # streams do not meet
    number = (seed * 0x9E3779B1 + start + index) % 2**32  # the CPU reads only 32 bits
    return torch.Generator(device).manual_seed(number)

def randn_like(x, generators=None):
    """Normal noise like x (N, ...), of torch's own generator or of one for each image."""
    if not x.is_floating_point():
        raise ValueError(f"images must be floating-point numbers, not {x.dtype}")
    if generators is None:
        return torch.randn_like(x)
    if len(generators) != len(x):
        raise ValueError(f"generators: there are {len(generators)} for {len(x)} images")
    given = dict(device=x.device, dtype=x.dtype)
    return torch.stack([torch.randn(x.shape[1:], generator=g, **given) for g in generators])
