"""Flags, declared once as the fields of dataclasses, with the comment after the field as help. Nothing here imports torch."""

from .command import parse_train
from .evaluation import (
    SUPERCLASSES,
    ClsEvalOptions,
    EvaluationOptions,
    KMeansOptions,
    KnnEvalOptions,
    LinclsEvalOptions,
    parse_cls_eval,
    parse_knn_eval,
    parse_lincls_eval,
)
from .flags import (
    OneLineParser,
    as_plain,
    flag,
    read_options,
    require_at_least,
    require_positive,
    require_sizes,
    require_views,
)
from .methods import MethodSource, method_names, read_method
from .prediction import PredictOptions, parse_predict
from .recipe import SMALL_SIDE, Survey
from .training import (
    BUILT_IN_DATA,
    EVAL_VIEW,
    FREE_TO_CHANGE,
    SUBSETS,
    DataOptions,
    DeviceOptions,
    EvalViewOptions,
    TrainOptions,
    ViewSettings,
    check_patches,
    check_settings,
)

__all__ = [
    "BUILT_IN_DATA",
    "EVAL_VIEW",
    "FREE_TO_CHANGE",
    "SMALL_SIDE",
    "SUBSETS",
    "SUPERCLASSES",
    "ClsEvalOptions",
    "DataOptions",
    "DeviceOptions",
    "EvalViewOptions",
    "EvaluationOptions",
    "KMeansOptions",
    "KnnEvalOptions",
    "LinclsEvalOptions",
    "MethodSource",
    "OneLineParser",
    "PredictOptions",
    "Survey",
    "TrainOptions",
    "ViewSettings",
    "as_plain",
    "check_patches",
    "check_settings",
    "flag",
    "method_names",
    "parse_cls_eval",
    "parse_knn_eval",
    "parse_lincls_eval",
    "parse_predict",
    "parse_train",
    "read_method",
    "read_options",
    "require_at_least",
    "require_positive",
    "require_sizes",
    "require_views",
]
