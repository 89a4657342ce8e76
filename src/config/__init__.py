"""Flags, declared once as the fields of dataclasses, with the comment after the field as help. Nothing here imports torch."""

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
    require_at_least,
    require_positive,
    require_sizes,
    require_views,
)
from .methods import MethodSource, method_names, read_method
from .training import (
    BUILT_IN_DATA,
    FREE_TO_CHANGE,
    SUBSETS,
    DataOptions,
    DeviceOptions,
    TrainOptions,
    ViewSettings,
    parse_train,
)

__all__ = [
    "BUILT_IN_DATA",
    "FREE_TO_CHANGE",
    "SUBSETS",
    "SUPERCLASSES",
    "ClsEvalOptions",
    "DataOptions",
    "DeviceOptions",
    "EvaluationOptions",
    "KMeansOptions",
    "KnnEvalOptions",
    "LinclsEvalOptions",
    "MethodSource",
    "OneLineParser",
    "TrainOptions",
    "ViewSettings",
    "as_plain",
    "flag",
    "method_names",
    "parse_cls_eval",
    "parse_knn_eval",
    "parse_lincls_eval",
    "parse_train",
    "read_method",
    "require_at_least",
    "require_positive",
    "require_sizes",
    "require_views",
]
