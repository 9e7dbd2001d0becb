"""ONNX files: written whole or with their weights beside them, by libraries that are kept quiet and offline."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from famc.steps.exports import ONNX_INLINE

log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Offline, and with the prints, bars and warnings of what makes the file sent to the debug log."""
    import huggingface_hub.constants as hub

    said = io.StringIO()
    before, os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE"), "1"
    constant, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True  # read from the environment at import only
    disabled = logging.root.manager.disable
    # Importing onnxruntime's quantisers sets the root logger up, as if they were the program.
    level, handlers = logging.root.level, logging.root.handlers[:]
    logging.disable(logging.WARNING)  # their own logger has a level and a handler of its own
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.HF_HUB_OFFLINE = constant
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        logging.disable(disabled)
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers
        if said.getvalue():
            log.debug("making the graph, it was said:\n%s", said.getvalue())


def save(model: ir.Model, target: Path) -> None:
    """One file if it fits into a protobuf, else the weights beside it as transformers.js names them."""
    data = target.with_name(target.name + "_data")
    for stale in (target, data):
        stale.unlink(missing_ok=True)
    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    with quiet():
        if weights < ONNX_INLINE:
            # loaded: else it would point into the scratch folder that it was made in
            ir.save(ir.external_data.load_to_model(model), target)
        else:
            ir.save(model, target, external_data=data.name)
