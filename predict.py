"""Put every image of a folder into a cluster. Writes assignments.csv, and sorts the images into folders if asked.

    python predict.py --checkpoint runs/mine --data ~/pictures
    python predict.py --checkpoint runs/mine --data ~/pictures --sort links          # one folder per cluster
    python predict.py --checkpoint runs/mine --data ~/pictures --update              # only files that are new
    python predict.py --checkpoint runs/mine --data ~/pictures --names names.json    # names that the atlas has saved
    python predict.py --checkpoint runs/mine --data picture.jpg

The folder may be nested, and it needs no labels. The same command continues an interrupted run. No file in the folder is moved
or changed. Files that cannot be read are listed in skipped.csv.
"""

from src.signals import end_with_one_line

if __name__ == "__main__":
    end_with_one_line()  # the imports below take a while

from src import config
from src.errors import run_script


def main() -> None:
    options = config.parse_predict()

    from src.prediction import program  # imports torch

    program.run(options)


if __name__ == "__main__":
    run_script(main)
