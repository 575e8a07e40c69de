"""Class scores of whole sequences, several prompts at once."""

from __future__ import annotations

import numpy as np

from ingot.runtime.generate import Prompts, pad_left
from ingot.runtime.session import Floats, Session, SessionError


def classify(session: Session, prompts: Prompts) -> Floats:
    """Score prompts with a classifier.

    Args:
        session: a ``classify`` ingot.
        prompts: token ids, any lengths; shorter ones are padded on the left. Lists of whole numbers
            or integer arrays.

    Returns:
        ``logits [B, num_labels]``; the manifest's ``labels`` name the columns.

    Raises:
        SessionError: an ingot of another task, an empty prompt, or one that holds no token ids
            or is longer than the model's context.
    """
    manifest = session.manifest
    if manifest.task != "classify":
        raise SessionError(
            f"this ingot was exported for the task {manifest.task!r} and cannot classify; export "
            "it with --task classify."
        )
    ids, mask = pad_left(prompts, manifest.generation["pad_token_id"])
    longest = manifest.generation["context_length"]
    if longest is not None and ids.shape[1] > longest:
        raise SessionError(
            f"a prompt of {ids.shape[1]} tokens exceeds this model's context of {longest}; "
            "shorten it, or export the model with a longer --context."
        )
    session.reset(*ids.shape)
    return session.step(ids, mask)


def probabilities(logits: Floats) -> Floats:
    """Softmax over the classes, ``[B, num_labels]``."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result
