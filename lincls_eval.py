"""Score a backbone by a linear classifier on its frozen features: top-1 and top-5 accuracy.

    python lincls_eval.py --checkpoint runs/demo/checkpoint.pt                      # digits, seconds
    python lincls_eval.py --checkpoint runs/demo/checkpoint.pt --fast               # many rates and decays at once
    torchrun --standalone --nproc_per_node=8 lincls_eval.py --checkpoint checkpoint.pt --data "$IMAGENET"
    python lincls_eval.py --checkpoint swav-800ep --data "$IMAGENET" --preset swav
    python lincls_eval.py --checkpoint swav-800ep --data "$IMAGENET" --preset swav_2x2 --feature-bn
    python lincls_eval.py --checkpoint swav-800ep --data "$IMAGENET" --preset swav_semi_1 --train-list 1percent.txt

A probe that is stopped (Ctrl-C, SIGTERM) saves first; the same command goes on from that very step.
"""

from pathlib import Path

from src import config


def main() -> None:
    options = config.parse_lincls_eval()

    import torch

    from src import checkpoint, distributed
    from src.data.loaders import TrainLoader, single_views
    from src.data.subsets import draw_share, read_list
    from src.data.views import build_views
    from src.evaluation import linear
    from src.features import extract
    from src.logs import Progress, percent, table, write_json
    from src.models.backbones import pool_windows
    from src.pretrained import load_backbone
    from src.run import choose_folder, make_folder
    from src.trainer import Interrupted, StopRequest

    # the backbone; the data it was trained on, unless other data is given
    backbone, state = load_backbone(options.checkpoint, options.arch)
    trained = state["config"]
    options = config.parse_lincls_eval(trained=trained)
    train, test = linear.open_labelled(options.data, options.data_root, options.download, options.subset_file)
    if train.channels != trained["channels"]:
        raise config.InputError(
            f"--data {options.data}: images have {train.channels} channels, the network takes {trained['channels']}"
        )
    num_features = backbone.width
    if options.pool_window:
        num_features = pool_windows(backbone, options.pool_window, train.channels, trained["global_crops_size"])
    if options.train_list:
        train = linear.keep_rows(train, read_list(train, options.train_list, "--train-list"))
    elif options.train_share < 1:
        train = linear.keep_rows(train, draw_share(train.labels.numpy(), options.train_share, options.seed))

    # where the results go
    given = Path(options.checkpoint)
    beside = given.parent if given.is_file() else Path("runs") / given.name  # of a released model's name
    folder = choose_folder(options.output_dir or str(beside), False, "")
    before = linear.fingerprint(backbone)
    result = {
        "checkpoint": str(options.checkpoint),
        "method": trained["method"],
        "arch": trained["arch"],
        "epochs": state.get("epoch"),
        "seed": trained["seed"],
        "data": options.data,
        "subset_file": options.subset_file,
        "train_images": len(train),
        "test_images": len(test),
        "classes": len(train.classes),
        "backbone_sha256": before,
        "features": num_features,
    }

    device = distributed.start(options.device)
    torch.manual_seed(options.seed)
    central = build_views(options.data, test, *(trained[name] for name in config.VIEW_SETTINGS))
    views = linear.training_views(options.data, train, trained["global_crops_size"], central, options.crop_flip)
    autocast = None if options.precision == "float32" else getattr(torch, options.precision)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    how = (options.finetune, options.train_bn, num_features, options.feature_bn)
    probe = linear.LinearProbe(backbone, len(train.classes), *how)
    probe = probe.to(device, memory_format=layout)

    # the quick way: features once, then many settings at once
    if options.fast:
        how = (options.val_batch_size, device, options.workers, autocast, options.features_cache)
        features = [
            extract(probe, data, split, central, "backbone", *how).to(device)
            for split, data in (("train", train), ("test", test))
        ]
        if not distributed.is_main():
            return
        recipe = {name: getattr(options, name) for name in ("held_out", "epochs", "batch_size", "momentum", "seed")}
        found = linear.search(
            *(features[0], train.labels, features[1], test.labels, len(train.classes)),
            *(options.fast_lrs, options.fast_weight_decays),
            **recipe,
        )
        linear.check_unchanged(probe.backbone, before)
        make_folder(folder)
        result |= {"protocol": describe(options), "options": config.as_plain(options), **found}
        write_json(folder / "lincls_eval.json", result)
        rows = [
            [f"lr {row['lr']:g}, weight decay {row['weight_decay']:g}" + " (chosen)" * (row is found["chosen"])]
            + [percent(row["top1"]), percent(row["top5"])]
            for row in found["settings"]
        ]
        print(f"{options.data}, {len(train):,} training images, {found['held_out_images']:,} of them held out")
        print(table(["held out", "TOP1", "TOP5"], rows))
        print(table(["test", "TOP1", "TOP5"], [["chosen", percent(found["top1"]), percent(found["top5"])]]))
        print(f"wrote lincls_eval.json to {folder}")
        return

    # the published way: an epoch, a look at the test split, the next epoch
    settings = config.as_plain(options) | {
        **{name: trained[name] for name in ("arch", "patch_size", "channels", "global_crops_size")},
        "method": "linear",
        "backbone": before,
        "train_images": len(train),
    }
    found = linear.find_probe(folder, settings, options.fresh)
    optimizer = linear.build_probe_optimizer(
        *(probe, options.optimizer, options.lr, options.backbone_lr),
        *(options.momentum, options.weight_decay, options.nesterov),
    )
    factor = linear.rate_factor(options.schedule, options.epochs, options.decay_epochs, options.gamma)
    loader = TrainLoader(train, views, options.batch_size, options.seed, device, options.workers, keep_last=True)
    wrapped = distributed.parallel(probe, device, sync_bn_group=0 if probe.shares_statistics else 1)
    stop_request = StopRequest()
    trainer = linear.ProbeTrainer(
        *(wrapped, optimizer, factor, loader, train.labels, device, autocast, options.log_every, stop_request)
    )
    history, best = [], None
    if found:
        trainer.load_state_dict(found)
        history, best = found["history"], found["best"]
    if distributed.is_main():
        make_folder(folder)

    def save(name: str) -> None:
        content = {"config": settings, "history": history, "best": best, **trainer.state_dict()}
        if distributed.is_main():
            checkpoint.save(folder / name, content)
        distributed.barrier()

    total = options.epochs * loader.images
    seen = trainer.epoch * loader.images + trainer.done * loader.batch_size
    progress = Progress(total, seen, enabled=distributed.is_main())
    progress.say(describe(options))
    progress.say(
        f"{len(train):,} training images of {len(train.classes)} classes, {len(test):,} test images; {len(loader)} steps per "
        f"epoch on {distributed.world_size()} x {device.type}; writing to {folder}"
    )
    if found:
        progress.say(
            f"going on from epoch {trainer.epoch + 1}, step {trainer.done + 1}"
            if trainer.epoch < options.epochs
            else "finished before"
        )
    stop_request.listen()
    try:
        while trainer.epoch < options.epochs:
            summary = trainer.train_epoch(progress)
            if not options.finetune and trainer.epoch in (1, options.epochs):
                linear.check_unchanged(probe.backbone, before)
            batches = single_views(test, central, options.val_batch_size, device, options.workers)
            summary["top1"], summary["top5"] = linear.score(probe, batches, test.labels, autocast)
            history.append(summary)
            if best is None or summary["top1"] > best["top1"]:
                best = summary
                save(linear.BEST)
            save(linear.LAST)
            if trainer.epoch % max(options.epochs // 10, 1) == 0:
                progress.say(
                    f"epoch {trainer.epoch}  loss {summary['loss']:.4f}  top-1 {percent(summary['top1'])}  "
                    f"top-5 {percent(summary['top5'])}"
                )
    except Interrupted as stopped:
        save(linear.LAST)
        progress.say(f"{stopped}: saved {folder / linear.LAST}; the same command goes on from there")
        raise SystemExit(128 + stopped.signal) from None
    finally:
        loader.close()
        progress.close()

    # results: the papers report the best epoch on the test split
    last = history[-1]
    result |= {
        "protocol": describe(options),
        "options": config.as_plain(options),
        "top1": best["top1"],
        "top5": best["top5"],
        "best_epoch": best["epoch"],
        "last_top1": last["top1"],
        "last_top5": last["top5"],
        "history": history,
    }
    if distributed.is_main():
        write_json(folder / "lincls_eval.json", result)
        rows = [
            [f"{name} epoch, {row['epoch']}", percent(row["top1"]), percent(row["top5"])]
            for name, row in (("best", best), ("last", last))
        ]
        print(f"{options.data}, test split, {len(test):,} images, {len(test.classes)} classes")
        print(table(["", "TOP1", "TOP5"], rows))
        print(f"wrote lincls_eval.json, {linear.LAST} and {linear.BEST} to {folder}")
    distributed.stop()


def describe(options: config.LinclsEvalOptions) -> str:
    """The protocol in one sentence."""
    share = f"{100 * options.train_share:g} % of the labels, " if options.train_share < 1 else ""
    share = f"labels of {options.train_list}, " if options.train_list else share
    window = options.pool_window
    pooling = f"means over windows of {window} × {window} places, " if window else ""
    pooling += "batch-normalised, " * options.feature_bn
    if options.fast:
        return (
            f"linear classifier on standardised features of the central view, {pooling}{share}{len(options.fast_lrs)} learning rates and "
            f"{len(options.fast_weight_decays)} weight decays, the best on {100 * options.held_out:g} % of the training images, "
            f"fitted again on all of them; sgd, batch {options.batch_size}, {options.epochs} epochs, cosine"
        )
    what = "linear classifier on the frozen backbone"
    if options.finetune:
        statistics = "the batch's" if options.train_bn else "the learned"
        rate = options.lr if options.backbone_lr is None else options.backbone_lr
        what = f"fine-tuning of the whole network (backbone lr {rate:g}, {statistics} batch-norm statistics)"
    return (
        f"{what}, {pooling}{share}preset {options.preset}: {options.optimizer}, batch {options.batch_size}, lr {options.lr:g}, "
        f"weight decay {options.weight_decay:g}, momentum {options.momentum:g}, {options.epochs} epochs, {options.schedule} "
        f"per epoch, {'augmented' if options.crop_flip else 'unaugmented'}; test: central view, best epoch on the test split"
    )


if __name__ == "__main__":
    config.run_script(main)
