"""One request as JSON on stdin, its answer as JSON on stdout: what transformers alone makes of a released folder.

    {"folder", "texts", "messages", "max_new_tokens"} -> {"version", "input_ids", "rendered", "logits": of the first text's
    last token, "new_ids": greedy by generation_config.json}

Run by the Python of a virtual environment that has never seen famc (see clients.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    request = json.load(sys.stdin)
    assert importlib.util.find_spec("famc") is None, "this is not a clean environment"
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():  # the answer alone is for stdout
        words = AutoTokenizer.from_pretrained(request["folder"])
        model = AutoModelForCausalLM.from_pretrained(request["folder"], torch_dtype="auto").eval()
        ids = [words(text)["input_ids"] for text in request["texts"]]
        prompt = words.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = model.generate(**prompt, max_new_tokens=request["max_new_tokens"])[
            0, prompt["input_ids"].shape[1] :
        ]
        answer = {
            "version": transformers.__version__,
            "input_ids": ids,
            "rendered": words.apply_chat_template(
                request["messages"], tokenize=False, add_generation_prompt=True
            ),
            "logits": model(input_ids=torch.tensor(ids[:1])).logits[0, -1].float().tolist(),
            "new_ids": new.tolist(),
        }
    json.dump(answer, sys.stdout)


main()
