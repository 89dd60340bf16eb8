"""Which timesteps to train on: uniformly, or where the loss is large (Nichol & Dhariwal, sec. 3.3).
This file stands alone. The samplers are modules: .to(device) moves them, .state_dict() holds what
they have learned. With a gloo backend for CPUs, no method makes the host wait for the device."""

import torch
import torch.distributed as dist

class UniformSampler(torch.nn.Module):
    """Every t in 0 … T-1 equally likely, with weight 1. T is the process's num_steps."""

    def __init__(self, T):
        super().__init__()
        self.T = T
        self.register_buffer("p", torch.full((T,), 1 / T), persistent=False)

    def probabilities(self):
        """p (T,), summing to 1."""
        return self.p

    def sample(self, n, generator=None):
        """Draw t (n,) int64 and weights (n,), 1 / (T·p_t), with a generator on p's device.
        Stratified: one t from each n-th part of p's mass, in random order. Each t alone has the
        distribution p, and weighted means over the batch scatter less."""
        p = self.probabilities()
        part = torch.randperm(n, generator=generator, device=p.device)
        u = (part + torch.rand(n, generator=generator, device=p.device)) / n
        t = torch.searchsorted(p.cumsum(0)[:-1], u, right=True)
        return t, 1 / self.T / p[t]

    def update(self, t, losses):
        """Learns nothing from the losses."""

class ImportanceSampler(UniformSampler):
    """p_t ∝ sqrt(E[L_t²]) over the last `history` losses of each t (eq. 18).
    Uniform until every t has `history` losses. A share `uniform` of the draws stays uniform, as in
    the released code, so that no t is forgotten. The weights 1 / (T·p_t) keep means unbiased."""

    def __init__(self, T, history=10, uniform=0.001):
        super().__init__(T)
        self.history, self.uniform = history, uniform
        # For each t: its last losses (a ring buffer), and the number of losses that it ever had.
        self.register_buffer("losses", torch.zeros(T, history))
        self.register_buffer("counts", torch.zeros(T, dtype=torch.int64))

    def probabilities(self):
        root = self.losses.square().mean(1).sqrt()
        p = (1 - self.uniform) * root / root.sum() + self.uniform * self.p
        ready = (self.counts >= self.history).all() & (root.sum() > 0)
        return torch.where(ready, p, self.p)

    def update(self, t, losses):
        """Add the losses (n,) of the objective, unweighted, at timesteps t (n,). Every rank must
        call it, and adds the losses of all. Losses that are not finite are left out."""
        t, losses = gather(torch.stack([t.float(), losses.detach().float()], 1)).unbind(1)
        t, finite = t.long(), losses.abs() < 1e18  # not NaN, and the square is finite
        same = (t[:, None] == t) & finite  # which losses belong to the same t
        before, after = same.tril(-1).sum(1), same.triu(1).sum(1)  # earlier and later ones
        kept = finite & (after < self.history)  # of many at one t, the last `history` stay
        rows = torch.cat([self.losses, self.losses[:1]])  # row T takes what is not kept
        rows[torch.where(kept, t, self.T), (self.counts[t] + before) % self.history] = losses
        self.losses.copy_(rows[:-1])
        self.counts.index_add_(0, t, finite.long())

T_SAMPLERS = {"uniform": UniformSampler, "importance": ImportanceSampler}

def gather(rows):
    """The rows of all ranks, one rank's after the other's, however many each has -> one tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    # Lengths go from CPU to CPU where they can, so that the host need not wait for the device.
    host = "cpu" if "gloo" in str(dist.get_backend_config()) else rows.device
    lengths = [torch.zeros(1, dtype=torch.int64, device=host) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=host))
    padded = rows.new_zeros(max(map(int, lengths)), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    return torch.cat([each[: int(n)] for each, n in zip(found, lengths)])
