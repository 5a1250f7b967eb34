"""Small files in the formats in which the suites' data sets are published, made on the spot."""

import csv
import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def image(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)
    return path


def listing(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def cars(root: Path) -> None:
    from scipy.io import savemat

    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for split, count, path in (
        ("train", 20, root / "devkit" / "cars_train_annos.mat"),
        ("test", 4, root / "cars_test_annos_withlabels.mat"),
    ):
        kinds = [("bbox_x1", "u1"), ("class", "u1"), ("fname", "O")]
        rows = np.array([(0, 1 + i % 2, f"{i + 1:05}.jpg") for i in range(count)], dtype=kinds)
        savemat(path, {"annotations": rows})
        for i in range(count):
            image(root / f"cars_{split}" / f"{i + 1:05}.jpg")


def dtd(root: Path) -> None:
    for part, count in (("train1", 10), ("val1", 10), ("test1", 3)):
        lines = [f"{name}/{name}_{part}{i:04}.jpg" for name in ("banded", "polka-dotted") for i in range(count)]
        listing(root / "dtd" / "labels" / f"{part}.txt", lines)
        for line in lines:
            image(root / "dtd" / "images" / line)


def eurosat(root: Path) -> None:
    for name in ("AnnualCrop", "Forest", "SeaLake"):
        for i in range(20):
            image(root / "2750" / name / f"{name}_{i + 1}.jpg")


def gtsrb(root: Path) -> None:
    for number in range(43):
        for i in range(2):
            image(root / "GTSRB" / "Training" / f"{number:05}" / f"00000_{i:05}.ppm")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i, label in enumerate((14, 0, 42)):
        image(root / "GTSRB" / "Final_Test" / "Images" / f"{i:05}.ppm")
        rows.append(f"{i:05}.ppm;53;54;6;5;48;49;{label}")
    listing(root / "GT-final_test.csv", rows)


def mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count, packed in (("train", 40, True), ("t10k", 10, False)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count)),
        }
        for name, content in files.items():
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)


def resisc45(root: Path) -> None:
    for part, start, count in (("train", 1, 5), ("val", 11, 2), ("test", 21, 3)):
        names = ("airplane", "baseball_diamond")
        lines = [f"{name}_{number:03}.jpg" for name in names for number in range(start, start + count)]
        listing(root / f"resisc45-{part}.txt", lines)
        for line in lines:
            image(root / "NWPU-RESISC45" / line.rsplit("_", 1)[0] / line)


def sun397(root: Path) -> None:
    classes = ("/a/abbey", "/b/bow_window/indoor")
    listing(root / "SUN397" / "ClassName.txt", classes)
    for part, start, count in (("Training_01", 0, 10), ("Testing_01", 50, 2)):
        lines = [f"{name}/sun_{i:03}.jpg" for name in classes for i in range(start, start + count)]
        listing(root / "Partitions" / f"{part}.txt", lines)
        for line in lines:
            image(root / "SUN397" / line.lstrip("/"))


def svhn(root: Path) -> None:
    from scipy.io import savemat

    root.mkdir(parents=True)
    for split, count in (("train", 40), ("test", 10)):
        pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(
            root / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[1 + i % 10] for i in range(count)], np.uint8)}
        )


def imagenet(root: Path) -> None:
    for number in range(1000):
        synset = "n01440764" if number == 0 else f"n{2000000 + number:08}"
        for part, count in (("train", 2), ("val", 1)):
            for i in range(count):
                path = root / part / synset / f"{synset}_{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()  # it is listed, not opened


ANSWERS = ["sand", "forests", "local weather", "heat", "life", "ice", "motion", "city"]
CHOICES = {"text": ANSWERS, "label": list("ABCDEFGH")}
SPEED = {"text": ["slower", "faster"], "label": ["A", "B"]}
ROWS = {
    "qasc": {"id": "3", "question": "Climate is described in terms of what?", "choices": CHOICES, "answerKey": "C",
             "fact1": "Climate is weather.", "fact2": "Fire follows wind."},
    "wiki_qa": {"question_id": "Q1", "question": "how are caves formed", "answer": "By water.",
                "label": 1},
    "quartz": {"id": "Q", "question": "Does a heavier cup cool", "choices": SPEED,
               "answerKey": "B", "para": "Heavy things cool slowly."},
    "paws": {"id": 1, "sentence1": "A beats B.", "sentence2": "B beats A.", "label": 0},
    "winogrande": {"sentence": "Ann thanked Bea because _ helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    "wsc": {"text": "Tom hit Jim since he cried.", "span1_index": 0, "span2_index": 4, "span1_text": "Tom",
            "span2_text": "he", "idx": 0, "label": 0},
    "rte": {"premise": "It rains.", "hypothesis": "it is wet.", "idx": 0, "label": 0},
}  # fmt: skip


def language(root: Path, name: str, count: int = 40) -> None:
    """Parquet files of one row again and again, or the two CSV files of Story Cloze."""
    root.mkdir(parents=True)
    if name == "story_cloze":
        columns = ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5)),
                   "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]  # fmt: skip
        for part in ("val", "test"):
            with (root / f"cloze_test_{part}__spring2016 - cloze_test_ALL_{part}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows([f"s{i}", "Rick grew up, poor.", "He fell.", "He rose.", "He won.", "He wept.",
                                  "He smiled.", 1 + i % 2] for i in range(count))  # fmt: skip
        return
    import datasets

    for split in ("train", "validation", "test"):
        datasets.Dataset.from_list([ROWS[name]] * count).to_parquet(root / f"{split}-00000-of-00001.parquet")


VISION = {reader.__name__: reader for reader in (cars, dtd, eurosat, gtsrb, mnist, resisc45, sun397, svhn, imagenet)}
LANGUAGE = (*ROWS, "story_cloze")
