"""Read the flags of all programs once in the server of forked processes, so that no fork has to parse the sources."""

from src.config import parse_train

parse_train(["--data", "digits"])
