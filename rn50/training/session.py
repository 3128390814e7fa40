"""What keeps a run alive around its loop: ranks, folder, resuming, money, log, checkpoints, and how it ends."""

import contextlib
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tqdm import tqdm

from rn50 import config, recipe
from rn50.data import loaders
from rn50.data.beton import refuse_others
from rn50.errors import RunError, Stopped, UsageError
from rn50.evaluate import report_lines
from rn50.learner import COMPILE_ERRORS, graphs
from rn50.machine import cores, memory_bytes
from rn50.planning import budget
from rn50.planning.forecast import forecast, label_warnings
from rn50.precision import dtype_name
from rn50.training import checkpoint, distributed, interruption
from rn50.training.mirror import Mirror
from rn50.training.progress import Bar, Progress, Stopwatch, Waiting
from rn50.training.run_folder import Claim, RunLog, describe_environment, make_folder, recorded

# Seconds that a finished run waits for room on a full disk, and one that fails for the checkpoint it is writing.
DISK_PATIENCE, FAILURE_PATIENCE = 600.0, 30.0
COMPILED = "compiled"  # torch.compile's cache, in the run's folder


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
        session.say = _tolerant(session.say)
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
        self.say = _say if self.rank == 0 else lambda message: None
        self.log = self.checkpoints = self.mirror = self.guard = None
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
        saved = checkpoint.load(self.cfg.training.checkpoint or self.folder / checkpoint.LAST)
        self.learner.restore_weights(saved)
        if spoiled := self.learner.not_finite():
            raise RunError(f"the checkpoint holds weights that are not finite ({spoiled}): it is of no use")
        self.progress.restore(saved["progress"], self.device)

    def _announce(self):
        cfg, info = self.cfg, self.train.info
        batch, micro = cfg.training.batch_size, cfg.training.micro_batch
        accumulation = batch // (micro * self.world_size)
        self.say(
            f"{cfg.model.arch} on {self.device} in {dtype_name(self.learner.precision)}, {info.num_samples} training "
            f"images of {info.num_classes} classes, "
            f"{cfg.training.epochs} epochs at {cfg.resolution.start} to {cfg.resolution.end} px; batch {batch} = "
            f"{micro} x {self.world_size} ranks x {accumulation} accumulated, peak learning rate "
            f"{recipe.peak_learning_rate(cfg):g}; "
            f"{loaders.choose_order(info, cfg.data.order)} order; run folder {self.folder}"
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
        if price is None:
            return
        refusal = None
        if self.rank == 0:
            machines = -(-self.world_size // distributed.ranks_on_this_node())
            self.guard = budget.Guard(
                self.folder,
                config=config.to_dict(cfg),
                progress=self.progress,
                images=self.train.info.num_samples,
                validation_images=self.val.info.num_samples,
                dollars_per_hour=price * machines,
            )
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
    def steps(self, px, total):
        """The block in which the steps of an epoch are made: `micro_batches` feeds them, `after_step` follows each."""
        progress = self.progress
        title = f"epoch {progress.epoch + 1}/{self.cfg.training.epochs} {px} px"
        self._stopwatch, self._waiting, self._in_a_row = Stopwatch(), Waiting(self.device), 0
        self._px = self._unproved = px
        self._graphs, self._began = graphs(), time.perf_counter()
        with Bar(title=title, done=progress.epoch_step, total=total, say=self.say, shown=self.rank == 0) as self._bar:
            yield
            # what the GPU was behind the host, which has waited for it in the last step's status
            self._count_time()
        self._bar = None

    def micro_batches(self, batches):
        """Pass on the iterator `batches`, and note how long the device waits for each."""
        while True:
            with self._waiting.for_data():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def after_step(self, loss, rate):
        """Count the step; on all ranks alike, stop if asked to; show how far it is; have a checkpoint written if due.

        The order of these is what makes resuming exact: a step is counted before anything may end the run, and ranks
        agree before one of them waits for its GPU.
        """
        cfg, progress = self.cfg, self.progress
        if self._unproved:
            self._prove(self._unproved)
            self._unproved = None
        progress.loss_sum += loss
        progress.count_step(images=cfg.training.batch_size, **self._stopwatch.lap())
        progress.waiting_seconds += self._waiting.lap()
        self._bar.advance()
        # before this rank waits for its GPU, which a rank that is gone would keep waiting
        self.stop_if_asked()
        if self._bar.due() or progress.epoch_step == progress.epoch_steps:
            self._in_a_row = self.learner.finite.in_a_row.item()
            self._bar.state(progress.epoch_step, self._status_line(rate))
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

    def until_stopped(self, batches, rounds):
        """Pass on the batches of an evaluation; all ranks ask `rounds` times whether to stop, or not together."""
        for _ in range(rounds):
            self.stop_if_asked()
            yield from islice(batches, 1)

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

    def _status_line(self, rate):
        progress = self.progress
        loss = float(progress.loss_sum) / max(1, progress.epoch_step - self.learner.finite.skipped.item())
        speed = progress.epoch_step * self.cfg.training.batch_size / progress.epoch_seconds
        waiting = progress.waiting_seconds / progress.epoch_seconds
        paid = f", {self.guard}" if self.guard else ""
        return f"loss {loss:.3f}, lr {rate:.4f}, {speed:.0f} img/s, {waiting:.0%} waiting{paid}"

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
        epochs = self.cfg.training.epochs
        accuracy = f"  top-1 {row['top1']:.2f} %" if "top1" in row else ""
        expected = row["forecast"]["top1"]
        if expected is not None and row["epoch"] + 1 < epochs:
            accuracy += f" (at the end {expected:.1f} at {row['forecast']['evaluation']})"
        self.say(
            f"epoch {row['epoch'] + 1}/{epochs}  {row['resolution']} px  loss {row['train_loss']:.3f}"
            f"{accuracy}  {row['images_per_second']:.0f} img/s  {row['data_wait_fraction']:.0%} waiting for data  "
            f"{row['train_seconds']:.0f} s" + (f"  {self.guard}" if self.guard else "")
        )
        if row["skipped_steps"]:
            self.warn(f"{row['skipped_steps']} steps of it were left out: their loss or gradient was not finite")

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
            f"centre crop {validation.crop_ratio:g}"
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
    """Print a line, above the progress bar where there is one."""
    with tqdm.external_write_mode():
        print(message, flush=True)


def _spelled(batch):
    return f"{batch['resolution']} px {batch['layout']} {batch['dtype']}"
