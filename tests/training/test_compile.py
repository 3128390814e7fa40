"""Real torch.compile, on the processor, with a small network: what it says, what it keeps, and where it refuses."""

import re

import pytest
import torch

from rn50 import learner
from rn50.files import read_rows
from tests import chaos
from tests.commands import Command

# two sizes: epochs of 32 px, then of 48 px
FLAGS = {"training__compile": "true", "training__epochs": 4, "resolution__end": 48, "resolution__multiple": 16}
FLAGS |= {"resolution__start_ramp": 1, "resolution__end_ramp": 2}
FLAGS |= {"training__sam_rho": 0.05, "training__sam_interval": 3, "training__mixup": 0.2}
GRAPH = re.compile(
    r"torch\.compile: 1 graph for (\d+) px channels_last float32, (\d) from \S+/compiled; the first step"
)


@pytest.fixture(scope="module")
def undisturbed(betons, tmp_path_factory):
    """A compiled run that nothing disturbed, and what it said."""
    with Command(betons, tmp_path_factory.mktemp("compiled"), **FLAGS) as command:
        assert command.end(within=240) == 0, command.output()
        return command.folder, command.output()


def from_its_cache(undisturbed):
    return {"TORCHINDUCTOR_CACHE_DIR": str(undisturbed[0] / "compiled")}


def test_the_log_says_what_was_compiled(undisturbed):
    folder, said = undisturbed
    assert GRAPH.findall(said) == [("32", "0"), ("48", "0")]
    assert [row["first_batch"]["resolution"] for row in read_rows(folder / "log.jsonl")] == [32, 32, 48, 48]


def test_it_computes_what_it_computes_without(undisturbed, betons, tmp_path):
    with Command(betons, tmp_path, **FLAGS | {"training__compile": "false"}) as command:
        assert command.end() == 0
    for ours, eager in zip(
        *(read_rows(folder / "log.jsonl") for folder in (undisturbed[0], command.folder)), strict=True
    ):
        assert ours["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)
        assert ours["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-3)


def test_a_killed_run_goes_on_without_compiling_and_ends_with_the_same_bits(undisturbed, betons, tmp_path):
    """Its cache is in its folder, where the first start left it."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "compiled").symlink_to(undisturbed[0] / "compiled")
    with Command(betons, tmp_path, logging__checkpoint_steps=7, **FLAGS) as command:
        command.until(command.has_checkpoint)
        command.processes[0].kill()
    with Command(betons, tmp_path, logging__checkpoint_steps=7, **FLAGS) as command:
        assert command.end() == 0, command.output()
    assert "resuming" in command.output()
    assert {cached for _, cached in GRAPH.findall(command.output())} == {"1"}
    assert chaos.compare(chaos.outcome(folder, epochs=4), chaos.outcome(undisturbed[0], epochs=4)) == "identical"


def test_two_ranks_train_compiled(undisturbed, betons, tmp_path):
    flags = FLAGS | {"training__epochs": 2, "resolution__end": 32}
    with Command(betons, tmp_path, ranks=2, environment=from_its_cache(undisturbed), **flags) as command:
        assert command.end(within=120) == 0, command.output() + command.output(rank=1)
    with Command(betons, tmp_path / "eager", ranks=2, **flags | {"training__compile": "false"}) as eager:
        assert eager.end() == 0
    ours, theirs = (read_rows(one.folder / "log.jsonl") for one in (command, eager))
    assert [row["train_loss"] for row in ours] == pytest.approx([row["train_loss"] for row in theirs], rel=1e-4)


def spoil_the_third_step():
    """An infinite loss, as tests/training/test_stops.py has it for a network that is not compiled."""
    criterion, count = learner.cross_entropy, []

    def spoiled(*args, **options):
        count.append(None)
        return criterion(*args, **options) * (float("inf") if len(count) == 6 else 1)

    learner.cross_entropy = spoiled


def test_a_step_that_is_not_finite_is_left_out(undisturbed, betons, tmp_path):
    flags = FLAGS | {"training__epochs": 2, "resolution__end": 32}
    environment = from_its_cache(undisturbed)
    with Command(betons, tmp_path, prepare=spoil_the_third_step, environment=environment, **flags) as command:
        assert command.end() == 0, command.output()
    assert [row["skipped_steps"] for row in read_rows(command.folder / "log.jsonl")] == [1, 0]


def for_one_size_only():
    learner.RESOLUTIONS = 1


def without_a_compiler():
    torch._inductor.config.cpp.cxx = ("/no/compiler",)


def switched_off():
    torch._dynamo.config.disable = True  # as TORCH_COMPILE_DISABLE=1 does


def left_to_eager():
    torch.compiler.set_stance("force_eager")


@pytest.mark.parametrize(
    ("prepare", "cached", "status", "message"),
    [
        (
            for_one_size_only,
            True,
            1,
            r"torch\.compile fails at 48 px with training\.micro_batch=10: .+; training\.compile=",
        ),
        (without_a_compiler, False, 1, r"torch\.compile fails at 32 px .+; training\.compile=false trains without it"),
        (switched_off, True, 2, r"training\.compile=true, but TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set"),
        (left_to_eager, True, 1, r"training\.compile=true, but torch\.compile has made no graph"),
    ],
)
def test_it_never_goes_on_without_being_compiled(undisturbed, betons, tmp_path, prepare, cached, status, message):
    environment = from_its_cache(undisturbed) if cached else {}
    with Command(betons, tmp_path, prepare=prepare, environment=environment, **FLAGS) as command:
        assert command.end(within=120) == status, command.output()
    (error,) = [line for line in command.output().splitlines() if line.startswith(("error:", "Traceback"))]
    assert re.search(message, error), error
