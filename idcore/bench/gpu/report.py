"""The Markdown form of what the GPU parts found."""

from __future__ import annotations

from typing import Any


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join("" if x is None else str(x) for x in row) + " |" for row in rows] + [""]


def _checks(parts: dict[str, Any]) -> list[str]:
    rows = []
    for name, result in parts.items():
        said = result.get("error", "").splitlines()[:1]
        if name == "tests" and not said:
            bad = result["failures"] + result["errors"]
            said = [f"{result['tests']} tests, {bad} failed, {result['skipped']} skipped"]
        if name == "races" and not said:
            late = f"; {result['not_run']} not run" if result.get("not_run") else ""
            said = [f"{result['calls']} calls x {result['repeats']}: {result['different']}{late}"]
        if name == "sanitize" and not said:
            verdicts = result["verdicts"].items()
            said = [f"{result['calls']} calls; " + ", ".join(f"{tool}: {v['findings']}" for tool, v in verdicts)]
        if name == "timings" and not said:
            late = [f"no time for {', '.join(result['not_run'])}"] if result.get("not_run") else []
            said = ["; ".join([*result["problems"], *late]) or f"{len(result['rows'])} calls timed"]
        said = ["; ".join([*said, *(f"lost: {step}" for step in result.get("lost", {}))])]
        rows.append([name, "right" if result["ok"] else "**wrong**", result.get("seconds"), *(said or [""])])
    return ["## Checks", "", *_table(["part", "verdict", "s", "what"], rows)]


def _timing_rows(timings: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for r in timings["rows"]:
        for backend, ratio in r.get("ratio", {}).items():
            rows.append([
                r["case"], r["dtype"], r["batch"], r["merge"], backend, r["cold"][backend]["us"],
                r["warm"][backend]["us"], r["launched_us"][backend], r["floor_us"], ratio["share_of_copy_bandwidth"],
                ratio["over_text_only_flash"], ratio.get("eager"), ratio.get("compiled"), r["launches"][backend],
            ])  # fmt: skip
    return rows


def _timings(timings: dict[str, Any]) -> list[str]:
    head = ["case", "dtype", "B", "merge", "backend", "us cold", "us warm", "us launched", "floor us", "of bandwidth",
            "ours / text-only flash", "eager / ours", "compiled / ours", "launches"]  # fmt: skip
    lines = [
        "## id_attention", "",
        f"Medians; graphs with a cold L2 unless told otherwise. Copy bandwidth {timings.get('copy_gb_per_s')} GB/s.",
        "",
        *_table(head, _timing_rows(timings)),
        "## The 70 cross-attention layers of SDXL's UNet at 1024 px, one graph", "",
    ]  # fmt: skip
    head = ["merge", "B", "dtype", "text only ms", "whole ms", "identity's part ms"]
    rows = [[u["merge"], u["batch"], u["dtype"], u["text_only_ms"], u["whole_ms"], u["identity_ms"]]
            for u in timings.get("unet", [])]  # fmt: skip
    lines += _table(head, rows)
    head = ["op", "case", "pass", "merge", "dtype", "backend", "ms", "eager / ours"]
    rows = [[r["op"], r["case"], r["pass"], r["merge"], r["dtype"], r["backend"], r.get("ms"),
             r.get("ratio", {}).get("eager")] for r in timings.get("ops", [])]  # fmt: skip
    lines += ["## All ops, launched from Python", "", *_table(head, rows)]
    head = ["dtype", "variant", "ms", "diffusers / ours"]
    rows = [[d["dtype"], name, ms, d["diffusers_over"].get(name)]
            for d in timings.get("decode", []) for name, ms in d.get("ms", {}).items()]  # fmt: skip
    return (
        [*lines, "## SDXL's autoencoder, latents to a picture of 1024 px", "", *_table(head, rows)] if rows else lines
    )


def markdown(whole: dict[str, Any]) -> str:
    """Checks, then times."""
    m = whole["machine"]
    lines = [
        "# GPU results", "", *(["Dry: on the CPU, no figure counts.", ""] if whole.get("dry") else []),
        f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, triton {m['triton']}, commit {m['commit']}; "
        f"`{whole['command']}`", "",
        *_checks(whole["parts"]),
    ]  # fmt: skip
    timings = whole["parts"].get("timings", {})
    if "rows" in timings:
        lines += _timings(timings)
    return "\n".join(lines).rstrip() + "\n"
