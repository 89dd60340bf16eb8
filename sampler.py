"""Which timesteps to train on: uniformly, or where the loss is large (Nichol & Dhariwal, sec. 3.3).

This file stands alone, and is the only mathematics here that speaks to other processes.
"""

import torch
import torch.distributed as dist


def gather(values):
    """The tensors of all ranks, of whatever lengths, one after the other -> one tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    # Lengths go from CPU to CPU where they can, so that the host need not wait for the device.
    host = "cpu" if "gloo" in str(dist.get_backend_config()) else values.device
    length = torch.tensor([len(values)], device=host)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    lengths = torch.cat(lengths).tolist()
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: len(values)] = values
    rows = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(rows, padded)
    return torch.cat([row[:n] for row, n in zip(rows, lengths)])


class UniformSampler:
    """Every t in 0 … T-1 equally often; all weights 1. T is the process's num_steps."""

    def __init__(self, T):
        self.T, self.device = T, "cpu"

    def to(self, device):
        """Draw on a device, which a generator must be on too. Returns self."""
        self.device = device
        return self

    def sample(self, n, generator=None):
        """Draw t (n,) int64 and weights (n,)."""
        t = torch.randint(self.T, (n,), generator=generator, device=self.device)
        return t, torch.ones(n, device=self.device)

    def update(self, t, losses):
        """Nothing to learn from the losses."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class ImportanceSampler:
    """p_t ∝ sqrt(E[L_t²]) over the last `history` losses of each t (eq. 18).

    Uniform until every t has `history` losses. A share `uniform` of the draws stays uniform (as in
    the released code), so that no t is forgotten. The weights 1 / (T·p_t) keep means unbiased.
    """

    def __init__(self, T, history=10, uniform=0.001):
        self.T, self.history, self.uniform = T, history, uniform
        # Of each t, a ring of its last losses; the row after those takes what is not to be kept.
        self.losses = torch.zeros(T + 1, history)
        self.counts = torch.zeros(T + 1, dtype=torch.int64)  # of all losses ever seen

    def to(self, device):
        """Move the history to a device. Returns self."""
        self.losses, self.counts = self.losses.to(device), self.counts.to(device)
        return self

    def probabilities(self):
        """p (T,), summing to 1."""
        root = self.losses[: self.T].square().mean(1).sqrt()
        p = (1 - self.uniform) * root / root.sum() + self.uniform / self.T
        ready = (self.counts[: self.T] >= self.history).all() & (root.sum() > 0)
        return torch.where(ready, p, 1 / self.T)

    def sample(self, n, generator=None):
        """Draw t (n,) int64 and weights (n,)."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, 1 / (self.T * p[t])

    def update(self, t, losses):
        """Add losses (n,) of the objective, unweighted, at timesteps t (n,). All ranks must call.

        Losses that are not finite are left out.
        """
        t, losses = gather(torch.stack([t.float(), losses.float()], 1)).unbind(1)
        t = t.long()
        t, order = torch.where(losses.isfinite(), t, self.T).sort(stable=True)
        seen = torch.zeros_like(self.counts).scatter_add_(0, t, torch.ones_like(t))
        # Each loss has a place in its group of equal t: t = [1 3 3 3] -> [0 0 1 2]. Only the last
        # `history` of a group may stay; the others, as those not finite, go to row T.
        place = torch.arange(len(t), device=t.device) - (seen.cumsum(0) - seen)[t]
        row = torch.where(place >= seen[t] - self.history, t, self.T)
        self.losses[row, (self.counts[t] + place) % self.history] = losses[order]
        self.losses[self.T] = 0
        self.counts += seen

    def state_dict(self):
        return {"losses": self.losses[: self.T], "counts": self.counts[: self.T]}

    def load_state_dict(self, state):
        """Raises ValueError if the state belongs to another T or history."""
        if state["losses"].shape != (self.T, self.history):
            raise ValueError("the history of losses is another T's, or of another length")
        self.losses[: self.T] = state["losses"]
        self.counts[: self.T] = state["counts"]


T_SAMPLERS = {"uniform": UniformSampler, "importance": ImportanceSampler}
