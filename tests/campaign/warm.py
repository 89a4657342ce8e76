"""Read the flags once in the server process. Its forks then need not parse the sources again."""

from src.config import parse_train

parse_train(["--data", "digits"])
