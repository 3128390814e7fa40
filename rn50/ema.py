"""Exponential moving average of the weights."""

import copy

import torch


class EMA:
    """A second model whose parameters trail the trained one's; BatchNorm buffers are copied, not averaged.

    `half_life` is in optimizer steps: what a weight was `half_life` steps ago counts half of what it is now.
    Early on the average is over the steps there have been (a bias correction as in Adam's), so that it does
    not drag the random initialisation along.
    """

    def __init__(self, model, *, half_life):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = 0.5 ** (1 / half_life)
        self.steps = 0

    @torch.no_grad()
    def update(self, model):
        """Move towards `model`'s parameters by one step and take over its buffers."""
        self.steps += 1
        weight = (1 - self.decay) / (1 - self.decay**self.steps)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self):
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]
