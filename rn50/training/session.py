"""What keeps a run alive around its loop: ranks, folder, resuming, money, log, checkpoints, and how it ends."""

import contextlib
import math
import os
import shlex
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from rn50 import config, recipe
from rn50.data import loaders
from rn50.data.beton import refuse_others
from rn50.errors import RunError, Stopped, UsageError, under_torchrun
from rn50.evaluate import report_lines
from rn50.files import file_of_run
from rn50.learner import COMPILE_ERRORS, graphs
from rn50.machine import cores, memory_bytes
from rn50.planning import budget
from rn50.planning.forecast import forecast, label_warnings
from rn50.precision import dtype_name
from rn50.training import checkpoint, distributed, interruption
from rn50.training.mirror import Mirror
from rn50.training.progress import Console, Progress, Stopwatch, Waiting, folded
from rn50.training.run_folder import Claim, RunLog, describe_environment, make_folder, recorded
from rn50.words import counted, duration, from_here, moment

# Seconds that a finished run waits for room on a full disk, and one that fails for the checkpoint it is writing.
DISK_PATIENCE, FAILURE_PATIENCE = 600.0, 30.0
ROOT = Path(__file__).resolve().parents[2]
COMPILED = "compiled"  # torch.compile's cache, in the run's folder
WAITS = 0.05  # share of the time from which on waiting for data is worth a word


def check(cfg):
    """UsageError where this machine, or what is known of prices, cannot do what `cfg` asks for."""
    distributed.check_environment()
    distributed.choose_device(cfg.training.device)
    if cfg.budget.max_dollars is not None and budget.price(**prices(cfg)) is None:
        raise UsageError("budget.max_dollars needs budget.dollars_per_hour or budget.instance")
    budget.price(**prices(cfg))


def prices(cfg):
    return {key: getattr(cfg.budget, key) for key in ("dollars_per_hour", "instance", "spot")}


@contextlib.contextmanager
def training_session(cfg):
    """A Session whose end, however it comes, leaves a checkpoint, status.json and the mirror as they should be."""
    folder, progress = run_folder(cfg), Progress()
    claim = Claim(folder, warn=lambda message: _say(f"warning: {message}"))
    if distributed.local_rank() == 0:
        interruption.watch_ec2()
    if distributed.rank() == 0 and folder.is_dir():
        claim.take()  # before the first word in status.json, which may be about another command's run
    record = recorded(folder, progress, rank=distributed.rank(), claim=claim)
    with contextlib.ExitStack() as at_last, record, distributed.contact():
        session = Session(cfg, progress, claim)
        session.share_claim()
        session.console.write = _tolerant(session.console.write)
        if session.rank == 0 and cfg.logging.mirror:
            session.mirror = Mirror(cfg.logging.mirror, folder=folder, warn=session.warn)
            at_last.callback(lambda: claim.held and session.mirror.put_records())
        try:
            try:
                yield session
            except Stopped as stop:
                session.stop(stop)
                raise
        except Stopped:
            raise
        except Exception:  # also of what a stop leaves: its checkpoint may find that weights are not finite
            if session.checkpoints:
                session.checkpoints.finish(FAILURE_PATIENCE)
            raise
        if session.log:
            session.checkpoints.finish(DISK_PATIENCE, required=True)
            session.log.close()
        session.say_finished()
        distributed.shutdown()


def run_folder(cfg):
    return Path(cfg.logging.folder) / cfg.logging.run_name


class Session:
    """One command's part of a run, on one rank.

    `attach` gives it what it looks after, `resume` goes on from the newest checkpoint. Only rank 0 has a log,
    checkpoints, a mirror and a guard of the money; what it decides, the others are told. claim: of the run's folder,
    where something is to be written into it.
    """

    def __init__(self, cfg, progress, claim=None):
        self.cfg, self.progress, self.folder, self._claim = cfg, progress, run_folder(cfg), claim
        patience = 60 * cfg.data.timeout_minutes + 300
        self.device, self.rank, self.world_size = distributed.setup(cfg.training.device, timeout=patience)
        recipe.check_batch(cfg, self.world_size)
        self.console = Console(write=_say, shown=self.rank == 0)
        self.say = self.console.say
        self.log = self.checkpoints = self.mirror = self.pace = self.guard = None
        self._in_a_row = 0
        # in the run's folder, so that going on does not compile again; torch sets the default as it is imported
        if cfg.training.compile and os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder.resolve() / COMPILED)

    def warn(self, message):
        self.say(f"warning: {message}")

    def share_claim(self):
        """Let all ranks know whether the folder is this command's; RunError on all of them where it is another's.

        Only once all have joined: where rank 0 alone ended, the others would wait for it.
        """
        claim = self._claim
        claim.held, claim.refusal = distributed.from_rank_0((claim.held, claim.refusal))
        if claim.refusal:
            raise RunError(claim.refusal)

    def attach(self, learner, train, val):
        """What the run is of: its Learner, TrainingLoader and EvaluationLoader."""
        self.learner, self.train, self.val = learner, train, val
        self.betons = train.fingerprints | val.fingerprints

    # --- Beginning ---------------------------------------------------------------------------------------------------

    def resume(self):
        """Take over the newest checkpoint, if there is one; open the log; end where a stop was asked for already."""
        cfg, progress = self.cfg, self.progress
        saved = None
        if self.rank == 0:
            make_folder(self.folder)
            self._claim.take()  # a new folder; one that was there is claimed already
        self.share_claim()
        if self.rank == 0:
            saved = checkpoint.newest(self.folder, warn=self.warn, mirror=self.mirror)
        saved, betons = distributed.from_rank_0((saved, self.betons))
        refuse_others(betons, self.betons, "which rank 0 reads")
        if saved:
            recipe.refuse_change(saved["config"], cfg, self.folder)
            refuse_others(saved["betons"], self.betons, f"which the run in {self.folder} was started with")
            self.learner.restore(saved)
            if spoiled := self.learner.not_finite():
                raise RunError(
                    f"the checkpoint in {self.folder} holds weights that are not finite ({spoiled}), and so would all "
                    "that comes: move the folder away to start anew"
                )
            progress.restore(saved["progress"], self.device)
            self.say(
                f"resuming {self.folder} at step {progress.step}: "
                f"after epoch {progress.epoch} of {cfg.training.epochs} and {progress.epoch_step} steps"
            )
        self._announce()
        self._guard_money()
        if self.rank == 0:
            self._open_log()
        self.stop_if_asked()
        if self.device.type == "cuda":
            self.try_largest()

    def load_weights(self):
        """Take over the weights of training.checkpoint, or of the run's last, whatever recipe made them."""
        given = self.cfg.training.checkpoint or self.folder / checkpoint.LAST
        saved = checkpoint.load(file_of_run(given, checkpoint.LAST))
        self.learner.restore_weights(saved)
        if spoiled := self.learner.not_finite():
            raise RunError(f"the checkpoint holds weights that are not finite ({spoiled}): it is of no use")
        self.progress.restore(saved["progress"], self.device)

    def _announce(self):
        cfg, info, sizes = self.cfg, self.train.info, recipe.resolutions(self.cfg)
        batch, micro = cfg.training.batch_size, cfg.training.micro_batch
        accumulation = batch // (micro * self.world_size)
        factors = [f"{micro:,}"] + [f"{self.world_size} ranks"] * (self.world_size > 1)
        factors += [f"{accumulation} accumulated"] * (accumulation > 1)
        made_of = f" = {' x '.join(factors)}" if factors[1:] else ""
        px = f"{sizes[0]} to {sizes[-1]} px" if sizes[0] != sizes[-1] else f"{sizes[0]} px"
        self.say(
            f"{cfg.model.arch} on {self.device} in {dtype_name(self.learner.precision)}, "
            f"{counted(info.num_samples, 'training image')} of {counted(info.num_classes, 'class')}\n"
            f"{counted(cfg.training.epochs, 'epoch')} at {px}, batch {batch:,}{made_of}, "
            f"peak lr {recipe.peak_learning_rate(cfg):.3g}\n"
            f"{loaders.choose_order(info, cfg.data.order)} order, run folder {self.folder}"
        )

    def _open_log(self):
        self.checkpoints = checkpoint.Writer(self.folder, step=self.progress.step, warn=self.warn, mirror=self.mirror)
        environment = describe_environment(
            device=self.device,
            world_size=self.world_size,
            betons=[*self.train.rungs.values(), *self.val.rungs.values()],
        )
        self.log = RunLog(
            self.folder,
            config=config.to_dict(self.cfg),
            environment={"precision": dtype_name(self.learner.precision)} | environment,
            rows=self.progress.rows,
            warn=self.warn,
        )

    def _guard_money(self):
        """Start the meter where there is a price; refuse a schedule that is projected to cost more than there is."""
        cfg, price = self.cfg, budget.price(**prices(self.cfg))
        known = {
            "config": config.to_dict(cfg),
            "progress": self.progress,
            "images": self.train.info.num_samples,
            "validation_images": self.val.info.num_samples,
        }
        if self.rank == 0:
            self.pace = budget.Pace(**known)
        if price is None:
            return
        refusal = None
        if self.rank == 0:
            machines = -(-self.world_size // distributed.ranks_on_this_node())
            self.pace = self.guard = budget.Guard(self.folder, **known, dollars_per_hour=price * machines)
            refusal, unknown = self.guard.refusal(
                ladder=loaders.short_sides(self.train.rungs),
                gpu_name=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
                gpus=self.world_size,
                machines=machines,
                vcpus=cores(),
                memory_gib=memory_bytes() / 2**30,
            )
            if unknown:
                self.say(unknown)
        refusal = distributed.from_rank_0(refusal)
        if refusal and not cfg.budget.allow_overrun:
            raise UsageError(f"{refusal}; budget.allow_overrun=true begins it nevertheless and stops at the limit")
        if refusal:
            self.warn(refusal)

    def try_largest(self):
        """UsageError where the largest step or evaluation does not fit: not after hours, when the resolution rises."""
        cfg, left = self.cfg, recipe.resolutions(self.cfg)[self.progress.epoch :]
        if not left:
            return
        px, micro = max(left), cfg.training.micro_batch
        with self.fitting(f"{px} px with training.micro_batch={micro}", UsageError):
            self.learner.try_step(micro, px)
            if self.device.type == "cuda":
                taken = torch.cuda.max_memory_reserved(self.device)
                there_is = torch.cuda.mem_get_info(self.device)[1]
                self.say(f"{micro} images of {px} px take {taken / 2**30:.1f} of the GPU's {there_is / 2**30:.1f} GiB")
        px, images = max(cfg.validation.resolutions), cfg.validation.batch_size
        with self.fitting(f"{px} px with validation.batch_size={images}", UsageError):
            self.learner.try_evaluation(images, px)

    @contextlib.contextmanager
    def fitting(self, what, refusal=RunError):
        """One line where `what`, a resolution and the setting that counts its images, is too much for the GPU."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise refusal(
                f"out of memory on {self.device} at {what}: make it smaller (for training as a new run; "
                f"tools/preflight.py finds what fits), or end what else uses this GPU. {str(error).splitlines()[0]}"
            ) from error
        except COMPILE_ERRORS as error:
            raise RunError(
                f"torch.compile fails at {what}: {str(error).strip().splitlines()[0]}; training.compile=false trains "
                "without it, as a new run"
            ) from error

    # --- Between two steps -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def steps(self, px):
        """The block in which the steps of an epoch are made: `micro_batches` feeds them, `after_step` follows each."""
        self._stopwatch, self._waiting, self._in_a_row = Stopwatch(), Waiting(self.device), 0
        self._px = self._unproved = px
        self._graphs, self._began = graphs(), time.perf_counter()
        self.console.show(self._epoch_status())
        try:
            yield
            # what the GPU was behind the host, which has waited for it in the last step's status
            self._count_time()
        finally:
            self.console.clear()

    def micro_batches(self, batches):
        """Pass on the iterator `batches`, and note how long the device waits for each."""
        while True:
            with self._waiting.for_data():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def after_step(self, loss):
        """Count the step; on all ranks alike, stop if asked to; show how far it is; have a checkpoint written if due.

        The order of these is what makes resuming exact: a step is counted before anything may end the run, and ranks
        agree before one of them waits for its GPU.
        """
        cfg, progress = self.cfg, self.progress
        first, self._unproved = self._unproved, None
        if first:
            self._prove(first)
        progress.loss_sum += loss
        progress.count_step(images=cfg.training.batch_size, **self._stopwatch.lap())
        if first and self.pace:
            self.pace.leave_out()
        progress.waiting_seconds += self._waiting.lap()
        # before this rank waits for its GPU, which a rank that is gone would keep waiting
        self.stop_if_asked()
        if self.console.due() or progress.epoch_step == progress.epoch_steps:
            self._in_a_row = self.learner.finite.in_a_row.item()
            self.console.show(self._epoch_status(self._figures()))
            if self.log:
                self.log.note_progress(progress, resolution=self._px)
        if self.checkpoints and self.checkpoints.due(
            progress.step, steps=cfg.logging.checkpoint_steps, minutes=cfg.logging.checkpoint_minutes
        ):
            self.save()

    def _prove(self, px):
        """RunError unless the first step of an epoch was what the plan says; note and say what it was."""
        seen, planned = self.learner.seen(), self.learner.planned(px)
        if seen != planned:
            raise RunError(
                f"the plan has {_spelled(planned)} for epoch {self.progress.epoch + 1}, but the network was given "
                f"{_spelled(seen)}: please report this as a bug of rn50"
            )
        self.progress.first_batch = seen
        if self.cfg.training.compile:
            made, cached = (now - before for now, before in zip(graphs(), self._graphs, strict=True))
            if not sum(graphs()):
                raise RunError("training.compile=true, but torch.compile has made no graph: what switched it off?")
            if made:
                self.say(
                    f"torch.compile: {made} graph{'s' if made > 1 else ''} for {_spelled(seen)}, {cached} from "
                    f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}; the first step took "
                    f"{time.perf_counter() - self._began:.0f} s"
                )

    def stop_if_asked(self):
        """Between two steps, on all ranks at the same one: end where something asked for it or nothing is learned."""
        spent = self.guard is not None and self.guard.spent()
        # how many steps in a row were left out, as far as each rank knows
        asked, spent, in_a_row = distributed.agree(int(interruption.reason() is not None), int(spent), self._in_a_row)
        if in_a_row >= self.learner.finite.LIMIT:
            raise RunError(
                f"the loss or its gradient was not finite in {in_a_row} steps in a row, up to step "
                f"{self.progress.step}: "
                "lower lr.lr_per_256 or use training.precision=bf16; the last checkpoint is from before"
            )
        if asked:
            raise Stopped(interruption.reason() or "another rank was asked to stop")
        if spent:
            raise Stopped(
                f"budget.max_dollars={self.cfg.budget.max_dollars:g} is spent but for what stopping costs", "budget"
            )

    def until_stopped(self, batches, rounds, *, px):
        """Pass on the batches of an evaluation; all ranks ask `rounds` times whether to stop, or not together."""
        try:
            for done in range(rounds):
                self.stop_if_asked()
                if done == 0 or self.console.due():
                    self.console.show(self._status(f"evaluating at {px} px", done / rounds))
                yield from islice(batches, 1)
        finally:
            self.console.clear()

    def save(self, *, last=False):
        """Have a checkpoint written, unless the newest steps were left out: what comes of that is not known yet.

        RunError where weights are not finite: they would never be again, and must not take a good checkpoint's place.
        """
        # FiniteSteps cannot see it: a gradient is finite before a step that is too long, and so is the loss where
        # BatchNorm divides by an infinite variance
        if self.rank == 0 and (spoiled := self.learner.not_finite()):
            raise RunError(
                f"weights are not finite at step {self.progress.step} ({spoiled}): lower lr.lr_per_256 or use "
                "training.precision=bf16, as a new run; the last checkpoint is from before"
            )
        if self.rank == 0 and (last or not self.learner.finite.in_a_row.item()):
            if self.guard:
                self.progress.dollars = self.guard.dollars
                self.guard.write()
            self.checkpoints.put(self.state())

    def state(self):
        """The checkpoint: tensors and plain values."""
        return self.learner.state() | {
            "step": self.progress.step,
            "progress": vars(self.progress),
            "config": config.to_dict(self.cfg),
            "betons": self.betons,
        }

    def _count_time(self):
        self.progress.count_time(**self._stopwatch.lap())
        self.progress.waiting_seconds += self._waiting.lap()

    def _figures(self):
        """What the status says of the steps of this epoch; their loss is on the GPU, which is waited for."""
        progress = self.progress
        speed = progress.epoch_step * self.cfg.training.batch_size / progress.epoch_seconds
        loss = float(progress.loss_sum) / max(1, progress.epoch_step - self.learner.finite.skipped.item())
        waiting = progress.waiting_seconds / progress.epoch_seconds
        figures = {"speed": f"{speed:,.0f} img/s", "loss": f"loss {loss:.2f}"}
        return figures | ({"waits": _waits(waiting)} if waiting >= WAITS else {})

    def _epoch_status(self, figures=None):
        progress = self.progress
        what = f"epoch {progress.epoch + 1}/{self.cfg.training.epochs}"
        return self._status(what, progress.epoch_step / progress.epoch_steps, figures)

    def _status(self, what, share, figures=None):
        """The parts of the console's last line, of which `share` of `what` is done."""
        money, end = self.guard and self._money(), self._end()
        parts = {"what": what, "share": f"{math.floor(100 * share)} %"} | (figures or {})
        return parts | ({"money": money} if money else {}) | ({"end": end} if end else {})

    def _money(self):
        dollars, limit = self.guard.dollars, self.guard.max_dollars
        if limit is None:
            return f"${dollars:,.2f} spent"
        return f"${dollars:,.2f} of ${limit:,.2f}".removesuffix(".00")

    def _end(self):
        """When the run, or the money for it, will have come to its end; None before anything is measured."""
        seconds = self.pace and self.pace.seconds_to_finish()
        if seconds is None:
            return None
        if self.guard and (left := self.guard.seconds_left()) < seconds:
            return f"money ends {moment(left)}"
        return f"ends {moment(seconds)}"

    # --- Between two epochs ------------------------------------------------------------------------------------------

    def training_row(self, *, resolution, rung, lr):
        """What the log gets of the steps of an epoch. resolution, rung: px; lr: of its last step."""
        progress, skipped = self.progress, self.learner.finite.skipped.item()
        images = progress.epoch_steps * self.cfg.training.batch_size
        return {
            "epoch": progress.epoch,
            "step": progress.step,
            "resolution": resolution,
            "first_batch": progress.first_batch,
            "rung": rung,
            "lr": lr,
            "train_loss": float(progress.loss_sum) / max(1, progress.epoch_steps - skipped),
            "skipped_steps": skipped,
            "images_per_second": round(images / progress.epoch_seconds, 2),
            "data_wait_fraction": round(progress.waiting_seconds / progress.epoch_seconds, 4),
            "train_seconds": round(progress.epoch_seconds, 3),
            "cpu_seconds": round(progress.cpu_seconds, 3),
            "images_seen": progress.images_seen,
            "elapsed_seconds": round(progress.seconds, 3),
        }

    def end_epoch(self, row):
        """Count the epoch and put its `row` into the log, with what it cost and what is to be expected."""
        self.progress.next_epoch()
        # not before: the checkpoint that comes before the evaluation counts them too
        self.learner.finite.skipped.zero_()
        if not math.isfinite(row.get("val_loss", 0.0)):  # the next epoch may mend it, but JSON has no such number
            self.warn(f"the evaluation's loss is not finite ({row.pop('val_loss')})")
        if self.log:
            row |= self.guard.columns(row) if self.guard else {"dollars": None}
            row |= {"forecast": self._outlook(row)}
            self.log.add_epoch(row)
            self._say_epoch(row)

    def _outlook(self, row):
        """The forecast after an epoch's `row`; says what was not said after the one before."""
        rows, classes = self.progress.rows, self.train.info.num_classes
        found = forecast([*rows, row], config.to_dict(self.cfg), classes=classes, names=self._class_names())
        said = (rows[-1].get("forecast") or {}).get("warnings", []) if rows else []
        for warning in found["warnings"]:
            if warning["cause"] not in [earlier["cause"] for earlier in said]:
                self.warn(f"{warning['cause']}: {warning['text']}")
        return found

    def _say_epoch(self, row):
        """The epoch's figures, and what is to be expected of the rest."""
        epochs, waiting, expected = self.cfg.training.epochs, row["data_wait_fraction"], row["forecast"]
        last = row["epoch"] + 1 == epochs
        texts = [f"epoch {row['epoch'] + 1}/{epochs}", f"{row['resolution']} px", f"loss {row['train_loss']:.3f}"]
        texts += [f"lr {row['lr']:.3g}", f"{row['images_per_second']:,.0f} img/s"]
        texts += [] if last else [self._end()]
        texts += [_waits(waiting)] * (waiting >= WAITS)
        texts += [f"top-1 {row['top1']:.2f} %"] if "top1" in row else []
        if expected["top1"] is not None and not last:
            texts += [f"expected at the end {expected['top1']:.1f} % ({expected['evaluation']})"]
        if self.guard:
            texts += [self._money() + ("" if last else f", ${row['dollars_to_finish']:,.2f} to finish")]
        self.say(folded(texts))
        if row["skipped_steps"]:
            were = "step of it was" if row["skipped_steps"] == 1 else "steps of it were"
            self.warn(f"{row['skipped_steps']} {were} left out: the loss or its gradient was not finite")

    def _class_names(self):
        """Wnids in label order, or None for files of stock FFCV, which do not say."""
        classes = self.train.info.classes
        return [names["wnid"] for names in classes] if classes else None

    # --- The end -----------------------------------------------------------------------------------------------------

    def finite(self, results):
        """The final figures `results`, {resolution: {view: figures}}. RunError where a loss is not finite."""
        for px, views in results.items():
            for figures in views.values():
                if not math.isfinite(figures["val_loss"]):
                    raise RunError(
                        f"the evaluation's loss at {px} px is not finite, although the weights are: the network has "
                        "diverged; lower lr.lr_per_256 or use training.precision=bf16, as a new run"
                    )
        return results

    def report(self, results):
        """Say the final figures, {resolution: {view: figures}}."""
        validation = self.cfg.validation
        weights = "EMA weights" if self.learner.ema else "weights"
        self.say(
            f"\nevaluation of the {weights} after epoch {self.progress.epochs:.4g}, "
            f"centre crop {validation.crop_ratio:g}, {counted(self.val.info.num_samples, 'image')}"
        )
        for line in report_lines(results, headline=(validation.headline_resolution, validation.headline_view)):
            self.say(line)

    def warn_of_labels(self, figures):
        """Say where `figures` have classes under the names of others."""
        for warning in label_warnings([figures], self._class_names()):
            self.warn(f"{warning['cause']}: {warning['text']}")

    def stop(self, stop):
        """What a planned stop leaves: a checkpoint of this step, and the word that the same command goes on."""
        if self.checkpoints and self.checkpoints.step != self.progress.step:
            self.save()
        command = "the same command" + (" with a larger budget.max_dollars" if stop.status == "budget" else "")
        self.say(f"stopping at step {self.progress.step}: {stop}; {command} goes on from there")
        if self.checkpoints:
            self.checkpoints.finish(interruption.STOP_SECONDS)
        if words := self._going_on(stop):
            self._say_next("go on", [_command(*words)])

    def _going_on(self, stop):
        """The words of the command that goes on after `stop`; none where they are not known."""
        if under_torchrun():
            return []
        if stop.status != "budget":
            return sys.argv
        seconds, flag = self.pace.seconds_to_finish(), "--budget.max_dollars="
        if seconds is None:
            return []
        enough = self.guard.dollars + self.guard.cost(seconds + 2 * budget.STOP_SECONDS)
        return [*(word for word in sys.argv if not word.startswith(flag)), f"{flag}{math.ceil(enough)}"]

    def say_finished(self):
        """Say that the run is at its end, and what can be done with it."""
        progress = self.progress
        paid = f", ${self.guard.dollars:,.2f}" if self.guard else ""
        self.say(f"\nfinished: {counted(progress.epoch, 'epoch')}, {duration(progress.seconds)} of training{paid}")
        self._say_next(
            "plot its curves, evaluate it again, export it",
            [
                _command(from_here(ROOT / "tools" / "compare_runs.py"), self.folder, "--out", "curves.png"),
                _command(sys.argv[0], "--config-file", self.folder, "--training.eval_only=true"),
                _command(from_here(ROOT / "tools" / "export_model.py"), "--checkpoint", self.folder, "--out", "model/"),
            ],
        )

    def _say_next(self, what, commands):
        """The `commands` to `what`, each a line that a shell takes as it is."""
        self.say("\n".join([f"next: {what}", *(f"  {command}" for command in commands)]))


def _waits(share):
    return f"waits {100 * share:.0f} %"


def _command(*words):
    """A line for the shell that runs a script, the first of `words`, as this one was started."""
    return shlex.join(map(str, (sys.orig_argv[0], *words)))


def _tolerant(say):
    """`say` for a training, which does not end because stdout is a file on a full disk: its folder has the figures."""

    def attempt(message):
        try:
            say(message)
        except BrokenPipeError:  # whoever read it has left, as `| head` does
            raise
        except OSError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            with contextlib.suppress(OSError):
                print(
                    f"warning: stdout cannot be written: {error.strerror}; training goes on without it, and its folder "
                    "has the figures",
                    file=sys.stderr,
                    flush=True,
                )

    return attempt


def _say(message):
    print(message, flush=True)


def _spelled(batch):
    return f"{batch['resolution']} px {batch['layout']} {batch['dtype']}"
