"""`idcore augment`, callable from Python: names through workers into a folder, here or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from ...errors import IdcoreError, InputError
from ..data.claiming import alone
from .options import Made
from .report import AugmentReport, contact_sheet
from .setup import Job
from .store import Folder


def augment(
    names: Sequence[str], out: str | Path, job: Job, *, cluster: object = None, progress: bool = True
) -> AugmentReport:
    """Draw, judge and keep pairs of pictures of each name. A second call goes on where the first stopped, with more
    names or fewer: a name is done once, and the result of one hangs on no other.

    Args:
        names: that the base model may know.
        out: folder to write; this process alone writes into it, wherever the workers run.
        job: prompts, settings and models.
        cluster: an `on_ray.Cluster`; None: in this process.

    Raises:
        InputError: no names, or `out` was made with other settings (the first that differ are named).
        IdcoreError: the folder cannot be written, the base gives NaN, or a worker died too often. What stands is kept.
    """
    names = list(dict.fromkeys(names))
    if not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise InputError(f"augment: wanted a list of names, got {names!r:.80}")
    job.config.check()
    folder = Folder(out, job.fingerprint())
    with alone(folder.out, "idcore augment"):
        folder.tidy()
        missing = [n for n in names if not folder.stands(n)]
        _make(missing, folder, job, cluster, len(names), progress)
        return _finish(names, folder, len(names) - len(missing), job)


def _make(missing: Sequence[str], folder: Folder, job: Job, cluster: object, total: int, progress: bool) -> None:
    from tqdm import tqdm

    if not missing:
        return
    pairs = 0
    bar = tqdm(total=total, initial=total - len(missing), desc="augmenting", unit="name", disable=not progress)
    # Closed at once where writing fails: a cluster is not left working.
    with bar, closing(_here(missing, job) if cluster is None else cluster.run(missing, job)) as work:
        for made in work:
            folder.write(made)
            pairs += len(made.pairs)
            bar.update()
            bar.set_postfix(pairs=pairs, refresh=False)


def _here(names: Sequence[str], job: Job) -> Iterator[Made]:
    unit = job.build()
    for name in names:
        yield unit(name)


def _finish(names: Sequence[str], folder: Folder, reused: int, job: Job) -> AugmentReport:
    models = job.models
    told = {"measure": getattr(models, "faces", ""), "base": getattr(models, "base", "")}
    pairs, drops, manifest = folder.finish(names, told)
    report = AugmentReport(len(names), pairs, drops, manifest["drawn"], reused, folder.out)
    if pairs:
        sheet = contact_sheet(folder.out, pairs)
        staged = folder.out / ".examples.png.part"
        try:
            sheet.save(staged, format="PNG")
            staged.replace(folder.out / "examples.png")
        except OSError as e:
            raise IdcoreError(f"cannot write {folder.out / 'examples.png'}: {e.strerror or e}") from e
    return report
