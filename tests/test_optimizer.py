"""What decays and what does not, and the update rule itself."""

import pytest
import torch
from torch import nn

from rn50.model import build_model
from rn50.optimizer import FiniteSteps, build_optimizer, parameter_groups, set_learning_rate


def test_only_convolution_and_linear_weights_decay():
    network = build_model(arch="resnet50", num_classes=1000, blurpool=True)
    decayed, plain = parameter_groups(network, weight_decay=1e-4, decay="weights")
    names = {id(p): name for name, p in network.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    plain_names = {names[id(p)] for p in plain["params"]}
    assert decayed["weight_decay"] == 1e-4
    assert plain["weight_decay"] == 0
    # 53 convolutions and the classifier; 53 BatchNorms with two parameters each and one bias
    assert len(decayed_names) == 54
    assert len(plain_names) == 107
    # the ones that matching 'bn' in the name misses
    assert {"layer1.0.downsample.1.weight", "layer1.0.downsample.1.bias", "fc.bias"} <= plain_names
    assert decayed_names | plain_names == set(names.values())


def test_everything_decays_when_asked():
    (group,) = parameter_groups(build_model(arch="resnet18", num_classes=10), weight_decay=1e-4, decay="all")
    assert len(group["params"]) == len(list(build_model(arch="resnet18", num_classes=10).parameters()))


def test_two_steps_equal_sgd_with_momentum_and_coupled_decay():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer(layer, momentum=0.9, nesterov=False, weight_decay=0.01, decay="weights")
    velocity_w, velocity_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for rate in (0.1, 0.05):
        set_learning_rate(optimizer, rate)
        gradient_w, gradient_b = torch.randn_like(weight), torch.randn_like(bias)
        layer.weight.grad, layer.bias.grad = gradient_w.clone(), gradient_b.clone()
        optimizer.step()
        velocity_w = 0.9 * velocity_w + gradient_w + 0.01 * weight
        velocity_b = 0.9 * velocity_b + gradient_b
        weight, bias = weight - rate * velocity_w, bias - rate * velocity_b
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), bias)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(enabled, bad):
    torch.manual_seed(0)
    # no bias before BatchNorm: its gradient is zero but for rounding, and on some processors altogether
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(network, momentum=0.9, nesterov=False, weight_decay=0.01, decay="weights")
    set_learning_rate(optimizer, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=16.0)
    finite = FiniteSteps(network, optimizer, scaler)
    finite.remember()

    def step(spoil):
        loss = network(torch.randn(5, 3)).square().mean()
        scaler.scale(loss).backward()
        if spoil:
            network[1].running_var.fill_(float("inf"))
            network[0].weight.grad[0, 0] = float("nan")
        result = finite.step(torch.tensor(float("inf")) if spoil and bad == "loss" else loss.detach())
        optimizer.zero_grad()
        return result.item()

    def everything():
        tensors = [*network.parameters(), network[1].running_mean, network[1].running_var]
        return [x.detach().clone() for x in tensors] + [s["momentum_buffer"].clone() for s in optimizer.state.values()]

    assert step(False) > 0
    before = everything()
    assert [step(True), step(True)] == [0, 0]
    assert all(torch.equal(one, other) for one, other in zip(everything(), before, strict=True))
    assert (finite.skipped.item(), finite.in_a_row.item()) == (2, 2)
    assert step(False) > 0
    assert (finite.skipped.item(), finite.in_a_row.item()) == (2, 0)
    assert not any(torch.equal(one, other) for one, other in zip(everything(), before, strict=True))
    again = FiniteSteps(network, optimizer, scaler)
    again.load_state_dict(finite.state_dict())
    assert (again.skipped.item(), again.in_a_row.item()) == (2, 0)
