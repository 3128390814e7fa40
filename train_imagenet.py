"""Train a ResNet on ImageNet from FFCV files: the recipe, top to bottom.

    python train_imagenet.py --config-file rn50_configs/rn50_16_epochs.yaml --data.dir=/data/betons
    torchrun --nproc_per_node=8 train_imagenet.py --config-file ...   # the same recipe on more GPUs

Repeating a command continues the run at the step where its last checkpoint is. Every key of a config can be given as
--section.key=value; --help lists them. rn50/recipe.py declares the keys, rn50/learner.py makes a step,
rn50/training/session.py keeps the run alive.
"""

if __name__ == "__main__":
    from rn50.command import open_streams
    from rn50.training import interruption

    open_streams()  # before signals' pipe, which would take the number of a stream that is closed
    interruption.catch_signals()  # importing torch takes seconds, in which a signal should not be lost

import time
from functools import partial

import torch

from rn50 import recipe
from rn50.command import run
from rn50.data import loaders
from rn50.data.order import evaluation_share, rank_positions, steps_per_epoch
from rn50.errors import RunError
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
        "workers": cfg.data.workers or max(1, cores() // distributed.ranks_on_this_node()),
        "timeout": 60 * cfg.data.timeout_minutes,
    }
    train_loader = partial(
        loaders.training_loader,
        batch_size=training.micro_batch,
        crop_scale=cfg.data.crop_scale,
        seed=training.seed,
        **common,
    )
    val_loader = partial(
        loaders.evaluation_loader, batch_size=validation.batch_size, crop_ratio=validation.crop_ratio, **common
    )
    train_set = loaders.Ladder(cfg.data.dir, "train", train_loader)
    val_set = loaders.Ladder(cfg.data.dir, "val", val_loader)
    learner = Learner(
        cfg,
        classes=train_set.info.num_classes,
        device=session.device,
        rank=session.rank,
        world_size=session.world_size,
        total=distributed.total,
    )
    session.attach(learner, train_set, val_set)


def train_one_epoch(session):
    """The steps of the epoch that are left; returns the epoch's row of the log."""
    cfg, progress = session.cfg, session.progress
    batch_size, micro_batch = cfg.training.batch_size, cfg.training.micro_batch
    epoch = progress.epoch
    px = recipe.resolution(cfg, epoch)
    side = loaders.training_rung(session.train.rungs, px, cfg.data.rung)
    images = session.train.rungs[side].num_samples
    steps = progress.epoch_steps = steps_per_epoch(images, batch_size)
    if steps == 0:
        raise RunError(f"training.batch_size={batch_size} is more than the {images} images there are")
    if progress.epoch_step < steps:
        with session.fitting(f"{px} px with training.micro_batch={micro_batch}"):
            train_steps(session, side, px, steps)
    return session.training_row(resolution=px, rung=side, lr=recipe.learning_rate(cfg, epoch + (steps - 1) / steps))


def train_steps(session, side, px, steps):
    """The steps that are left of the `steps` of an epoch, at `px` pixels, from the images of rung `side`."""
    cfg, progress, learner = session.cfg, session.progress, session.learner
    training, epoch, info = cfg.training, progress.epoch, session.train.rungs[side]
    kind = loaders.choose_order(info, cfg.data.order)
    mine = rank_positions(
        loaders.epoch_order(info, kind, seed=training.seed, epoch=epoch),
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        rank=session.rank,
        world_size=session.world_size,
        first_step=progress.epoch_step,
    )
    accumulation = training.batch_size // (training.micro_batch * session.world_size)
    learner.train()
    torch.cuda.empty_cache()  # of pieces in the sizes of another resolution; nothing where there is no GPU
    with (
        session.train.loader(side).batches(mine, px, epoch=epoch, read_ahead=kind == "page") as batches,
        session.steps(px, steps),
    ):
        micro_batches = session.micro_batches(batches, mine.reshape(-1, training.micro_batch))
        for step in range(progress.epoch_step, steps):
            rate = recipe.learning_rate(cfg, epoch + step / steps)
            loss = learner.step(
                micro_batches, accumulation=accumulation, learning_rate=rate, epoch=epoch, step=progress.step
            )
            session.after_step(loss, rate)
    session.stop_if_asked()


def evaluate_at(session, px, flip):
    """Figures of the EMA's weights, or of the network's where there is no EMA: {view: figures}."""
    validation, learner = session.cfg.validation, session.learner
    side = loaders.validation_rung(session.val.rungs, px, validation.crop_ratio, warn=session.warn)
    samples = session.val.rungs[side].num_samples
    share = evaluation_share(samples, rank=session.rank, world_size=session.world_size)
    # rank 0 has the largest share; all ask as often as it does, or they would not ask together
    largest = len(evaluation_share(samples, rank=0, world_size=session.world_size))
    rounds = -(-largest // validation.batch_size)
    network = learner.evaluated()
    distributed.share_buffers(network)
    with (
        session.fitting(f"{px} px with validation.batch_size={validation.batch_size}"),
        session.val.loader(side).batches(share, px) as batches,
    ):
        return evaluate(
            network,
            session.until_stopped(batches, rounds),
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
