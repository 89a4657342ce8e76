"""METHODS: name → class, the only place that lists the methods. The names are the names of their files."""

from .base import Method, Step
from .self_classifier import SelfClassifier

METHODS: dict[str, type[Method]] = {
    "self_classifier": SelfClassifier,
}

__all__ = ["METHODS", "Method", "Step"]
