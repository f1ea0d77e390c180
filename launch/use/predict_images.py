"""Predictions of images and folders as files: pictures to look at, one JSON for programs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from evmamba.errors import UserError
from evmamba.launch.fit.checkpoint_metadata import load_trained_network
from evmamba.launch.store.results import check_writable, write_json
from evmamba.tasks import TASKS
from evmamba.tasks.images import is_image_file, read_image
from evmamba.tasks.plain_files import is_file
from evmamba.tasks.predictor import Predictor

FILE_NAME = "predictions.json"
SUFFIXES = {"picture": ".jpg", "label": ".png"}


def load_predictor(checkpoint: Path, device: torch.device | str = "cpu") -> Predictor:
    """Make a predictor of a checkpoint.

    Raises:
        UserError: see `evmamba.launch.fit.checkpoint_metadata.load_trained_network`.
    """
    found = load_trained_network(checkpoint)
    predictor: type[Predictor] = TASKS[found.task].load("predictor")
    return predictor(found.module, found.class_names, found.data, torch.device(device))


def find_images(given: Sequence[Path]) -> dict[str, Path]:
    """Name -> file of the images that were asked for; a folder stands for all images below it.

    A name is the path below the folder that was given, without suffix unless two images differ in nothing else.

    Raises:
        UserError: no such file or folder, or no images there.
    """
    found: dict[str, Path] = {}
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and is_image_file(p))
            if not inside:
                raise UserError(f"no images in the folder {path}")
            named = [(p.relative_to(path), p) for p in inside]
        elif is_file(path):
            named = [(Path(path.name), path)]
        else:
            raise UserError(f"{path}: no such image or folder")
        for name, file in named:
            plain = name.with_suffix("").as_posix()
            unique, n = plain if plain not in found else name.as_posix(), 1
            while unique in found:
                n += 1
                unique = f"{plain}-{n}"
            found[unique] = file
    return found


def predict_images(
    predictor: Predictor, given: Sequence[Path], output: Path, min_score: float, console: Console
) -> list[Path]:
    """Write ``pictures/NAME.jpg``, of segmentation ``labels/NAME.png``, and ``predictions.json`` with all of it.

    Args:
        predictor: the network.
        given: images and folders.
        output: folder for the files.
        min_score: detections below are left out.
        console: where progress, unreadable files and the place of the output are told.

    Returns:
        The files that could not be read; they are told, and the others are predicted.

    Raises:
        UserError: see `find_images`; an output that cannot be written; no image could be read.
    """
    images = find_images(given)
    check_writable(output, "--output")
    entries, unreadable = [], []
    for name, file in track(images.items(), "predicting", console=console, transient=True):
        try:
            image = read_image(file)
        except UserError as error:
            console.print(f"left out: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
            unreadable.append(file)
            continue
        with torch.inference_mode():
            values, pictures = predictor.predict(image, min_score)
        entry = {"image": str(file), "width": image.width, "height": image.height} | values
        for kind, picture in pictures.items():
            target = output / f"{kind}s" / f"{name}{SUFFIXES[kind]}"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            entry[kind] = target.relative_to(output).as_posix()
        entries.append(entry)
    if not entries:
        raise UserError(f"none of the {len(images)} images could be read")
    write_json(output / FILE_NAME, {"class_names": predictor.class_names, "images": entries})
    console.print(
        f"{len(entries)} images: {output / FILE_NAME}, {output / 'pictures'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return unreadable
