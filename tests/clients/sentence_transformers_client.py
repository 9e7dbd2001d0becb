"""One request as JSON on stdin, its answer as JSON on stdout: what sentence-transformers makes of a folder.

    {"task": "feature-extraction", "folder", "file", "texts"} -> {"onnx": vectors, "torch": vectors}
    {"task": "text-ranking", "folder", "file", "pairs"}       -> {"onnx": logits, "torch": logits}

`file` is the graph inside the folder. Run by the Python of a virtual environment of its own (see clients.py): this
version of sentence-transformers with ONNX Runtime needs an older transformers than famc.
"""

from __future__ import annotations

import contextlib
import json
import sys

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # the answer alone is for stdout
        answer = {backend: _run(request, backend) for backend in ("onnx", "torch")}
    json.dump(answer, sys.stdout)


def _run(request: dict, backend: str) -> list:
    graph = {"file_name": request["file"], "provider": "CPUExecutionProvider", "export": False}
    options = {"backend": backend, "device": "cpu", "model_kwargs": graph if backend == "onnx" else {}}
    if request["task"] == "feature-extraction":
        model = SentenceTransformer(request["folder"], **options)
        return model.encode(request["texts"], batch_size=4).tolist()
    if request["task"] == "text-ranking":
        ranker = CrossEncoder(request["folder"], activation_fn=torch.nn.Identity(), **options)
        return ranker.predict([tuple(pair) for pair in request["pairs"]], batch_size=4).tolist()
    raise SystemExit(f"unknown task {request['task']}")


main()
