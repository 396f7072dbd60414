"""Where the pictures of `idcore generate` are put: each when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .workflows import save_picture, writable_folder

if TYPE_CHECKING:
    from PIL import Image

    from .generating import GenerateRequest

WITHOUT_STYLE = "without_style"


class Album:
    """The pictures of a request, each written when it is drawn: what stops the others costs none of them."""

    def __init__(self, r: GenerateRequest) -> None:
        self.request, self.folder, self.plain = r, writable_folder(r.out), 0
        self.paths: list[Path] = []
        self._about: dict[str, str] | None = None

    def add(self, picture: Image.Image, without_style: bool = False) -> None:
        """The next one."""
        from .generating import about

        self._about = self._about or about(self.request)
        facts, folder, i = self._about, self.folder, len(self.paths)
        if without_style:
            facts, folder, i = facts | {"style_sha256": ""}, writable_folder(folder / WITHOUT_STYLE), self.plain
        seed = self.request.seed + i
        path = save_picture(picture, folder / f"{i:03d}_seed{seed}.png", {**facts, "seed": str(seed)})
        if without_style:
            self.plain += 1
        else:
            self.paths.append(path)

    def what_is_left(self) -> str:
        """For somebody who stopped the command; empty where nothing is."""
        done, r = len(self.paths), self.request
        if not 0 < done < r.count:
            return ""
        return (
            f"{done} of {r.count} pictures are in {r.out}; the others: --seed {r.seed + done} --count {r.count - done}"
        )
