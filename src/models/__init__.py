"""Architectures with a declared feature width. Nothing here knows a loss or a data set."""
