"""The atlas: one HTML file that shows the images of a folder, their clusters and their neighbours.

The file needs no server and no network. A browser opens it from the disk.
"""

from .data import MOST_IMAGES, AtlasData, Clusters, choose
from .writing import write

__all__ = ["MOST_IMAGES", "AtlasData", "Clusters", "choose", "write"]
