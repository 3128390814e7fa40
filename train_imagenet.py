"""Train a ResNet on ImageNet from FFCV files: the recipe, top to bottom.

    python train_imagenet.py --config-file rn50_configs/rn50_16_epochs.yaml --data.dir=/data/betons
    torchrun --nproc_per_node=8 train_imagenet.py --config-file ...   # the same recipe on more GPUs

Repeating a command continues the run at the step where its last checkpoint is. Every key of a config can be given as
--section.key=value; --help lists them. rn50/recipe.py declares the keys, rn50/learner.py makes a step,
rn50/training/session.py keeps the run alive.
"""

if __name__ == "__main__":
    import contextlib
    import os
    import sys

    from rn50.command import open_streams
    from rn50.training import interruption

    open_streams()  # before signals' pipe, which would take the number of a stream that is closed
    interruption.catch_signals()  # importing torch takes seconds, in which a signal should not be lost
    if os.environ.get("RANK", "0") == "0" and not {"-h", "--help"} & set(sys.argv):
        with contextlib.suppress(OSError):  # who does not take it is met again at the next line
            print("loading ...", flush=True)

import time

import torch

from rn50 import recipe
from rn50.command import run
from rn50.data.loaders import EvaluationLoader, TrainingLoader
from rn50.evaluate import evaluate
from rn50.learner import Learner
from rn50.machine import cores
from rn50.training import distributed, interruption
from rn50.training.progress import Progress
from rn50.training.session import Session, check, training_session


def main():
    cfg = recipe.load(__doc__.splitlines()[0])
    check(cfg)
    (evaluate_only if cfg.training.eval_only else train)(cfg)
    interruption.release_signals()


def train(cfg):
    """All steps that the run's checkpoint does not have yet, then the final evaluation."""
    with training_session(cfg) as session:
        build(session)
        session.resume()
        validation, progress, results = cfg.validation, session.progress, None
        while progress.epoch < cfg.training.epochs:
            last = progress.epoch + 1 == cfg.training.epochs
            row = train_one_epoch(session)
            # before the evaluation: one that is interrupted must not cost the epoch
            session.save(last=last)
            started = time.perf_counter()
            if last:
                results = final_evaluation(session)
                row |= results[validation.headline_resolution][validation.headline_view]
                row["evaluation"] = results
            elif (progress.epoch + 1) % validation.every == 0:
                flip = validation.headline_view == "flip"
                row |= evaluate_at(session, validation.headline_resolution, flip)[validation.headline_view]
            row["val_seconds"] = round(time.perf_counter() - started, 3)
            session.end_epoch(row)
            if last:
                session.save(last=True)  # with the last row: whoever has this file has the whole log
        session.report(results or final_evaluation(session))


def evaluate_only(cfg):
    """Evaluate a checkpoint and change nothing."""
    interruption.release_signals()
    session = Session(cfg, Progress())
    build(session)
    session.load_weights()
    results = final_evaluation(session)
    session.report(results)
    session.warn_of_labels(results[cfg.validation.headline_resolution]["single"])
    distributed.shutdown()


def build(session):
    """Open the data, and make the network and its optimizer at their beginning."""
    cfg = session.cfg
    training, validation = cfg.training, cfg.validation
    common = {
        "device": session.device,
        "rank": session.rank,
        "world_size": session.world_size,
        "workers": cfg.data.workers or max(1, cores() // distributed.ranks_on_this_node()),
        "timeout": 60 * cfg.data.timeout_minutes,
    }
    train_loader = TrainingLoader(
        cfg.data.dir,
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        seed=training.seed,
        crop_scale=cfg.data.crop_scale,
        rung=cfg.data.rung,
        order=cfg.data.order,
        **common,
    )
    val_loader = EvaluationLoader(
        cfg.data.dir,
        batch_size=validation.batch_size,
        crop_ratio=validation.crop_ratio,
        warn=session.warn,
        **common,
    )
    learner = Learner(
        cfg,
        classes=train_loader.info.num_classes,
        device=session.device,
        rank=session.rank,
        world_size=session.world_size,
        total=distributed.total,
    )
    session.attach(learner, train_loader, val_loader)


def train_one_epoch(session):
    """The steps of the epoch that are left; returns the epoch's row of the log."""
    cfg, progress = session.cfg, session.progress
    epoch = progress.epoch
    px = recipe.resolution(cfg, epoch)
    side = session.train.side(px)
    steps = progress.epoch_steps = session.train.steps_per_epoch
    if progress.epoch_step < steps:
        with session.fitting(f"{px} px with training.micro_batch={cfg.training.micro_batch}"):
            train_steps(session, px, steps)
    return session.training_row(resolution=px, rung=side, lr=recipe.learning_rate(cfg, epoch + (steps - 1) / steps))


def train_steps(session, px, steps):
    """The steps that are left of the `steps` of an epoch, at `px` pixels."""
    cfg, progress, learner, loader = session.cfg, session.progress, session.learner, session.train
    epoch = progress.epoch
    learner.train()
    torch.cuda.empty_cache()  # of pieces in the sizes of another resolution; nothing where there is no GPU
    loader.seek(epoch, progress.epoch_step, progress.reading)
    with loader.batches(px) as batches, session.steps(px):
        progress.reading = loader.reading
        micro_batches = session.micro_batches(batches)
        for step in range(progress.epoch_step, steps):
            rate = recipe.learning_rate(cfg, epoch + step / steps)
            loss = learner.step(
                micro_batches, accumulation=loader.accumulation, learning_rate=rate, epoch=epoch, step=progress.step
            )
            session.after_step(loss)
    session.stop_if_asked()


def evaluate_at(session, px, flip):
    """Figures of the EMA's weights, or of the network's where there is no EMA: {view: figures}."""
    learner, loader = session.learner, session.val
    network = learner.evaluated()
    distributed.share_buffers(network)
    with (
        session.fitting(f"{px} px with validation.batch_size={loader.batch_size}"),
        loader.batches(px) as batches,
    ):
        return evaluate(
            network,
            session.until_stopped(batches, loader.rounds, px=px),
            classes=session.train.info.num_classes,
            device=session.device,
            autocast=learner.autocast,
            flip=flip,
            total=distributed.total,
        )


def final_evaluation(session):
    """{resolution: {view: figures}} at every resolution of the config, single view and flip-averaged."""
    return session.finite({px: evaluate_at(session, px, flip=True) for px in session.cfg.validation.resolutions})


if __name__ == "__main__":
    run(main)
