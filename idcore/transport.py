"""How published files come here: the Hugging Face hub's own client, told where to go on after a break."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from idcore.recipes import File


@dataclass(frozen=True)
class Remote:
    """What the other side says of a file: where its bytes are, its size, and its SHA-256 or git hash where told."""

    url: str
    commit: str = ""
    size: int | None = None
    sha256: str = ""
    git: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Transport(Protocol):
    """How files come here; :class:`HubTransport`, or another one in tests and behind mirrors."""

    def commit(self, repo: str) -> str:
        """The newest commit of a repository."""
        ...

    def look(self, file: File) -> Remote:
        """Where a file of a known revision, or with a URL, is."""
        ...

    def get(self, remote: Remote, part: Path) -> None:
        """Append to `part` what is missing of it."""
        ...


class HubTransport:
    """The Hugging Face hub (with its token, endpoint and offline settings), and plain HTTPS for other URLs."""

    def commit(self, repo: str) -> str:
        """See :class:`Transport`."""
        from huggingface_hub import HfApi

        return str(HfApi().model_info(repo).sha)

    def look(self, file: File) -> Remote:
        """See :class:`Transport`."""
        if file.url:
            return Remote(file.url)
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(file.repo, file.source or file.path, revision=file.revision)
        seen = get_hf_file_metadata(url)
        headers = dict(build_hf_headers())
        if urlparse(seen.location).netloc != urlparse(url).netloc:
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        etag = seen.etag or ""  # of large files the SHA-256, of others the git hash
        digest, git = (etag if len(etag) == n else "" for n in (64, 40))
        return Remote(seen.location, seen.commit_hash or "", seen.size, digest, git, tuple(headers.items()))

    def get(self, remote: Remote, part: Path) -> None:
        """See :class:`Transport`."""
        from huggingface_hub.file_download import http_get

        with open(part, "ab") as f:
            http_get(
                remote.url, f, resume_size=f.tell(), headers=dict(remote.headers), expected_size=remote.size,
                displayed_filename=part.name,
            )  # fmt: skip
