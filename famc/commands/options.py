"""The words that each command takes, in argparse's terms."""

from __future__ import annotations

from argparse import ArgumentParser

NO_SPEC = frozenset({"schema", "doctor", "estimate", "calibrate"})  # commands that read no family
SELECTING = frozenset({"plan", "build", "status", "graph"})


def add(name: str, command: ArgumentParser) -> None:
    """What a command takes."""
    command.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    command.add_argument("-q", "--quiet", action="store_true", help="errors only")
    if name not in NO_SPEC:
        what = "the family's YAML file" + (", or a plan that `famc plan -o` wrote" if name == "build" else "")
        command.add_argument("spec", metavar="SPEC", help=what)
    if own := OWN.get(name):
        own(command)
    if name in NO_SPEC:
        return
    command.add_argument(
        "--out", metavar="DIR", help="where the store and the release lie (default: generated/<family>)"
    )
    command.add_argument("--profile", metavar="NAME", help="a set of overrides that the spec names")
    command.add_argument(
        "--set", metavar="PATH=VALUE", action="append", help="override one value; may be repeated"
    )
    command.add_argument(
        "--smoke", action="store_true", help="the same graph with 2-layer models and a few steps"
    )
    if name in SELECTING:
        command.add_argument(
            "--select",
            metavar="SELECTOR",
            action="append",
            help="steps, e.g. +0.6b/instruct, kind:export, state:changed",
        )


def _step(command: ArgumentParser) -> None:
    command.add_argument("step", metavar="STEP", help="a step, or a selector")


def _plan(command: ArgumentParser) -> None:
    command.add_argument("-o", "--output", metavar="FILE", help="write the plan; `famc build FILE` does it")
    command.add_argument("--all", action="store_true", help="list cached steps too")
    command.add_argument(
        "--minimize", choices=("cost", "time"), help="choose each step's layout for this, over the whole plan"
    )
    command.add_argument(
        "--deadline", metavar="TIME", help="e.g. 14d, 36h: the cheapest plan that ends by then"
    )
    command.add_argument("--budget", metavar="USD", help="e.g. 250000: the fastest plan that costs no more")
    command.add_argument(
        "--optimal",
        metavar="SECONDS",
        nargs="?",
        type=float,
        const=30.0,
        help="let CP-SAT improve the schedule, for at most so long (30)",
    )
    command.add_argument(
        "--whatif", metavar="NAMES", help="compare accelerators side by side, e.g. h100-80g,a100-80g"
    )
    command.add_argument(
        "--targets",
        metavar="NAMES",
        nargs="?",
        const="",
        help="how every export runs on these devices, e.g. rtx4090",
    )


def _build(command: ArgumentParser) -> None:
    command.add_argument("--fail-fast", action="store_true", help="start nothing more once a step has failed")


def _graph(command: ArgumentParser) -> None:
    command.add_argument(
        "--format", choices=("mermaid", "dot"), default="mermaid", help="language of the picture"
    )


def _verify(command: ArgumentParser) -> None:
    command.add_argument(
        "--repair", action="store_true", help="remove damaged artifacts, so that build makes them again"
    )


def _gc(command: ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="tell what would be removed")
    command.add_argument(
        "--keep", metavar="SPEC", action="append", help="another spec whose artifacts are kept"
    )


def _bench(command: ArgumentParser) -> None:
    command.add_argument("variant", metavar="VARIANT", help="m/instruct, or instruct at all its sizes")
    command.add_argument(
        "--threads", metavar="N", type=int, default=0, help="threads of a runtime (default: all cores)"
    )
    command.add_argument("--prompt", metavar="N", type=int, default=512, help="tokens of the prompt")
    command.add_argument("--tokens", metavar="N", type=int, default=64, help="tokens that are decoded")
    command.add_argument("--repeats", metavar="N", type=int, default=3, help="how often each is measured")
    command.add_argument(
        "--runtime", metavar="NAME", action="append", help="only this one, e.g. llama.cpp; may be repeated"
    )


def _try(command: ArgumentParser) -> None:
    command.add_argument("variant", metavar="VARIANT", help="m/instruct, or instruct if one size has it")
    command.add_argument(
        "text", metavar="TEXT", nargs="?", help="what to ask (default: a prompt, or each line of stdin)"
    )
    command.add_argument("-k", metavar="N", type=int, help="results that are shown (default: 5)")
    command.add_argument("--by", metavar="HOW", help="search by bm25, embedder or fused, both of them")
    command.add_argument("--dims", metavar="N", type=int, help="search by the first N numbers of a vector")
    command.add_argument("--max-new-tokens", metavar="N", type=int, help="of an answer (default: 128)")
    command.add_argument("--export", metavar="NAME", help="run this export, e.g. onnx-int8, not the weights")
    command.add_argument("--threads", metavar="N", type=int, default=0, help="default: all cores")


def _doctor(command: ArgumentParser) -> None:
    command.add_argument(
        "--exports", action="store_true", help="architecture x task x format x quantisation x runtime"
    )


def _estimate(command: ArgumentParser) -> None:
    what = command.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="PRESET", help="a published shape, e.g. qwen3-8b")
    what.add_argument("--config", metavar="FILE", help="a Hugging Face config.json")
    what.add_argument("--batch", metavar="CASES.csv", help="one setup a row, one JSON object a line")
    command.add_argument("--backend", metavar="NAME", help="an accelerator, e.g. h100-80g")
    for flag, about in (
        ("--devices", "accelerators in all"),
        ("--seq-len", "tokens a sequence"),
        ("--global-batch", "sequences an optimizer step"),
        ("--micro-batch", "sequences a pass"),
        ("--tp", "tensor-parallel degree"),
        ("--pp", "pipeline stages"),
        ("--cp", "context-parallel degree"),
        ("--ep", "expert-parallel degree"),
        ("--dp-shard", "devices that share one copy of the state"),
    ):
        command.add_argument(flag, metavar="N", help=f"{about} (default: searched for)")
    command.add_argument("--recompute", metavar="HOW", help="none, selective or full (default: searched for)")
    command.add_argument(
        "--precision", metavar="NAME", help="bf16, fp16, fp32 or fp8 (default: the device's)"
    )
    command.add_argument("--tokens", metavar="N", help="tokens to train on, e.g. 300B (default: one step)")


def _calibrate(command: ArgumentParser) -> None:
    command.add_argument("--out", metavar="FILE", help="default: the user's own backends")
    command.add_argument(
        "--seconds", metavar="S", type=float, default=None, help="to measure for (default: 35)"
    )


OWN = {
    "why": _step, "show": _step, "plan": _plan, "build": _build, "graph": _graph, "verify": _verify, "gc": _gc,
    "bench": _bench, "try": _try, "doctor": _doctor, "estimate": _estimate, "calibrate": _calibrate,
}  # fmt: skip
