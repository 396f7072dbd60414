"""The page of an evaluation: one HTML file, pictures inside; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..encoders.images import load_image
from ..errors import InputError
from ..workflows import write_text
from .report_parts import STYLE, histogram, matrix_table

THUMB = 128  # pixels of a picture's longer side on the page
PICTURES = 300  # on the page; an even choice where there are more (our choice, about 1.5 MB)
WORST = 12


def write_page(result: dict[str, Any], path: Path, folder: Path, photos: Mapping[str, Path]) -> Path:
    """Write the page of an evaluation's JSON object.

    Args:
        result: of `evaluate.evaluate`.
        path: of the page.
        folder: where the pictures lie.
        photos: a photo of each person by name.
    """
    parts = [
        _head(result),
        _figures(result),
        _changes(result),
        _caveats(result),
        _recognisers(result),
        _histograms(result),
    ]
    parts += [_worst(result, folder), _grids(result, folder, photos)]
    title = f"idcore evaluation of {html.escape(result['folder'])}"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<style>{STYLE}</style></head><body><main><h1>{title}</h1>"
    write_text(path, head + "".join(parts) + "</main></body></html>")
    return path


def _head(result: dict[str, Any]) -> str:
    c, m = result["counts"], result["machine"]
    said = f"{c['pictures']} pictures, {c['people']} people, {c['prompts']} prompts"
    if c["unreadable"]:
        said += f", <b>{len(c['unreadable'])} files missing or unreadable</b>"
    where = ", ".join(html.escape(str(m[k])) for k in ("cpu", "gpu", "torch", "commit") if m.get(k))
    return f'<p>{said}</p><p class="small"><code>{html.escape(result["command"])}</code><br>{where}</p>'


def _figures(result: dict[str, Any]) -> str:
    lines = []
    for key, f in result["figures"].items():
        between = "" if f.get("low") is None else f"{_number(f['low'])} to {_number(f['high'])}"
        arrow = {"higher": "&uarr;", "lower": "&darr;"}.get(f["better"], "")
        name = key.split(".")[0]
        mark = _circular(result["recognisers"][name]["circular"]) if name in result["recognisers"] else ""
        cells = (
            f"<code>{html.escape(key)}</code> {mark}",
            f"<b>{_number(f['mean'])}</b> {arrow}",
            between,
            str(f["n"]),
        )
        tail = f"<td>{html.escape(f['words'])}</td></tr>"
        lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + tail)
    head = "".join(f"<th>{t}</th>" for t in ("figure", "mean", "95 %", "n", "what it is"))
    return f"<h2>Figures</h2><table><tr>{head}</tr>{''.join(lines)}</table>"


def _changes(result: dict[str, Any]) -> str:
    """Against an earlier evaluation, where there is one."""
    lines = [f"<li><code>{html.escape(c['words'])}</code></li>" for c in result.get("changes", ())]
    return f"<h2>Against the earlier evaluation</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _circular(state: str) -> str:
    words = {"yes": "circular", "unknown": "circular?"}
    return f'<span class="mark">{words[state]}</span>' if state in words else ""


def _caveats(result: dict[str, Any]) -> str:
    items = "".join(f"<li>{html.escape(t)}</li>" for t in result["caveats"])
    return f"<h2>How to read this</h2><ul>{items}</ul>"


def _recognisers(result: dict[str, Any]) -> str:
    out = []
    for name, r in result["recognisers"].items():
        lines = [f"<h2>{html.escape(name)} {_circular(r['circular'])}</h2><p>{html.escape(r['recogniser'])}, "]
        lines.append(
            f"{html.escape(r['measure'])}, threshold {r['threshold']:g} ({html.escape(r['threshold_from'])})</p>"
        )
        means = [(k, v) for k, v in r.items() if k.startswith("between_") and v is not None]
        lines.append("<table>" + "".join(f"<tr><td>{k.replace('_', ' ')}</td><td>{v:.3f}</td></tr>" for k, v in means))
        lines.append("</table>" + matrix_table(r["matrix"], result["people"], nearer_is_small=r["measure"] == "l2"))
        out.append("".join(lines))
    return "".join(out)


def _histograms(result: dict[str, Any]) -> str:
    keys = [k for k, f in result["figures"].items() if _spreads(result, k)]
    thresholds = {f"{n}.own": r["threshold"] for n, r in result["recognisers"].items()}
    boxes = [histogram(k, _values(result, k), thresholds.get(k)) for k in keys]
    return f'<h2>Spread</h2><div class="flow">{"".join(boxes)}</div>' if boxes else ""


def _values(result: dict[str, Any], key: str) -> list[float]:
    return [r["scores"][key] for r in result["rows"] if key in r["scores"]]


def _spreads(result: dict[str, Any], key: str) -> bool:
    """More than two values: shares of yes and no have no histogram worth a look."""
    return len(set(_values(result, key))) > 2 and not key.startswith("without.") and not key.endswith(".own_counted")


def _worst(result: dict[str, Any], folder: Path) -> str:
    name = next(iter(result["recognisers"]))
    lower = result["recognisers"][name]["measure"] == "l2"
    scored = [r for r in result["rows"] if f"{name}.own_counted" in r["scores"]]
    scored.sort(key=lambda r: r["scores"][f"{name}.own_counted"], reverse=lower)
    if len(scored) <= WORST:
        return ""
    cards = "".join(_card(r, folder, result, with_prompt=True) for r in scored[:WORST])
    return f'<h2>Least like their person</h2><div class="flow">{cards}</div>'


def _grids(result: dict[str, Any], folder: Path, photos: Mapping[str, Path]) -> str:
    rows = result["rows"]
    step = max(1, math.ceil(len(rows) / PICTURES))
    chosen = rows[::step]
    note = f"<p>{len(chosen)} of {len(rows)} pictures, evenly chosen.</p>" if step > 1 else ""
    groups: dict[str, dict[str, list[dict]]] = {}
    for r in chosen:
        groups.setdefault(r["person"], {}).setdefault(r["prompt"], []).append(r)
    out = [f"<h2>Pictures</h2>{note}"]
    for person, prompts in sorted(groups.items(), key=lambda g: (not g[0], g[0])):  # nobody comes last
        photo = _image(photos[person], "photo") if person in photos else ""
        out.append(
            f'<h3>{html.escape(person or "nobody in particular")}</h3><div class="person">{photo}<div class="flow">'
        )
        for prompt, several in prompts.items():
            cards = "".join(_card(r, folder, result) for r in several)
            out.append(f'<div><p class="prompt">{html.escape(prompt)}</p><div class="flow">{cards}</div></div>')
        out.append("</div></div>")
    return "".join(out)


def _card(row: dict, folder: Path, result: dict[str, Any], with_prompt: bool = False) -> str:
    scores = row["scores"]
    lines = [f"{k.removesuffix('.own')} {_number(v)}" for k, v in scores.items() if _shown(k)]
    bad = scores.get("face_found") == 0 or any(v == 0 for k, v in scores.items() if k.endswith(".same_person"))
    if scores.get("face_found") == 0:
        lines.insert(0, "no face")
    for label, asked in row["labels"].items():
        got = row.get("seen", {}).get(label)
        if got is not None and got != asked:
            lines.append(f"{label}: {got}, wanted {asked}")
    text = "<br>".join(html.escape(t) for t in lines)
    name = f"{row['person']} {row['prompt']}" if with_prompt else f"seed {row['seed']}"
    why = result["counts"]["unreadable"].get(row["file"])
    shown = f'<div class="none">{html.escape(why)}</div>' if why else _image(folder / row["file"], row["file"])
    kind = "card bad" if bad or why else "card"
    return f'<figure class="{kind}">{shown}<figcaption>{html.escape(name)}<br>{text}</figcaption></figure>'


def _shown(key: str) -> bool:
    return key.endswith(".own") or key in ("clip_text", "clip_image", "pair.clip", "pair.features", "pair.ssim")


def _image(path: Path, words: str) -> str:
    """A JPEG inside the page."""
    try:
        picture = load_image(path)
    except InputError as e:
        return f'<div class="none">{html.escape(str(e))}</div>'
    scale = THUMB / max(picture.size)
    if scale != 1:
        size = tuple(max(1, round(s * scale)) for s in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{html.escape(words, quote=True)}" src="data:image/jpeg;base64,{data}">'


def _number(v: float | None) -> str:
    if v is None:
        return ""
    return f"{v:.1f}" if abs(v) >= 100 else f"{v:.2f}" if abs(v) >= 10 else f"{v:.3f}"
