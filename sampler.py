"""Which timesteps to train on: uniformly, or where the loss is large (Nichol & Dhariwal, sec. 3.3).

This file stands alone, and is the only mathematics here that speaks to other ranks.
"""

import torch
import torch.distributed as dist


class UniformSampler:
    """Every t in 0 … T-1 equally often; all weights are 1. T is the process's num_steps."""

    def __init__(self, T):
        self.T, self.device = T, "cpu"

    def to(self, device):
        """Draw on a device, on which a generator must be too. Returns self."""
        self.device = device
        return self

    def sample(self, n, generator=None):
        """Draw t (n,) int64 and weights (n,)."""
        t = torch.randint(self.T, (n,), generator=generator, device=self.device)
        return t, torch.ones(n, device=self.device)

    def update(self, t, losses):
        """Learns nothing from the losses."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class ImportanceSampler:
    """p_t ∝ sqrt(E[L_t²]) over the last `history` losses of each t (eq. 18).

    Uniform until every t has `history` losses. A share `uniform` of the draws stays uniform (as in
    the released code), so that no t is forgotten. The weights 1 / (T·p_t) keep means unbiased.

    The history is kept on the device and written without a loop, since a loop over the losses would
    make the host wait for the device at every step of training.
    """

    def __init__(self, T, history=10, uniform=0.001):
        self.T, self.history, self.uniform = T, history, uniform
        # For each t, its last losses, the oldest to be overwritten next, and how many it has ever
        # seen. The last row, T, takes what is not to be kept.
        self.losses = torch.zeros(T + 1, history)
        self.counts = torch.zeros(T + 1, dtype=torch.int64)

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
        """Add the losses (n,) of the objective, unweighted, at timesteps t (n,).

        All ranks must call, and each adds the losses of all. Losses not finite are left out.
        """
        t, losses = gather(torch.stack([t.float(), losses.float()], 1)).unbind(1)
        t = torch.where(losses.isfinite(), t.long(), self.T)
        same = t[:, None] == t  # which losses belong to the same t
        before, after = same.tril(-1).sum(1), same.triu(1).sum(1)
        row = torch.where(after < self.history, t, self.T)  # of many, only the last can stay
        self.losses[row, (self.counts[t] + before) % self.history] = losses
        self.losses[self.T] = 0
        self.counts.index_add_(0, t, torch.ones_like(t))

    def state_dict(self):
        return {"losses": self.losses[: self.T], "counts": self.counts[: self.T]}

    def load_state_dict(self, state):
        """Raises ValueError if the state belongs to another T or history."""
        if state["losses"].shape != (self.T, self.history):
            raise ValueError("the history of losses is another T's, or of another length")
        self.losses[: self.T] = state["losses"]
        self.counts[: self.T] = state["counts"]


T_SAMPLERS = {"uniform": UniformSampler, "importance": ImportanceSampler}


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
