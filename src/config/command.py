"""The command line of train.py: the flags of a method, the preset or the recipe behind them, and what follows from them."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from ..errors import InputError
from . import flags
from .flags import SAME_BATCH, flag, require_positive
from .methods import MethodSource, method_names, read_method
from .recipe import SurveyFunction, adapt, choose_preset
from .training import BUILT_IN_DATA, DEFAULT_METHOD, TrainOptions


def parse_train(
    argv: Sequence[str] | None = None,
    *,
    survey: SurveyFunction | None = None,
    notes: list[str] | None = None,
    estimate: Callable[[TrainOptions, str, Any], str] | None = None,
) -> tuple[TrainOptions, str, Any]:
    """Parse the command line of train.py: shared options, the method's name, and the method's own config.

    The function first reads `--method`, and then parses the flags of that method. So a flag of another method is an error.
    A preset changes defaults. A flag on the command line overrides the preset. What a preset sets and the command line does
    not is adapted to the batch size, the number of epochs and, without `--preset`, to the data; see `recipe.adapt`.

    Args:
        survey: looks at the folder of images that `--data` names; None: the published preset is used for folders.
        notes: list to which the function appends what it chose and why.
        estimate: takes the result of this function and returns a line about the cost of the run, for --dry-run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = flags.OneLineParser(add_help=False, allow_abbrev=False, prog="train.py")
    first.add_argument(
        "--method", choices=method_names(), default=DEFAULT_METHOD, help=f"method to train (default: {DEFAULT_METHOD})"
    )
    first.add_argument(
        "--preset",
        help="named set of defaults, see docs/recipes.md (default: the preset with the name of --data; for a folder, a recipe "
        "that fits its images)",
    )
    first.add_argument("--data", default=TrainOptions.data)
    first.add_argument("--device", default=TrainOptions.device)
    known, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    method = read_method(known.method)
    found = None
    preset, reason = known.preset, ""
    changed: dict[str, Any] = {}
    if not preset:
        preset = known.data if known.data in method.presets else "published"
        if survey is not None and _is_folder(known.data):
            found = survey(known.data)
            found = replace(found, gpu=found.gpu and known.device != "cpu")
            preset, changed, reason = choose_preset(found, method.presets)
    if preset not in method.presets:
        raise InputError(
            f"--preset {preset}: {known.method} has no such preset: {flags.closest(preset, method.presets)}"
        )

    defaults = {**method.presets[preset], **changed}
    parser = _parser(first, known.method, method=method, preset=preset, defaults=defaults)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_explain_unknown(unknown, parser, known.method))
    whole = {**flags.as_plain(TrainOptions(data="somewhere")), **defaults}
    given = flags.flags_in(argv)
    if values.base_lr is not None:
        _apply_base_lr(values, whole, given)
    chosen = adapt(values, whole, given=given, survey=found if preset != "published" else None)
    if 0 < values.lr < values.warmup_start and "--warmup-start" not in given:
        # the ratio that the preset has, but at most 1: a warm-up does not lower the rate
        values.warmup_start = values.lr * min(whole["warmup_start"] / whole["lr"], 1.0)
    options, knobs = flags.collect(TrainOptions, values), flags.collect(method.config, values)
    _require_views(options, getattr(knobs, "fewest_views", 2))
    flags.refuse_unused(given, options.unused())
    if notes is not None:
        if known.data in BUILT_IN_DATA[1:] and preset == known.data and not known.preset:
            notes.append(f"recipe: preset {preset}, for --data {preset}; a flag overrides each value")
        if found is not None:
            notes.append(
                f"recipe: preset {preset}, for {reason} ({found.images:,} images, shorter side {found.side} pixels); "
                "a flag overrides each value, --preset chooses another recipe"
            )
        notes.extend(chosen)
    settings = {"method": known.method, **flags.as_plain(options), **flags.as_plain(knobs)}
    flags.end_dry_run(values, settings, estimate=estimate and partial(estimate, options, known.method, knobs))
    return options, known.method, knobs


def _require_views(options: TrainOptions, fewest: int) -> None:
    """Raise InputError if the run makes fewer views of an image than the method needs."""
    if options.num_views < fewest:
        made = (
            f"--global-crops-number {options.global_crops_number} and --local-crops-number {options.local_crops_number}"
        )
        needed = {1: "one", 2: "two"}.get(fewest, str(fewest))
        raise InputError(
            f"{made} make {'one view' if options.num_views == 1 else 'no view'}, but training needs {needed}: raise one of them"
        )


def _is_folder(data: str) -> bool:
    return data not in BUILT_IN_DATA and not data.endswith(".npz") and os.path.isdir(data)


def _parser(
    first: argparse.ArgumentParser, name: str, *, method: MethodSource, preset: str, defaults: dict[str, Any]
) -> flags.OneLineParser:
    """Return the parser of all flags of train.py with one method. Its preset gives the defaults."""
    parser = flags.OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        description=f"Train a network without labels. The flags below are those of method {name} with preset {preset}.",
    )
    for action in first._actions[:2]:
        parser._add_action(action)
    parser.add_argument(
        "--base-lr",
        type=flags.number,
        help="learning rate per 256 images. It sets --lr to BASE_LR × batch size / 256, --warmup-start to BASE_LR or to the "
        "preset's share of it, and --final-lr to the preset's share of --lr (default: use --lr)",
    )
    flags.add_dry_run(parser, also="estimate operations and time of the run from a few steps on its data, ")
    for group in reversed(TrainOptions.__mro__[1:-2]):
        flags.add_flags(parser, group, flags.comments_of(group), **defaults)
    flags.add_flags(parser, method.config, method.comments, title=f"method {name}", **defaults)
    return parser


def _apply_base_lr(values: argparse.Namespace, published: dict, given: set[str]) -> None:
    """Apply the rule of the published learning rates.

    The peak rate is base × batch / 256. The warm-up starts at the base, and the final rate is a fixed share of the peak rate.
    A preset whose warm-up starts at another share of its own base keeps that share.
    """
    if "--lr" in given:
        raise InputError("--base-lr and --lr both name the learning rate: drop one")
    require_positive(values, "base_lr")
    values.lr = values.base_lr * values.batch_size / 256
    if values.lr > flags.LARGEST_FLOAT:
        raise InputError(
            f"--base-lr {values.base_lr:g} sets --lr to {values.lr:g}, which float32 cannot hold: lower it"
        )
    if "--warmup-start" not in given:
        share = published["warmup_start"] / (published["lr"] * 256 / published["batch_size"])
        values.warmup_start = values.base_lr * (
            1 if abs(share - 1) < SAME_BATCH else share
        )  # published: 4092 or 4096 images
    if "--final-lr" not in given:
        values.final_lr = values.lr * published["final_lr"] / published["lr"]


def _explain_unknown(words: list[str], parser: flags.OneLineParser, method: str) -> str:
    """Return the message about words that the parser did not take. It names the method that has such a flag."""
    for word in words:
        name = word.split("=")[0].replace("--no-", "--")
        owners = [
            other for other in method_names() if name in {flag(f.name) for f in fields(read_method(other).config)}
        ]
        if owners:
            return f"{word} belongs to {' and '.join(owners)}, not to {method}"
    return parser.explain_unknown(words)
