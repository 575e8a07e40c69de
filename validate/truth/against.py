"""Another ingot in the place of the truth: two backends held against each other.

The floor stays what eager PyTorch's own error is, so a score says how far the two are apart in what
the precision costs. Both use the truth's experts, as in replayed routing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ingot.export.build import build
from ingot.export.ingot import TARGETS, Manifest
from ingot.export.progress import Stages
from ingot.export.request import PRECISIONS, ExportRequest
from ingot.graphs.adapter_weights import MergedCheckpoint
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.errors import IngotError
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import Layout, record
from ingot.validate.truth.reference import Reference, References
from ingot.validate.truth.taps import TappedSession


class AgainstError(IngotError):
    """Two ingots that cannot be held against each other."""


class OtherReference(Reference):
    """A reference whose truth is what another ingot computes.

    Args:
        reference: of the checkpoint of both.
        folder: the other ingot; its graph runs on ONNX Runtime.
        name: of it, in words.

    Raises:
        AgainstError: an ingot of another checkpoint, task or precision.
    """

    is_eager = False

    def __init__(self, reference: Reference, folder: Path, name: str) -> None:
        super().__init__(reference.checkpoint, reference.task, reference.precision, reference.cache)
        self._name = name
        self._manifest = Manifest.read(folder)
        other = (self._manifest.task, self._manifest.precision)
        if other != (self.task, self.precision):
            raise AgainstError(
                f"{folder} is {' '.join(other)} and this ingot {self.task} {self.precision}; only "
                "ingots of one task and precision are held against each other."
            )
        if self._manifest.source.get("sha256") != self.hash(Stages()):
            raise AgainstError(
                f"{folder} was not made from {self.checkpoint.path}; only ingots of one checkpoint "
                "are held against each other."
            )
        self._session = TappedSession(folder, self._manifest)

    @property
    def name(self) -> str:
        """See ``Reference.name``."""
        return self._name

    @property
    def against(self) -> str:
        """See ``Reference.against``."""
        return f"{self._name}, in what eager PyTorch's own error in {self.precision} is"

    def record(self, layout: Layout, runs: Sequence[Inputs], stages: Stages) -> list[References]:
        """The other ingot's numbers as what is expected."""
        found = super().record(layout, runs, stages)
        pairs = zip(runs, found, strict=True)
        return [self._expected(layout, inputs, each, stages) for inputs, each in pairs]

    def _expected(
        self, layout: Layout, inputs: Inputs, references: References, stages: Stages
    ) -> References:

        def choose(number: int) -> None:
            self._session.choose(self.routers.chosen(references.truth[number], inputs, number))

        with stages.stage(f"run {self._name}", len(inputs.steps), "steps") as advance:
            other = record(self._session, layout, inputs, choose, advance)
        return replace(references, expected=other)


@contextlib.contextmanager
def other_ingot(
    against: str, manifest: Manifest, checkpoint: Checkpoint, stages: Stages
) -> Iterator[tuple[Path, str]]:
    """The other ingot of ``--against``: a folder, or made of the same checkpoint for a while.

    Args:
        against: a target of ``export.ingot.TARGETS``, or an ingot's folder.
        manifest: of the ingot that is judged.
        checkpoint: of both.
        stages: shows the export.

    Yields:
        Its folder, and what to call it.

    Raises:
        IngotError: no such ingot, a damaged one, or one that cannot be made.
    """
    if against not in TARGETS:
        folder = Path(against)
        Manifest.read(folder).check_files(folder)
        yield folder, f"the ingot {against}"
        return
    adapter = None
    if isinstance(checkpoint, MergedCheckpoint):
        adapter = str(checkpoint.adapter.path)
    precision = next(short for short, full in PRECISIONS.items() if full == manifest.precision)
    with TemporaryDirectory(prefix="ingot-against-") as temporary:
        folder = Path(temporary) / against
        request = ExportRequest(
            str(checkpoint.path),
            against,
            folder,
            adapter=adapter,
            task=manifest.task,
            precision=precision,
            builder="none",
        )
        build(request, stages, None)
        yield folder, f"the {against} ingot of the same checkpoint"
