"""What tests of detection share: pictures with coloured shapes, and the programs in this process."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

# circles, squares and triangles; in VOC's layout they carry names of VOC
SHAPES = {"bird": "red", "boat": "lime", "bottle": "blue"}

# flags for pictures of 64 to 96 pixels
SMALL = (
    *("--min-size", "64", "--test-size", "64", "--max-size", "96", "--anchor-sizes", "16", "32", "48"),
    *(
        "--rpn-batch",
        "32",
        "--roi-batch",
        "8",
        "--roi-size",
        "4",
        "--pre-nms",
        "100",
        "--post-nms",
        "32",
        "--pre-nms-test",
        "100",
    ),
    *("--post-nms-test", "32", "--workers", "0", "--device", "cpu", "--precise-bn", "0"),
)


def draw_shape(
    image: Image.Image, generator: np.random.Generator, kind: int, *, side: int
) -> tuple[list[int], list[float]]:
    """Draw a shape of a kind (0, 1, 2) at a random place. Return its box (x, y, w, h) and its polygon."""
    x, y = (int(generator.integers(0, size - side)) for size in image.size)
    if kind == 0:
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        points = np.stack([x + side / 2 * (1 + np.cos(angles)), y + side / 2 * (1 + np.sin(angles))], axis=1)
    elif kind == 1:
        points = np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)], dtype=float)
    else:
        points = np.array([(x + side / 2, y), (x + side, y + side), (x, y + side)], dtype=float)
    ImageDraw.Draw(image).polygon([tuple(point) for point in points], fill=list(SHAPES.values())[kind])
    return [x, y, side, side], points.flatten().tolist()


def write_shapes(folder: Path, images: int, *, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """Write pictures with one or two shapes in COCO's layout: images/ and annotations.json."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 10 * (place + 1), "name": name} for place, name in enumerate(SHAPES)],
    }
    for number in range(1, images + 1):
        image = Image.new("RGB", size, (200, 200, 200))
        for place in range(1 + number % 2):
            kind = (number + place) % 3
            box, polygon = draw_shape(image, generator, kind, side=int(generator.integers(20, 32)))
            entry = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": 10 * (kind + 1)}
            entry |= {"bbox": box, "segmentation": [polygon], "area": box[2] * box[3], "iscrowd": 0}
            content["annotations"].append(entry)
        image.save(folder / "images" / f"{number:06}.jpg", quality=95)
        entry = {"id": number, "file_name": f"{number:06}.jpg", "width": size[0], "height": size[1]}
        content["images"].append(entry)
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def paste_shapes(files: list[Path], folder: Path) -> Path:
    """Draw a shape on each photograph and annotate it, in COCO's layout. EXIF data, such as a rotation, is kept."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    content: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": place + 1, "name": name} for place, name in enumerate(SHAPES)],
    }
    for number, file in enumerate(files, start=1):
        with Image.open(file) as photograph:
            exif = photograph.getexif()
            image = photograph.convert("RGB")
        kind = number % 3
        box, polygon = draw_shape(image, generator, kind, side=min(image.size) // 2)
        image.save(folder / "images" / file.name, "JPEG", exif=exif)
        width, height = image.size
        content["images"].append({"id": number, "file_name": file.name, "width": width, "height": height})
        entry = {"id": number, "image_id": number, "category_id": kind + 1, "bbox": box, "segmentation": [polygon]}
        content["annotations"].append({**entry, "area": box[2] * box[3], "iscrowd": 0})
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def write_voc(folder: Path, shapes: Path, *, train: int) -> Path:
    """Write the pictures of `write_shapes` in VOC's layout; the first ones are 2007_trainval, the others 2007_test."""
    content = json.loads((shapes / "annotations.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    root = folder / "VOC2007"
    for part in ("Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    (root / "JPEGImages").symlink_to(shapes / "images")
    numbers = []
    for picture in content["images"]:
        number = Path(picture["file_name"]).stem
        numbers.append(number)
        objects = ""
        for entry in content["annotations"]:
            if entry["image_id"] == picture["id"]:
                x, y, width, height = entry["bbox"]
                sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
                box = "".join(f"<{name}>{value}</{name}>" for name, value in sides.items())
                objects += f"<object><name>{names[entry['category_id']]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{picture['width']}</width><height>{picture['height']}</height></size>"
        (root / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    for name, chosen in (("trainval", numbers[:train]), ("test", numbers[train:])):
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{number}\n" for number in chosen))
    return folder


def run_detection(name: str, *words: object) -> None:
    """Run the `main` of a program of detection/ in this process."""
    import importlib

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        patch.setattr(sys, "path", list(sys.path))
        try:
            importlib.import_module(f"detection.{name}").main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
