"""`idcore demo`: one photo through the whole chain, a grid of pictures with their distances, and the gate."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from .encoders.images import ImageLike
from .env import command_line, machine
from .errors import InputError
from .workflows import save_picture, writable_folder, write_text

PHOTO = Path(__file__).resolve().parent / "assets" / "photos" / "astronaut.png"
TILE, LINE = 128, 14  # pixels of a picture in the grid and of a line of text


def run_demo(
    out_dir: str | Path = "demo_out", photo: ImageLike | None = None, as_json: bool = False, gate: bool = True
) -> dict[str, Any]:
    """Make `grid.png`, the pictures and `demo.json` in out_dir, and say in words how alike they are.

    Args:
        out_dir: made if missing.
        photo: a picture with a face; None: the shipped public-domain photo of an astronaut.
        as_json: leave standard output to the caller (words go to standard error).
        gate: also measure the gate's part on unseen procedural people (some 20 s on two cores).

    Returns:
        The object of demo.json: machine, command, procedural, real, seconds, pictures.

    Raises:
        NoFaceError: no face in the photo. InputError: out_dir cannot be written. WeightsError: no embedded model.
        IdcoreError: the disk is full.
    """
    from .metrics.gate import Judge, gate_people, print_progress, procedural_gate, real_gate
    from .sampling.tiny_pipeline import TinyPipeline

    start = time.perf_counter()
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder for the demo's pictures")
    writable_folder(out)
    pipe, judge = TinyPipeline.from_package(), Judge()
    picture = _load(photo)
    identity = pipe.encode(PHOTO if photo is None else photo)
    result: dict[str, Any] = {"machine": machine(), "command": command_line()}
    if gate:
        result["procedural"], others = procedural_gate(pipe, judge, progress=print_progress)
    else:
        _, others, _ = gate_people(judge, 8)
    result["real"], rows = real_gate(pipe, judge, picture, others, identity, progress=print_progress)
    result["photo"] = "the shipped astronaut" if photo is None else "given"
    result["pictures"] = _save(out, picture, rows)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["words"] = words(result)
    write_text(out / "demo.json", json.dumps(result, indent=1))
    print(result["words"], file=sys.stderr if as_json else sys.stdout)
    return result


def _load(photo: ImageLike | None) -> Image.Image:
    from .encoders.images import load_image

    return load_image(PHOTO if photo is None else photo)


def words(result: dict[str, Any]) -> str:
    """The figures in plain words."""
    real = result["real"]
    verdict = "reached" if real["reached"] else "NOT reached: the pictures do not keep this person well enough"
    lines = [
        f"Photo ({result['photo']}): median L2 distance of {real['pictures']} pictures {real['median_distance']:.3f} "
        f"(same person up to {real['threshold']:g}; to others {real['median_distance_others']:.3f}), face found in "
        f"{real['face_found']:.0%}. The real-photo gate is {verdict}."
    ]
    if "procedural" in result:
        p = result["procedural"]
        verdict = "reached" if p["reached"] else "NOT reached"
        lines.append(
            f"{p['people']} drawn people that were never trained on: right person {p['rank1']:.1%}, face found "
            f"{p['face_found']:.1%}, background as prompted {p['background']:.1%}. This gate is {verdict}."
        )
    lines.append("The recogniser that conditions the pictures also judges them: no independent proof of likeness.")
    lines.append(f"Pictures: {result['pictures'][0]}   {result['seconds']} s")
    return "\n".join(lines)


def _save(out: Path, photo: Image.Image, rows: list[dict]) -> list[str]:
    prompts = list(dict.fromkeys(r["prompt"] for r in rows))
    per = {p: [r for r in rows if r["prompt"] == p] for p in prompts}
    paths = [out / "grid.png"]
    save_picture(_grid(photo, prompts, per), paths[0])
    for k, prompt in enumerate(prompts):
        for row in per[prompt]:
            path = out / f"prompt{k}_seed{row['seed']}.png"
            paths.append(save_picture(row["picture"], path))
    return [str(p) for p in paths]


def _grid(photo: Image.Image, prompts: list[str], per: dict[str, list[dict]]) -> Image.Image:
    """The photo at the left, one column per prompt, one line per seed, the distance under every picture."""
    seeds = max(len(v) for v in per.values())
    cell, head = TILE + LINE, 3 * LINE
    left = 2 * TILE
    sheet = Image.new("RGB", (left + len(prompts) * TILE, head + seeds * cell), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(ImageOps.fit(photo, (left - 8, left - 8)), (4, head))
    draw.text((4, 2), "the photo, and 64x64 pictures", fill="black")
    draw.text((4, 2 + LINE), "made from it in 4 steps; under", fill="black")
    draw.text((4, 2 + 2 * LINE), "each its L2 distance to the photo", fill="black")
    for i, prompt in enumerate(prompts):
        for j, line in enumerate(_wrap(prompt, 21)[:3]):
            draw.text((left + i * TILE + 2, 2 + j * LINE), line, fill="black")
        for row in per[prompt]:
            x, y = left + i * TILE, head + row["seed"] * cell
            sheet.paste(row["picture"].resize((TILE - 4, TILE - 4), Image.Resampling.BICUBIC), (x + 2, y))
            text = "no face" if row["distance"] is None else f"{row['distance']:.2f}"
            draw.text((x + 50, y + TILE - 3), text, fill="black")
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
