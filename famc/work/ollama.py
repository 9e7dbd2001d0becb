"""A Modelfile: what Ollama must be told of a GGUF file, since it does not run the chat template inside.

In: the file's name, the template in Jinja, end marks, context. Out: text. An embedder has no template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import jinja2

from famc.steps.others import CHATML
from famc.work.gguf_vocabulary import PROBES, environment, without_generation_marks

_OLLAMA_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(gguf_name: str, template: str | None, stops: Sequence[str], context: int) -> str:
    """An Ollama Modelfile for a .gguf beside it. `template`: the chat template in Jinja, or None."""
    lines = [f"FROM ./{gguf_name}"]
    if template is not None and is_chatml(template):
        lines += [f'TEMPLATE """{_OLLAMA_CHATML}"""']
    elif template is None:
        lines += [
            "# A base model without a chat template: the prompt goes to it as it is.",
            'TEMPLATE "{{ .Prompt }}"',
        ]
    else:
        lines += [
            "# Ollama doesn't run the Jinja chat template inside the GGUF. It looks for one of its own that is",
            "# like it, and else sends the bare prompt: compare `ollama show --template`, or write TEMPLATE here.",
        ]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def embedder_modelfile(gguf_name: str, context: int) -> str:
    """The same of an embedder: pooling and the marks around a text are in the file; prompts are the client's to write."""
    return f"FROM ./{gguf_name}\nPARAMETER num_ctx {context}\n"


def is_chatml(template: str) -> bool:
    """Does the template write what the family's ChatML writes? One that knows tools does more than that."""
    if "tools" in template:
        return False
    ours, theirs = (environment().from_string(without_generation_marks(t)) for t in (CHATML, template))
    try:
        return all(
            ours.render(messages=messages, add_generation_prompt=prompt)
            == theirs.render(messages=messages, add_generation_prompt=prompt)
            for messages in PROBES
            for prompt in (False, True)
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return False
