"""SGD whose weight decay is decided by module type, never by parameter name, and SAM's climb before a step."""

import contextlib

import torch
from torch import nn

DECAYED = (nn.modules.conv._ConvNd, nn.Linear)


def parameter_groups(model, *, weight_decay, decay):
    """Two groups, decayed first. `decay` is `weights` (convolution and linear weights) or `all`.

    By module type: matching 'bn' in a name, as ffcv-imagenet does, misses the eight BatchNorm parameters
    of ResNet's downsample branches and every bias.
    """
    decayed, plain = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, DECAYED) and name == "weight"
            (decayed if is_weight or decay == "all" else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model, *, momentum, nesterov, weight_decay, decay):
    """torch's SGD over `parameter_groups`; the learning rate is set before every step by `set_learning_rate`.

    Fused, because that one can leave a step out without the host knowing (FiniteSteps).
    """
    groups = parameter_groups(model, weight_decay=weight_decay, decay=decay)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        # torch's fused SGD goes on with uninitialised memory where its very first step is left out; from zero, the
        # first step is the same as without this
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer, learning_rate):
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@contextlib.contextmanager
def climbed(parameters, gradients, rho):
    """Inside, `parameters` are rho farther along `gradients`; after it they are what they were, bit for bit.

    rho: the Euclidean length of the move over all parameters together. That is the ascent of SAM, sharpness-aware
    minimization (Foret et al. 2021, arXiv 2010.01412). A factor on the gradients, such as a loss scale, changes
    nothing; a gradient that is not finite makes weights that are not, and so whatever is computed with them.
    """
    with torch.no_grad():
        before = [parameter.clone() for parameter in parameters]
        # the small number as in Composer: gradients that are all zero move nothing
        scale = rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
        torch._foreach_add_(parameters, torch._foreach_mul(gradients, scale))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)


class FiniteSteps:
    """Optimizer steps that are left out where the loss or a gradient is not finite.

    Leaving out means: weights, momentum and BatchNorm's running statistics, which one forward pass with an infinity
    would spoil for good, stay as they were. All ranks decide alike, because their gradients have been added up and
    `loss` must be. It happens on the device: nothing here makes a GPU wait. `skipped` and `in_a_row` are counters on
    the device, int64; whoever reads them waits.
    """

    LIMIT = 10  # in a row: a GradScaler halves its scale as often before it is plain that something else is wrong

    def __init__(self, network, optimizer, scaler):
        self.optimizer, self.scaler = optimizer, scaler
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._buffers = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
        self._sizes = [buffer.numel() for buffer in self._buffers]
        device = next(network.parameters()).device
        self.skipped, self.in_a_row = torch.zeros(2, dtype=torch.int64, device=device).unbind()

    def remember(self):
        """Take the buffers as they are for those of the last good step: call it before the first step."""
        self._kept = self._flat_buffers()

    @torch.no_grad()
    def step(self, loss):
        """Step on the gradients there are; returns `loss` (a scalar tensor), or zero if the step was left out."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # the largest magnitude: unlike the Euclidean norm it is finite exactly where all are
        largest = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters], float("inf"))
        finite = torch.isfinite(largest) & torch.isfinite(loss)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # as GradScaler tells a fused optimizer
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).float()
            self.optimizer.step()
        self._kept = torch.where(finite, self._flat_buffers(), self._kept)
        torch._foreach_copy_(self._buffers, self._kept.split(self._sizes))
        self.skipped += ~finite
        self.in_a_row.add_(1).mul_(~finite)
        return torch.where(finite, loss, torch.zeros_like(loss))

    def state_dict(self):
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.skipped.copy_(state["skipped"])
        self.in_a_row.copy_(state["in_a_row"])

    def _flat_buffers(self):
        return torch.cat(self._buffers)
